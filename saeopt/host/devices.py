"""Devices by name, and CUDA streams beside the main one."""

from __future__ import annotations

from functools import cache

import torch

from saeopt.errors import UserError


@cache
def side_stream(purpose: str, device: torch.device) -> torch.cuda.Stream:
    """The process's stream for one purpose.

    torch hands out 32 streams in turn: with new ones each time two purposes would come to share one, and with it the
    workspace of the matrix products, which graphs replay on another stream.
    """
    return torch.cuda.Stream(device)


def choose_device(name: str) -> torch.device:
    """The device that a name means; auto is the first GPU where there is one."""
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise UserError(f"--device {name}: unknown device (auto, cpu, cuda, cuda:1, …)") from None
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: must be auto, cpu or cuda (cuda:1, …)")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return found
