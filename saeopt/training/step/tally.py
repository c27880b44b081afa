"""A window's sums at fixed addresses, for windows of several micro-batches or ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from saeopt.training.step.storage import Store


class Sums:
    """Named sums in the dtype of the weights (float64 stays), which graphs may write to and read.

    A tensor's shape may change from window to window (the places for dead latents): it lies at the beginning of
    memory that only ever grows.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
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
                view.add_(parts[name])
        return views
