"""CUDA streams beside the main one."""

from __future__ import annotations

from functools import cache

import torch


@cache
def side_stream(purpose: str, device: torch.device) -> torch.cuda.Stream:
    """The process's stream for one purpose.

    torch hands out 32 streams in turn: with new ones each time two purposes would come to share one, and with it the
    workspace of the matrix products, which graphs replay on another stream.
    """
    return torch.cuda.Stream(device)
