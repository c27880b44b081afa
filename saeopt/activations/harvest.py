"""Groups of micro-batches through the language model: plainly on the CPU, on a side stream on a GPU.

On a GPU the activations are copied into two sets of buffers that are made once. While one is trained on, the other is
filled; events between the two streams order this, and the host never waits.

Suffixes: n sequences of a group, T positions, N = n·T tokens, d width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saeopt.activations.language_model import compiles
from saeopt.activations.masks import keep_tokens
from saeopt.host.devices import side_stream

if TYPE_CHECKING:
    from saeopt.activations.cache import ActivationCache
    from saeopt.activations.source import Source
    from saeopt.activations.tokens import TokenBatch
    from saeopt.config.run import RunConfig


@dataclass(frozen=True)
class GroupTokens:
    """The token batches of a group, its first sample over all ranks, and the seed of its order if it is shuffled."""

    parts: list[TokenBatch]
    first_sample: int
    seed: int | None


ReadGroup = Callable[[], GroupTokens | None]
"""The next group; None at the end of the run."""


@dataclass
class Group:
    """The activations of a group: x_Nd per hook point, and which tokens count."""

    parts: list[TokenBatch]
    x: dict[str, Tensor]
    keep_N: Tensor


class Harvester:
    """Turns token batches into groups of activations."""

    def __init__(
        self,
        model: Source,
        hooks: Sequence[str],
        config: RunConfig,
        sequences: int,
        cache: ActivationCache | None = None,
    ):
        self.cache = cache
        self.model, self.hooks, self.config = model, list(hooks), config
        self.sequences = sequences
        self._cuda = model.device.type == "cuda"
        self._compiled = compiles(config, model.device)
        self._side = side_stream("harvest", model.device) if self._cuda else None
        self._ahead: Iterator[None] = iter(())
        self._passes = 0
        self._owed = 0.0

    def groups(self, read: ReadGroup) -> Iterator[Group]:
        """The groups in their order; on a GPU one is always being harvested ahead."""
        return self._overlapped(read) if self._cuda else self._plain(read)

    def work_ahead(self, share: float) -> None:
        """Launch a share of the passes of the group that is being harvested ahead."""
        self._owed += share * self._passes
        while self._owed >= 1:
            self._owed -= 1
            next(self._ahead, None)

    def close(self) -> None:
        """Stop reading the cache ahead."""
        if self.cache is not None:
            self.cache.close()

    def _cached(self, group: GroupTokens) -> Iterator[dict[str, Tensor]] | None:
        """x_Nd per hook point of each micro-batch of a group, from the cache; None if it does not go so far."""
        cache, hooks = self.cache, list(self.hooks)
        if cache is None or not cache.covers(group.first_sample):
            return None
        return ({h: cache.read(h, p.first_sample, len(p.tokens_bT)) for h in hooks} for p in group.parts)

    def _fresh(self, tokens_nT: Tensor) -> Iterator[dict[str, Tensor]]:
        """x_Nd per hook point of each pass of the language model."""
        for chunk_bT in tokens_nT.split(self.sequences):
            # Named at every pass: hook points may have left meanwhile.
            found = self.model.activations(chunk_bT, list(self.hooks), self._compiled)
            yield {hook: x_bTd.flatten(0, 1) for hook, x_bTd in found.items()}

    # ---- the CPU
    def _plain(self, read: ReadGroup) -> Iterator[Group]:
        while (given := read()) is not None:
            tokens_nT = torch.cat([p.tokens_bT for p in given.parts])
            order_N = _order(tokens_nT.numel(), given.seed)
            keep_N = keep_tokens(tokens_nT, self.model.special_ids, self.config.data).flatten()
            pieces: dict[str, list[Tensor]] = {hook: [] for hook in self.hooks}
            for found in self._cached(given) or self._fresh(tokens_nT):
                for hook, x_Nd in found.items():
                    pieces[hook].append(x_Nd)
            x = {hook: p[0] if len(p) == 1 else torch.cat(p) for hook, p in pieces.items()}
            if order_N is not None:
                x, keep_N = {hook: x_Nd[order_N] for hook, x_Nd in x.items()}, keep_N[order_N]
            yield Group(given.parts, x, keep_N)

    # ---- a GPU
    def _overlapped(self, read: ReadGroup) -> Iterator[Group]:
        buffers = [_Buffer(self.model.device), _Buffer(self.model.device)]
        turn = 0
        more = self._begin(read, buffers[turn])
        while more:
            for _ in self._ahead:
                pass
            buffer = buffers[turn]
            main = torch.cuda.current_stream(self.model.device)
            main.wait_event(buffer.filled)
            turn = 1 - turn
            more = self._begin(read, buffers[turn])
            assert buffer.group is not None
            yield buffer.group
            buffer.consumed.record(torch.cuda.current_stream(self.model.device))

    def _begin(self, read: ReadGroup, buffer: _Buffer) -> bool:
        """Get ready to fill a buffer with the next group, if there is one."""
        given = read()
        if given is None:
            return False
        tokens_nT = torch.cat([p.tokens_bT for p in given.parts])
        cached = self._cached(given)
        self._passes = math.ceil(len(tokens_nT) / self.sequences) if cached is None else len(given.parts)
        self._owed = 0.0
        self._ahead = self._fill(given, tokens_nT, cached, buffer)
        return True

    def _fill(
        self, given: GroupTokens, tokens_nT: Tensor, cached: Iterator[dict[str, Tensor]] | None, buffer: _Buffer
    ) -> Iterator[None]:
        """One step per pass of the language model or cached micro-batch, all of them on the side stream."""
        device = self.model.device
        order_N = _order(tokens_nT.numel(), given.seed)
        keep_N = keep_tokens(tokens_nT, self.model.special_ids, self.config.data).flatten()
        keep_N = keep_N if order_N is None else keep_N[order_N]
        with self._on_side():
            pieces = self._fresh(_to(tokens_nT, device)) if cached is None else cached
            buffer.group = Group(given.parts, buffer.x, buffer.keep(len(keep_N)))
            rows_N = None if order_N is None else _to(torch.argsort(order_N), device)
        done = 0
        while done < tokens_nT.numel():
            with self._on_side():
                found = next(pieces)
                if done == 0:  # the buffer may be overwritten once it was consumed; the pass need not wait for that
                    torch.cuda.current_stream(device).wait_event(buffer.consumed)
                    buffer.group.keep_N.copy_(keep_N.pin_memory(), non_blocking=True)
                n = len(next(iter(found.values())))
                for hook, x_Nd in found.items():
                    buffer.put(hook, x_Nd, slice(done, done + n), rows_N, tokens_nT.numel())
                done += n
                if done == tokens_nT.numel():
                    buffer.filled.record(torch.cuda.current_stream(device))
            yield

    def _on_side(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self._side)


class _Buffer:
    """Memory for one group, and the events that say when it is full and when it may be filled again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.x: dict[str, Tensor] = {}
        self._keep_N: Tensor | None = None
        self.group: Group | None = None
        self.filled, self.consumed = torch.cuda.Event(), torch.cuda.Event()

    def keep(self, n: int) -> Tensor:
        """Memory for the mask. What was allocated on the side stream must not be given back under a slow consumer."""
        if self._keep_N is None:
            self._keep_N = torch.empty(n, dtype=torch.bool, device=self.device)
        return self._keep_N[:n]  # the last group may be shorter

    def put(self, hook: str, x_Nd: Tensor, rows: slice, rows_N: Tensor | None, n: int) -> None:
        """Copy the rows of one pass, or of the cache, to their places."""
        if hook not in self.x:
            self.x[hook] = torch.empty(n, x_Nd.shape[1], dtype=x_Nd.dtype, device=self.device)
        source_Nd = x_Nd if x_Nd.is_cuda else x_Nd.pin_memory()
        if rows_N is None:
            self.x[hook][rows].copy_(source_Nd, non_blocking=True)
        else:
            self.x[hook].index_copy_(0, rows_N[rows], source_Nd.to(self.device, non_blocking=True))


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True)


def _order(n: int, seed: int | None) -> Tensor | None:
    """The shuffled order of a group's tokens."""
    if seed is None:
        return None
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
