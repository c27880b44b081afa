"""CUDA graphs of functions whose tensors stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from saeopt.console import log

APPLY = "apply"
"""Keys (APPLY, key) belong to functions that read the outputs of the graph with that key."""
_WARM_CALLS = 2
_MOST = 6
"""Graphs of one owner: each keeps its outputs, and a key may depend on a number that drifts."""
_retired: list[torch.cuda.CUDAGraph] = []
"""Graphs that are not replayed any more. Some versions of torch free a graph's workspaces with it although other
graphs, captured on the same stream, still use them (pytorch#193402): they go when nothing is captured."""


@cache
def _pool(device: torch.device) -> tuple[Any, torch.cuda.CUDAGraph]:
    """One memory pool for all graphs: they are replayed one after another, so that intermediates share space.

    A pool dies with its last graph, hence the small one that is kept.
    """
    handle, keeper = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(keeper, pool=handle, capture_error_mode="thread_local"):
        torch.zeros(1, device=device)
    return handle, keeper


class Graphs:
    """Replays `function(*inputs)` once it has been called a few times under the same key.

    What the function reads besides its inputs must keep its address (call :meth:`clear` when it moves). Its
    outputs are overwritten by the next replay under the same key. A function that cannot be captured runs as it
    is from then on, and says so once.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        if not any(owner.captured for owner in _owners):
            _retired.clear()
        _owners.add(self)
        self.calls: dict[Hashable, int] = {}
        self.captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Tensor | None], Any]] = {}

    def clear(self) -> None:
        """Forget every graph."""
        self.calls.clear()
        while self.captured:
            self._forget(next(iter(self.captured)))

    def __del__(self) -> None:
        if self.captured:
            self.clear()

    def _forget(self, key: Hashable) -> None:
        """A graph goes, and with it the one that reads its outputs."""
        for gone in (key, (APPLY, key)):
            if gone in self.captured:
                _retired.append(self.captured.pop(gone)[0])

    def __call__(self, key: Hashable, function: Callable[..., Any], *inputs: Tensor | None) -> Any:
        """The function's outputs; see :meth:`is_captured` for how long they live."""
        if not self.enabled:
            return function(*inputs)
        if key not in self.captured:
            self.calls[key] = self.calls.get(key, 0) + 1
            if self.calls[key] <= _WARM_CALLS or not self._capture(key, function, inputs):
                return function(*inputs)
        graph, own, outputs = self.captured[key]
        for mine, given in zip(own, inputs, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given, non_blocking=True)
        graph.replay()
        return outputs

    def is_captured(self, key: Hashable) -> bool:
        """Whether outputs under this key lie at fixed addresses."""
        return key in self.captured

    def _capture(self, key: Hashable, function: Callable[..., Any], inputs: tuple[Tensor | None, ...]) -> bool:
        own = [None if tensor is None else tensor.clone() for tensor in inputs]
        device = torch.device("cuda", torch.cuda.current_device())
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: the activation stream may allocate in its own thread meanwhile
            with torch.cuda.graph(graph, pool=_pool(device)[0], capture_error_mode="thread_local"):
                outputs = function(*own)
        except RuntimeError as error:
            self.enabled = False
            log.warning("CUDA graphs are off: %s", str(error).splitlines()[0])
            torch.cuda.synchronize()
            return False
        self.captured[key] = (graph, own, outputs)
        if len(self.captured) > _MOST:
            self._forget(next(k for k in self.captured if k != key and (APPLY, k) != key))
        return True


_owners: WeakSet[Graphs] = WeakSet()
