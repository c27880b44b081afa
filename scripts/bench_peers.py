"""The peers' side of `bench_step.py`: their own training loops on the same batches, each in its own environment."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saeopt.console import log
from saeopt.errors import UserError

SPEED = Path(__file__).with_name("peers") / "speed.py"
LIBRARIES = ("sae-lens", "dictionary-learning")
KINDS = ("relu", "gated", "topk", "batch_topk", "matryoshka_batch_topk", "jumprelu")
"""What both libraries have."""


def check(libraries: list[str], env: str) -> None:
    """Refuse names that nobody knows and environments that are not there before anything is timed."""
    for library in libraries:
        if library not in LIBRARIES:
            raise UserError(f"--peers {library}: must be of {', '.join(LIBRARIES)}")
        if not Path(env.format(library)).exists():
            raise UserError(f"--env {env.format(library)}: not there (scripts/interop_envs.sh makes the environments)")


def time_peers(libraries: list[str], env: str, job: dict[str, Any], batches: list[Tensor]) -> dict[str, float]:
    """Milliseconds of a step by library and setting; a library that fails is told and left out."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_file({"x": torch.cat(batches).cpu()}, path)
        for library in libraries:
            command = [env.format(library), str(SPEED), library, str(path), str(batches[0].device)]
            done = subprocess.run(command, input=json.dumps(job) + "\n", capture_output=True, text=True, check=False)
            lines = done.stdout.splitlines()
            answer = json.loads(lines[-1]) if lines else {"error": (done.stderr.splitlines() or ["no answer"])[-1]}
            if "error" in answer:
                log.warning("%s, %s: %s", library, job["sae_type"], answer["error"])
            else:
                found |= {f"{library}, {setting}": float(ms) for setting, ms in answer.items()}
    return found
