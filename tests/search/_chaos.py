"""Processes of the chaos test. They are forked from a server that has imported everything once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from saeopt.config.study import StudySpec

PRELOAD = [
    "saeopt.worker", "saeopt.workers.on_device", "saeopt.workers.child", "saeopt.training.loop",
    "saeopt.training.launch", "saeopt.saes.relu",
    "saeopt.views.plots", "saeopt.evaluator", "saeopt.training.dry_run", "saeopt.workers.local",
    "psycopg", "transformers.models.llama.modeling_llama", "torch._dynamo",
]  # fmt: skip


def run_worker(address: str, study: str, log: Path) -> None:
    """A worker as `python -m saeopt.worker` runs it, but for its training process, which is forked: imports take longer
    than all training here."""
    _stderr_to(log)
    _no_pictures()
    import multiprocessing

    from saeopt.console import set_up_logging
    from saeopt.worker import stop_on_signals
    from saeopt.workers.loop import Options
    from saeopt.workers.on_device import work

    set_up_logging()
    work(
        address,
        study,
        Options(device="cpu", idle_timeout=0, poll=0.3),
        None,
        stop_on_signals(),
        multiprocessing.get_context("fork"),
    )


def run_worker_slow_at_rungs(address: str, study: str, log: Path) -> None:
    """The same, with long pauses between what a rung stores: who is killed there is killed in the middle of it."""
    import time
    from functools import wraps

    from saeopt.trials import endings
    from saeopt.trials.rungs import Rung

    judge, pause = Rung.judge, endings.pause

    @wraps(judge)
    def slow_judge(self: Rung, *args: Any) -> dict[int, str]:
        time.sleep(0.4)
        found = judge(self, *args)
        time.sleep(0.2)
        return found

    @wraps(pause)
    def slow_pause(*args: Any, **kwargs: Any) -> bool:
        time.sleep(0.2)
        return pause(*args, **kwargs)

    Rung.judge, endings.pause = slow_judge, slow_pause  # type: ignore[method-assign]
    run_worker(address, study, log)


def run_alone(spec_text: str, numbers: list[int], folder: Path, log: Path) -> None:
    """The undisturbed runs of some cells: one trial per pack."""
    _stderr_to(log)
    _no_pictures()
    from saeopt.training import TrialPlan, train_pack
    from saeopt.training.launch import make_runtime
    from saeopt.trials.create import planned_cells

    cells, _ = planned_cells(StudySpec.from_json(spec_text))
    runtime = make_runtime("cpu")
    for number in numbers:
        plan = TrialPlan(str(number), cells[number].config, folder / str(number))
        assert train_pack([plan], runtime)[plan.name].status == "finished"


def _no_pictures() -> None:
    """Drawing takes longer than training here, and no bit of a result depends on it."""
    from saeopt.views import monitoring, plots

    plots.plot_run = lambda folder: []
    monitoring.on_trial_end = monitoring.on_trial_paused = monitoring.on_study_progress = lambda *args, **kwargs: None


def _stderr_to(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
