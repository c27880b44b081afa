"""Trains the pack that a JSON file describes (plans by name, folder, resume, dtype, rungs), as a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from saeopt.config import validate_run
from saeopt.training import Observer, TrialPlan, train_pack
from saeopt.training.plan import Rungs
from saeopt.training.runtime import Runtime


class Pausing(Observer):
    """Pauses at the rungs of a job whom each rank is told to."""

    def __init__(self, told: dict, rank: int) -> None:
        self.told = Rungs(tuple(told["samples"]), told["held_out"])
        self.behind = told["behind"][rank]

    def rungs(self, total: int, window: int) -> Rungs:
        return self.told

    def on_rung(self, samples: int, metrics: object) -> dict[str, str]:
        return dict.fromkeys(self.behind, "behind")


def main(job: str) -> None:
    given = json.loads(Path(job).read_text())
    runtime = Runtime("cpu", weights_dtype=getattr(torch, given.get("dtype", "float32")))
    plans = [
        TrialPlan(name, validate_run(raw, name), Path(given["folder"]) / name, given.get("resume", False))
        for name, raw in given["plans"].items()
    ]
    rungs, rank = given.get("rungs"), runtime.ranks.data.rank
    results = train_pack(plans, runtime, Pausing(rungs, rank) if rungs else None)
    if rungs:
        told = {name: (result.status, result.samples) for name, result in results.items()}
        (Path(given["folder"]) / f"results_{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
