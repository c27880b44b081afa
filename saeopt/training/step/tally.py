"""A window's sums, for windows of several micro-batches or ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from saeopt.saes.base import Reduction
from saeopt.training.step.contract import TALLY, Parts, Store


def how(name: str, tallies: Mapping[str, Reduction]) -> Reduction:
    """How a window's statistic joins that of another micro-batch or rank."""
    return tallies[name.removeprefix(TALLY)] if name.startswith(TALLY) else "sum"


def join(into: Tensor, other: Tensor, by: Reduction) -> None:
    """In place."""
    if by == "sum":
        into.add_(other)
    else:
        (torch.minimum if by == "min" else torch.maximum)(into, other.to(into.dtype), out=into)


def to_reduce(parts: Parts, tallies: Mapping[str, Reduction]) -> dict[Reduction, list[Tensor]]:
    """What ranks put together in place, and how. Indices are the same on all of them."""
    found: dict[Reduction, list[Tensor]] = {"sum": [t for t in parts.grads.values() if t.is_floating_point()]}
    for name, tensor in parts.window.items():
        found.setdefault(how(name, tallies), []).append(tensor)
    return found


class Sums:
    """Named sums at fixed addresses, in the dtype of the weights (float64 stays), which graphs may write to and read.

    A tensor's shape may change from window to window (the places for dead latents): it lies at the beginning of
    memory that only ever grows.
    """

    def __init__(self, dtype: torch.dtype, tallies: Mapping[str, Reduction]) -> None:
        self.dtype, self.tallies = dtype, tallies
        self.memory: dict[str, Tensor] = {}

    def make_room(self, parts: Store) -> bool:
        """Have memory for all parts; True if some has moved."""
        small = [n for n, part in parts.items() if n not in self.memory or self.memory[n].numel() < part.numel()]
        for name in small:
            part = parts[name]
            size = part.numel() if name not in self.memory else 2 * part.numel()
            self.memory[name] = torch.empty(size, dtype=self._dtype(part), device=part.device)
        return bool(small)

    def _dtype(self, part: Tensor) -> torch.dtype:
        return torch.promote_types(part.dtype, self.dtype) if part.is_floating_point() else part.dtype

    def views(self, parts: Store) -> Store:
        """The sums, shaped as the parts."""
        return {name: self.memory[name][: part.numel()].view(part.shape) for name, part in parts.items()}

    def put(self, parts: Store, *, first: bool) -> Store:
        """Start the sums with these parts, or add them; what is not a sum (indices) is taken from the first."""
        views = self.views(parts)
        for name, view in views.items():
            if first:
                view.copy_(parts[name])
            elif parts[name].is_floating_point():
                join(view, parts[name], how(name, self.tallies))
        return views
