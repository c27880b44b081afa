"""A stack: members of one architecture and shape at one site, stepped together.

It is put together from a storage, a pass, an optimiser, the books and, on a GPU, graphs and sums at fixed addresses.
All per-member numbers live on the device: nothing here synchronises but :meth:`Stack.metrics` and what reads a state.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from saeopt.saes.base import SAE, Reduction
from saeopt.training.step.books import Books, kept
from saeopt.training.step.contract import (
    TALLY,
    Example,
    Numbers,
    Optimiser,
    Parts,
    Pass,
    StackOptions,
    Store,
    check_names,
)
from saeopt.training.step.gpu.graphs import Graphs
from saeopt.training.step.numbers import Table
from saeopt.training.step.tally import Sums, to_reduce

NUMBERS = ("lr", "max_grad_norm")
"""What every architecture has."""


class Storage(Protocol):
    """Who owns the members' weights, moments and buffers."""

    @property
    def since_Mh(self) -> Tensor:
        """Tokens since each latent fired."""

    def state(self, member: int) -> Store:
        """What a member needs besides its module's tensors."""

    def loading(self, member: int) -> None:
        """A member's weights were written to, its state is about to be."""

    def loaded(self, member: int) -> None:
        """A member's state was written to."""

    def remove(self, member: int) -> None:
        """A member leaves with tensors of its own."""


class Watcher(Protocol):
    """Who learns of a window and may set numbers of the next one: the members' controls."""

    names: Sequence[str]
    """Numbers that it needs on the device besides the architecture's."""

    def observe(self, window: Mapping[str, Tensor], went_M: Tensor) -> None:
        """A window has ended; part of the graph."""

    def state(self, member: int) -> Store:
        """What it keeps of a member."""


@dataclass(frozen=True)
class Assembly:
    """A way to step: the storage of the members, and how the rest is made, again when a member has left.

    Args:
        graphs: whether windows are replayed as CUDA graphs.
        fixed_sums: whether windows of several micro-batches are added up by the stack, at fixed addresses; else the
            pass does so in place.
        targets: whether y may be something else than x.
    """

    name: str
    storage: Storage
    build: Callable[[Table, Books, Sequence[int]], tuple[Pass, Optimiser]]
    graphs: bool = False
    fixed_sums: bool = False
    targets: bool = False


class Stack:
    """One window: `accumulate` per micro-batch, reduce :meth:`partial` over ranks, `apply`.

    A window of one micro-batch on one rank: `step`. The modules in `saes` are the members from here on.
    """

    def __init__(
        self,
        saes: Sequence[SAE],
        seeds: Sequence[int],
        options: StackOptions,
        assembly: Assembly,
        watcher: Watcher | None = None,
    ) -> None:
        self.saes, self.seeds, self.options = list(saes), list(seeds), options
        self.assembly, self.storage, self.watcher = assembly, assembly.storage, watcher
        self.tallies = saes[0].tallies
        self.books, self.graphs = Books(saes, options), Graphs(assembly.graphs)
        self._put_together()

    def _put_together(self) -> None:
        """Everything that depends on the number of members and holds nothing over a window's end."""
        first = self.saes[0]
        more = self.watcher.names if self.watcher is not None else ()
        names = dict.fromkeys([*NUMBERS, *first.numbers, *more])
        self.table = Table(names, len(self.saes), first.W_enc.device)
        self.passes, self.optimiser = self.assembly.build(self.table, self.books, self.seeds)
        self.graphs.clear()
        self.micro_batches = 0
        self.sums = tuple(Sums(first.W_enc.dtype, self.tallies) for _ in Parts._fields)
        self.shape: Hashable = None
        self.parts: dict[Hashable, Parts] = {}
        """The window's sums, by what their shapes depend on."""

    # ---- a window
    @torch.no_grad()
    def step(self, example: Example, numbers: Sequence[Numbers]) -> None:
        """A whole window of one micro-batch on one rank."""
        key = self._before(example, numbers)

        def whole(*given: Tensor | None) -> None:
            self._finish(self.passes.gradients(_with(example, given), first=True))

        self.graphs(("step", *key), whole, *_inputs(example))
        self.micro_batches = 0

    @torch.no_grad()
    def accumulate(self, example: Example, numbers: Sequence[Numbers]) -> None:
        """Forward and backward of one micro-batch; adds to the window's sums."""
        key, first = self._before(example, numbers), self.micro_batches == 0

        def add_up(*given: Tensor | None) -> None:
            self._add_up(self.passes.gradients(_with(example, given), first=first), first)

        self.micro_batches += 1
        self.graphs(("accumulate", first, *key), add_up, *_inputs(example))

    @torch.no_grad()
    def apply(self, numbers: Sequence[Numbers]) -> None:
        """End of the window: divide by the token count, clip, Adam, constraints, dead counters, controls.

        A member whose loss, gradient or step is not finite is left as it was, now and in every later window.
        """
        self.table.set(numbers, self.table.first_sample)
        self.graphs(("apply", self.shape), lambda: self._finish(self.parts[self.shape]))
        self.micro_batches = 0

    def partial(self) -> dict[Reduction, list[Tensor]]:
        """The window's sums and extremes on this rank, to be reduced over the ranks in place."""
        return to_reduce(self.parts[self.shape], self.tallies)

    def _before(self, example: Example, numbers: Sequence[Numbers]) -> tuple[Hashable, ...]:
        """What happens outside of graphs; gives what a graph of this micro-batch depends on."""
        if example.y_Ne is not example.x_Nd and not self.assembly.targets:
            raise ValueError(f"the {self.assembly.name} step is for autoencoders: y must be x")
        first = self.micro_batches == 0
        shape = self.passes.before(example, first=first)
        self.shape = shape if first else self.shape
        self.table.set(numbers, example.place.first_sample if self.saes[0].needs_noise else 0)
        given = tuple(None if t is None else (tuple(t.shape), t.dtype) for t in _inputs(example))
        return (*given, example.place.n_samples, self.shape)

    def _add_up(self, parts: Parts, first: bool) -> None:
        if not self.assembly.fixed_sums:
            self.parts[self.shape] = parts
            return
        moved = [sums.make_room(part) for sums, part in zip(self.sums, parts, strict=True)]
        if any(moved):  # never while a graph is captured: its warm calls have made room
            self.graphs.clear()
            self.parts.clear()
        self.parts[self.shape] = Parts(*(s.put(part, first=first) for s, part in zip(self.sums, parts, strict=True)))

    def _finish(self, parts: Parts) -> None:
        aux_M = self.passes.settle(parts)
        went_M = self.optimiser.finish(parts, aux_M)
        n = kept(parts.window).clamp_min(1)
        tallies = {name: parts.window[TALLY + name] for name in self.tallies}
        if self.saes[0].learns_from_windows and not self.passes.after_window(tallies, went_M):
            for member, sae in enumerate(self.saes):
                own = {name: tensor[member] for name, tensor in tallies.items()}
                unless_broken(sae, went_M[member], own, n if n.dim() == 0 else n[member])
        if self.watcher is not None:
            loss_M, mse_M, sparsity_M, nonzero_M = (parts.window["totals"] / n.view(-1, 1)).unbind(-1)
            means = {"loss": loss_M + aux_M, "mse": mse_M, "sparsity": sparsity_M, "l0": nonzero_M}
            more = {name: self.table.column(name) for name in self.watcher.names}
            self.watcher.observe({"n": n.expand_as(aux_M), **means, **more, **tallies}, went_M)

    # ---- outside the step
    def metrics(self) -> list[dict[str, float]]:
        """Means per member since the last call (a synchronisation).

        Keys: loss, mse, sparsity, aux (where there is one), l0, fvu, fraction_dead, grad_norm,
        finite (1.0 or 0.0).
        """
        return self.books.metrics(self.storage.since_Mh)

    def state(self, member: int) -> Store:
        """What a member needs besides its module to go on exactly: moments, step count, flags, pending metrics."""
        return self._own_state(member) | self.passes.state(member)

    def _own_state(self, member: int) -> Store:
        own = self.storage.state(member) | self.books.state(member)
        return own | (self.watcher.state(member) if self.watcher is not None else {})

    def load_state(self, member: int, state: Store) -> None:
        """Inverse of :meth:`state`."""
        own = self._own_state(member)
        check_names(own, state)
        self.storage.loading(member)
        for name in own.keys() & state.keys():
            own[name].copy_(state[name])
        self.storage.loaded(member)
        self.passes.load_state(member, state)

    def remove(self, member: int) -> None:
        """Drop a member; the others go on as if it had never been there."""
        self.storage.remove(member)
        self.books.remove(member)
        del self.saes[member], self.seeds[member]
        if self.saes:
            self._put_together()


def _inputs(example: Example) -> tuple[Tensor | None, ...]:
    return example.x_Nd, None if example.y_Ne is example.x_Nd else example.y_Ne, example.keep_N


def _with(example: Example, given: tuple[Tensor | None, ...]) -> Example:
    """The example in other tensors: those that a graph reads."""
    x_Nd, y_Ne, keep_N = given
    assert x_Nd is not None
    return Example(x_Nd, x_Nd if y_Ne is None else y_Ne, keep_N, example.place)


def unless_broken(sae: SAE, went: Tensor, tallies: Store, n: Tensor) -> None:
    """`after_window`, whose effect is undone where the window was broken; buffers keep their memory."""
    buffers = dict(sae.named_buffers())
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    sae.after_window(tallies, n)
    for name, buffer in buffers.items():
        after = sae.get_buffer(name)
        buffer.copy_(torch.where(went, after, before[name]))
        if after is not buffer:
            owner, _, leaf = name.rpartition(".")
            setattr(sae.get_submodule(owner), leaf, buffer)
