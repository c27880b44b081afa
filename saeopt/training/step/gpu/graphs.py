"""CUDA graphs of functions that leave nothing behind but what they write to memory of their owner.

All graphs of a process share one memory pool. A graph that is captured later may be given any memory that no tensor
holds at that moment: that of an earlier graph's intermediates, which the earlier one writes to at every replay. A
tensor that a graph makes and that is read after its replay would be overwritten by whichever stack is replayed in
between. So no tensor of a graph outlives its replay: the functions return nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from saeopt.console import log

_WARM_CALLS = 2
_MOST = 6
"""Graphs of one owner: a key may depend on a number that drifts."""
_retired: list[torch.cuda.CUDAGraph] = []
"""Graphs that are not replayed any more. Some versions of torch free a graph's workspaces with it although other
graphs, captured on the same stream, still use them (pytorch#193402): they go when nothing is captured."""


@cache
def _pool(device: torch.device) -> tuple[Any, torch.cuda.CUDAGraph]:
    """One memory pool for all graphs: they are replayed one after another, and their intermediates share space.

    A pool dies with its last graph, hence the small one that is kept.
    """
    handle, keeper = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(keeper, pool=handle, capture_error_mode="thread_local"):
        torch.zeros(1, device=device)
    return handle, keeper


class Graphs:
    """Replays `function(*inputs)` once it has been called a few times under the same key.

    The function returns nothing. What it reads and writes besides its inputs must keep its address (call
    :meth:`clear` when it moves) and must not be memory that another graph made. A function that cannot be captured
    runs as it is from then on, and says so once.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        if not any(owner.captured for owner in _owners):
            _retired.clear()
        _owners.add(self)
        self.calls: dict[Hashable, int] = {}
        self.captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor | None]]] = {}

    def clear(self) -> None:
        """Forget every graph."""
        self.calls.clear()
        _retired.extend(graph for graph, _ in self.captured.values())
        self.captured.clear()

    def __del__(self, retired: list[torch.cuda.CUDAGraph] = _retired) -> None:  # the module may be gone by then
        retired.extend(graph for graph, _ in self.captured.values())

    def __call__(self, key: Hashable, function: Callable[..., None], *inputs: Tensor | None) -> None:
        """Run the function, or replay what it did under this key."""
        if not self.enabled:
            return function(*inputs)
        if key not in self.captured:
            self.calls[key] = self.calls.get(key, 0) + 1
            if self.calls[key] <= _WARM_CALLS or not self._capture(key, function, inputs):
                return function(*inputs)
        graph, own = self.captured[key]
        for mine, given in zip(own, inputs, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given, non_blocking=True)
        graph.replay()

    def _capture(self, key: Hashable, function: Callable[..., None], inputs: tuple[Tensor | None, ...]) -> bool:
        own = [None if tensor is None else tensor.clone() for tensor in inputs]
        device = torch.device("cuda", torch.cuda.current_device())
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the activation stream may allocate in its own thread meanwhile
            with torch.cuda.graph(graph, pool=_pool(device)[0], capture_error_mode="thread_local"):
                function(*own)
        except RuntimeError as error:
            self.enabled = False
            log.warning("CUDA graphs are off: %s", str(error).splitlines()[0])
            torch.cuda.synchronize()
            return False
        self.captured[key] = (graph, own)
        if len(self.captured) > _MOST:
            _retired.append(self.captured.pop(next(iter(self.captured)))[0])
        return True


_owners: WeakSet[Graphs] = WeakSet()
