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

from saeopt.activations.masks import keep_tokens

if TYPE_CHECKING:
    from saeopt.activations.language_model import LanguageModel
    from saeopt.activations.tokens import TokenBatch
    from saeopt.config.run import RunConfig

ReadGroup = Callable[[], "tuple[list[TokenBatch], int | None]"]


@dataclass
class Group:
    """The activations of a group: x_Nd per hook point, and which tokens count, on the device and on the host."""

    parts: list[TokenBatch]
    x: dict[str, Tensor]
    keep_N: Tensor
    host_keep_N: Tensor


class Harvester:
    """Turns token batches into groups of activations."""

    def __init__(self, model: LanguageModel, hooks: Sequence[str], config: RunConfig, sequences: int):
        self.model, self.hooks, self.config = model, list(hooks), config
        self.sequences = sequences
        self._compiled = config.performance.compile != "off"
        self._cuda = model.device.type == "cuda"
        self._side = torch.cuda.Stream(model.device) if self._cuda else None
        self._ahead: Iterator[None] = iter(())
        self._passes = 0
        self._owed = 0.0

    def groups(self, read: ReadGroup) -> Iterator[Group]:
        """Groups without end; on a GPU one is always being harvested ahead."""
        return self._overlapped(read) if self._cuda else self._plain(read)

    def work_ahead(self, share: float) -> None:
        """Launch a share of the passes of the group that is being harvested ahead."""
        self._owed += share * self._passes
        while self._owed >= 1:
            self._owed -= 1
            next(self._ahead, None)

    # ---- the CPU
    def _plain(self, read: ReadGroup) -> Iterator[Group]:
        while True:
            parts, seed = read()
            tokens_nT = torch.cat([p.tokens_bT for p in parts])
            order_N = _order(tokens_nT.numel(), seed)
            keep_N = keep_tokens(tokens_nT, self.model.special_ids, self.config.data).flatten()
            pieces: dict[str, list[Tensor]] = {hook: [] for hook in self.hooks}
            for chunk_bT in tokens_nT.split(self.sequences):
                for hook, x_bTd in self.model.activations(chunk_bT, self.hooks).items():
                    pieces[hook].append(x_bTd.flatten(0, 1))
            x = {hook: p[0] if len(p) == 1 else torch.cat(p) for hook, p in pieces.items()}
            if order_N is not None:
                x, keep_N = {hook: x_Nd[order_N] for hook, x_Nd in x.items()}, keep_N[order_N]
            yield Group(parts, x, keep_N, keep_N)

    # ---- a GPU
    def _overlapped(self, read: ReadGroup) -> Iterator[Group]:
        buffers = [_Buffer(), _Buffer()]
        turn = 0
        self._begin(read, buffers[turn])
        while True:
            for _ in self._ahead:
                pass
            buffer = buffers[turn]
            main = torch.cuda.current_stream(self.model.device)
            main.wait_event(buffer.filled)
            turn = 1 - turn
            self._begin(read, buffers[turn])
            assert buffer.group is not None
            yield buffer.group
            buffer.consumed.record(torch.cuda.current_stream(self.model.device))

    def _begin(self, read: ReadGroup, buffer: _Buffer) -> None:
        parts, seed = read()
        tokens_nT = torch.cat([p.tokens_bT for p in parts])
        self._passes, self._owed = math.ceil(len(tokens_nT) / self.sequences), 0.0
        self._ahead = self._fill(parts, tokens_nT, seed, buffer)

    def _fill(self, parts: list[TokenBatch], tokens_nT: Tensor, seed: int | None, buffer: _Buffer) -> Iterator[None]:
        """One step per pass of the language model; all of them are launched on the side stream."""
        device, T = self.model.device, tokens_nT.shape[1]
        order_N = _order(tokens_nT.numel(), seed)
        keep_N = keep_tokens(tokens_nT, self.model.special_ids, self.config.data).flatten()
        host_keep_N = keep_N if order_N is None else keep_N[order_N]
        with self._on_side():
            here_nT = tokens_nT.pin_memory().to(device, non_blocking=True)
            buffer.group = Group(parts, buffer.x, host_keep_N.pin_memory().to(device, non_blocking=True), host_keep_N)
            rows_N = None
            if order_N is not None:
                rows_N = torch.argsort(order_N).pin_memory().to(device, non_blocking=True)
        done = 0
        for chunk_bT in here_nT.split(self.sequences):
            with self._on_side():
                found = self.model.activations(chunk_bT, self.hooks, compiled=self._compiled)
                if done == 0:
                    # Only now may the buffer be overwritten; the pass itself did not need to wait.
                    torch.cuda.current_stream(device).wait_event(buffer.consumed)
                rows = slice(done * T, (done + len(chunk_bT)) * T)
                for hook, x_bTd in found.items():
                    buffer.put(hook, x_bTd.flatten(0, 1), rows, rows_N, tokens_nT.numel())
                done += len(chunk_bT)
                if done == len(here_nT):
                    buffer.filled.record(torch.cuda.current_stream(device))
            yield

    def _on_side(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.stream(self._side)


class _Buffer:
    """Memory for one group, and the events that say when it is full and when it may be filled again."""

    def __init__(self) -> None:
        self.x: dict[str, Tensor] = {}
        self.group: Group | None = None
        self.filled, self.consumed = torch.cuda.Event(), torch.cuda.Event()

    def put(self, hook: str, x_Nd: Tensor, rows: slice, rows_N: Tensor | None, n: int) -> None:
        """Copy the rows of one pass to their places."""
        if hook not in self.x:
            self.x[hook] = torch.empty(n, x_Nd.shape[1], dtype=x_Nd.dtype, device=x_Nd.device)
        if rows_N is None:
            self.x[hook][rows].copy_(x_Nd)
        else:
            self.x[hook].index_copy_(0, rows_N[rows], x_Nd)


def _order(n: int, seed: int | None) -> Tensor | None:
    """The shuffled order of a group's tokens."""
    if seed is None:
        return None
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
