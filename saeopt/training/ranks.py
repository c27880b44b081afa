"""The processes that train together, by what is divided among them. Nobody else sees a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from saeopt.saes.base import Reduction

_LARGE = 2**20
"""Numbers from which a message of its own costs less than copying them into one with others."""
_REDUCTIONS = {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}


@dataclass(frozen=True)
class Axis:
    """Processes among which one thing is divided: this one is number `rank` of `size`. None in `group`: all of them."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def reduce(self, tensors: Sequence[Tensor], how: Reduction = "sum") -> None:
        """Reduce tensors in place: large ones as they lie, the others in one message per dtype."""
        if self.size == 1:
            return
        by = _REDUCTIONS[how]
        for tensor in tensors:
            if tensor.numel() >= _LARGE and tensor.is_contiguous():
                dist.all_reduce(tensor, by, self.group)
        rest = [t for t in tensors if t.numel() < _LARGE or not t.is_contiguous()]
        for dtype in sorted({t.dtype for t in rest}, key=str):
            same = [t for t in rest if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in same])
            dist.all_reduce(flat, by, self.group)
            for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Give every process the first one's values."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, group=self.group, group_src=0)

    def agree(self, value: Any) -> Any:
        """The first one's value on every process, so that all of them take the same decision."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]


@dataclass(frozen=True)
class Ranks:
    """`data`: each process holds all SAEs and takes its own samples. `shard`: each holds a piece of every dictionary.

    Only `data` divides anything so far.
    """

    data: Axis = field(default_factory=Axis)
    shard: Axis = field(default_factory=Axis)

    @property
    def is_first(self) -> bool:
        """True on the one process that writes files and talks to services."""
        return self.data.rank == self.shard.rank == 0

    def agree(self, value: Any) -> Any:
        """The first process's value on all."""
        return self.data.agree(self.shard.agree(value))
