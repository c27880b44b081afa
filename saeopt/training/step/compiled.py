"""Elementwise stages through torch.compile, with a way back where it does not work."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from saeopt.console import log


class _Stage:
    """A function through torch.compile (static shapes); as it is where compiling fails, with one notice."""

    def __init__(self, function: Callable[..., Any]) -> None:
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 256)
        limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4096)
        self.plain, self.fast = function, torch.compile(function, dynamic=False)
        self.broken = False

    def __call__(self, *arguments: Any) -> Any:
        if not self.broken:
            try:
                return self.fast(*arguments)
            except torch._dynamo.exc.TorchDynamoException as error:
                self.broken = True
                log.debug("torch.compile of '%s'", self.plain.__name__, exc_info=error)
                log.warning("torch.compile is off for '%s': %s", self.plain.__name__, str(error).splitlines()[0])
        return self.plain(*arguments)


@cache
def _stage(function: Callable[..., Any]) -> _Stage:
    return _Stage(function)


def compiled(function: Callable[..., Any], enabled: bool) -> Callable[..., Any]:
    """`function` with its elementwise parts fused, or as it is."""
    return _stage(function) if enabled else function
