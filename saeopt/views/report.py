"""What people see of a run: a table with a row per hook point, and where its files are."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from saeopt.console import console
from saeopt.errors import UserError
from saeopt.files import read_metrics, read_sections
from saeopt.metrics import METRICS, Shown, shown_in
from saeopt.runs.names import CONFIG, EVALUATION, METRICS_FILE, SEEDS
from saeopt.runs.weights import list_checkpoints
from saeopt.spread import N_SEEDS, text_of
from saeopt.views.plots import CURVES, DENSITY

Row = Mapping[str, Any]


def read_evaluation(run_dir: str | Path) -> dict[str, dict[str, Any]]:
    """Hook point → metrics, from `evaluation.json`."""
    path = Path(run_dir) / EVALUATION
    try:
        found: dict[str, dict[str, Any]] = read_sections(path)
        if not all(isinstance(row, dict) for row in found.values()):
            raise ValueError("no metrics")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; saeopt evaluate {run_dir} writes it") from None
    except ValueError:
        raise UserError(f"{path}: holds no evaluation as JSON; saeopt evaluate {run_dir} writes it") from None
    return found


def tokens_per_second(run_dir: str | Path) -> float | None:
    """Median of the logged training speeds: the first interval holds warm-up and must not count for more."""
    speeds = [r["tokens_per_s"] for r in read_metrics(Path(run_dir) / METRICS_FILE) if r.get("tokens_per_s")]
    return statistics.median(speeds) if speeds else None


def run_table(evaluation: Mapping[str, Row], speed: float | None = None, title: str | None = None) -> Table:
    """L0, FVU, CE recovered, dead share and training speed per hook point; of several seeds how far they agree too."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("hook point", overflow="fold")
    shown, of_run = shown_in(Shown.HEADLINE), METRICS["tokens_per_s"]
    if any(N_SEEDS in row for row in evaluation.values()):
        shown += [metric for metric in shown_in(Shown.COLUMN, seeds=True) if metric.seeds]
    for metric in [*shown, of_run]:
        table.add_column(metric.title, justify="right")
    for hook, row in evaluation.items():
        table.add_row(hook, *(text_of(metric, row) for metric in shown), of_run.text(speed))
    return table


def run_files(run_dir: str | Path) -> list[tuple[str, Path]]:
    """(what it is, path) of the files of a run that a person wants to find."""
    folder = Path(run_dir)
    wanted = [("config", folder / CONFIG), ("evaluation", folder / EVALUATION)]
    wanted += [("metrics", folder / METRICS_FILE), ("curves", folder / CURVES), ("densities", folder / DENSITY)]
    weights = [("weights", path) for _, path in list_checkpoints(folder)[:1]]
    return weights + [(name, path) for name, path in wanted if path.exists()]


def print_run(run_dir: str | Path, evaluation: Mapping[str, Row] | None = None) -> None:
    """The table of a run folder and where its files are."""
    rows = read_evaluation(run_dir) if evaluation is None else evaluation
    console.print(run_table(rows, tokens_per_second(run_dir)))
    for n in {row[N_SEEDS]: None for row in rows.values() if N_SEEDS in row}:
        console.print(
            f"means over {n} seeds ± standard deviation; weights of the others lie in {Path(run_dir) / SEEDS}"
        )
    for name, path in run_files(run_dir):
        console.print(f"{name:>10}  {path}", soft_wrap=True)
