"""How tests run other libraries: each has an environment of its own (`scripts/interop_envs.sh`), absent on most hosts.

`INTEROP_DIR` names the folder that holds them; .ci/run makes that of sae-lens.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python_of(library: str) -> Path:
    """The interpreter of a library's environment; skips the test where there is none."""
    python = Path(os.environ.get("INTEROP_DIR") or ROOT / ".interop") / library / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{python} is missing: scripts/interop_envs.sh {library} makes it")
    return python


def run_worker(library: str, worker: Path, *args: object, **environment: str) -> str:
    """What a script prints that the library's interpreter runs, offline unless `environment` says otherwise."""
    python = python_of(library)
    quiet = {**os.environ, "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", **environment}
    quiet.pop("PYTHONPATH", None)
    command = [str(python), str(worker), *map(str, args)]
    done = subprocess.run(command, env=quiet, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
