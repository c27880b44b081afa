"""Environments of other libraries (scripts/interop_envs.sh), and what their interpreters are asked to do."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run_peer(library: str, what: str, folder: Path) -> dict[str, Any]:
    """What `worker.py` finds; skips where the library's environment is absent."""
    python = Path(os.environ.get("INTEROP_DIR") or ROOT / ".interop") / library / "bin/python"
    if not python.exists():
        pytest.skip(f"{library} is not there (scripts/interop_envs.sh {library} installs it)")
    folder.mkdir(parents=True, exist_ok=True)
    worker = Path(__file__).parent / "worker.py"
    done = subprocess.run(
        [python, worker, library, what, folder], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = torch.load(folder / "found.pt", weights_only=True)
    return found


def close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """Equal to 1e-5 of the largest."""
    size = float(theirs.abs().max())
    assert size > 0, f"{what}: nothing to compare"
    torch.testing.assert_close(ours.to(theirs), theirs, rtol=0, atol=1e-5 * size, msg=lambda m: f"{what}: {m}")
