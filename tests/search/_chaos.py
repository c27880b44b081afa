"""Processes of the chaos test. They are forked from a server that has imported everything once."""

from __future__ import annotations

import os
from pathlib import Path

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
    monitoring.on_trial_end = monitoring.on_study_progress = lambda *args, **kwargs: None


def _stderr_to(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
