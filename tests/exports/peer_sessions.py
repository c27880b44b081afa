"""What the other libraries do in `peers_worker.py`, and how near theirs and ours must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from interop import run_worker


def run_peer(library: str, what: str, folder: Path) -> dict[str, Any]:
    """What the worker finds (`save` or `load`); skips where the library's environment is absent."""
    folder.mkdir(parents=True, exist_ok=True)
    run_worker(library, Path(__file__).parent / "peers_worker.py", library, what, folder)
    found: dict[str, Any] = torch.load(folder / "found.pt", weights_only=True)
    return found


def close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """Equal to 1e-5 of the largest."""
    size = float(theirs.abs().max())
    assert size > 0, f"{what}: nothing to compare"
    torch.testing.assert_close(ours.to(theirs), theirs, rtol=0, atol=1e-5 * size, msg=lambda m: f"{what}: {m}")
