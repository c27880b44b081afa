"""What a trial has said so far: how it stands, and the lines of its metrics, followed while it trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from saeopt.files import parse_json
from saeopt.metrics import in_order
from saeopt.trials.attributes import REASON, RUN_DIR, TRACEBACK, not_found
from saeopt.trials.internals import queries
from saeopt.trials.internals.queries import TrialRow
from saeopt.trials.storage import Store, persistently


def has_ended(store: Store, name: str, trial: str) -> bool:
    """Whether a trial neither waits nor runs; a store that does not answer is waited for."""
    now = persistently(lambda: find_trial(store, name, trial)[0], "logs")
    return now.state not in ("RUNNING", "WAITING")


def find_trial(store: Store, name: str, number: str) -> tuple[TrialRow, Path]:
    """A trial and its run folder. :class:`UserError` names the trials that there are."""
    study_id, spec = store.study_id(name), store.spec(name)
    rows = {str(row.number): row for row in queries.trial_rows(store.engine, study_id)}
    if number not in rows:
        raise not_found(f"trial in study '{name}':", number, rows)
    row = rows[number]
    return row, Path(row.attributes.get(RUN_DIR) or spec.run_dir(row.number))


def head(row: TrialRow, run_dir: Path) -> list[str]:
    """State, reason and traceback."""
    lines = [f"trial {row.number}: {row.state}, run folder {run_dir}"]
    if row.attributes.get(REASON):
        lines.append(f"reason: {row.attributes[REASON]}")
    if row.attributes.get(TRACEBACK):
        lines += str(row.attributes[TRACEBACK]).rstrip().splitlines()
    return lines


def metric_line(row: dict[str, Any]) -> str:
    """One line of `metrics.jsonl` for people."""
    names = in_order(n for n in row if n not in ("samples", "hook_point"))
    values = [f"{n}={row[n]:.5g}" for n in names if isinstance(row[n], int | float)]
    return f"{row['samples']:>10,}  {row.get('hook_point', '')}  {'  '.join(values)}"


def log_lines(run_dir: Path, last: int = 200) -> list[str]:
    """The end of the log of the worker while it trained this trial."""
    path = run_dir / "trial.log"
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-last:] if path.exists() else []


def lines(path: Path, ended: Callable[[], bool] | None = None, poll_s: float = 1.0) -> Iterator[str]:
    """The lines of `metrics.jsonl`; with `ended`, wait for more until it is true. A resumed run's rewind is noticed."""
    shown: set[tuple[Any, ...]] = set()
    while True:
        last_round = ended is None or ended()
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
            try:
                row = parse_json(text)
                key = (row["samples"], row.get("hook_point"), "loss" in row)
            except (ValueError, KeyError, TypeError):
                continue
            if key not in shown:
                shown.add(key)
                yield metric_line(row)
        if last_round:
            return
        time.sleep(poll_s)
