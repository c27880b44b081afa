"""Trains the pack that a JSON file describes (plans by name, folder, resume, dtype), as a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from saeopt.config import validate_run
from saeopt.training import TrialPlan, train_pack
from saeopt.training.runtime import Runtime


def main(job: str) -> None:
    given = json.loads(Path(job).read_text())
    runtime = Runtime("cpu", weights_dtype=getattr(torch, given.get("dtype", "float32")))
    plans = [
        TrialPlan(name, validate_run(raw, name), Path(given["folder"]) / name, given.get("resume", False))
        for name, raw in given["plans"].items()
    ]
    train_pack(plans, runtime)


if __name__ == "__main__":
    main(sys.argv[1])
