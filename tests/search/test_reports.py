"""The collapse rule counts the same whoever trains: what was reported before a trial changed hands counts too."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from _stores import grid_spec

from saeopt.files import jsonable
from saeopt.search.pruning import Patience
from saeopt.trials.reports import Progress, Reports

HOOKS = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]
TOTAL, WINDOW, PATIENCE = 96, 4, 4


def reports_in(folder: Path, **fields: Any) -> Reports:
    collapse = {"min_l0": 60, "patience": PATIENCE}
    spec = grid_spec(1, output_dir=str(folder), early_stopping={"warmup": 0.3, "collapse": collapse}, **fields)
    return Reports(SimpleNamespace(), 1, spec)  # type: ignore[arg-type]  # its thread is not started


def train(reports: Reports, give_back: set[int], evaluate: set[int]) -> int:
    """The samples at which a trial is stopped whose L0 falls below the bound at 32, with one healthy report at 40."""
    metrics_file = reports.spec.run_dir(0) / "metrics.jsonl"
    metrics_file.parent.mkdir(parents=True, exist_ok=True)
    metrics_file.write_text("")
    config = reports.spec.run_config({})

    def start(samples: int) -> Progress:
        claim: Any = SimpleNamespace(number=0)
        progress = Progress(claim, config)
        reports.started(progress, samples, TOTAL)
        return progress

    progress = start(0)
    for samples in range(WINDOW, TOTAL + 1, WINDOW):
        for evaluated in [False, True] if samples in evaluate else [False]:
            l0 = 90.0 if samples < 32 or samples == 40 else 10.0
            fvu = 0.5 if l0 > 60 else float("nan")
            rows = {hook: {"l0": l0, "fvu": fvu} for hook in HOOKS}
            with metrics_file.open("a") as file:
                for hook, row in rows.items():
                    stored = {f"eval_{k}" if evaluated else k: v for k, v in row.items()}
                    file.write(json.dumps(jsonable({"samples": samples, "hook_point": hook, **stored})) + "\n")
            if reports.measured(progress, samples, rows, evaluated=evaluated):
                return samples
        if samples in give_back:
            with metrics_file.open("a") as file:
                file.write('{"samples": 9999, "hook_point": "h", "l0": 1}\n')  # of a zombie, beyond the checkpoint
            progress = start(samples)
    return TOTAL


@pytest.mark.parametrize("evaluate", [set(), {44, 52}, set(range(0, TOTAL, 8))])
def test_a_trial_that_changes_hands_is_stopped_where_it_would_have_been(tmp_path: Path, evaluate: set[int]) -> None:
    reports = reports_in(tmp_path)
    undisturbed = train(reports, set(), evaluate)
    assert undisturbed == 44 + (PATIENCE - 1) * WINDOW
    for give_back in ({44}, {48}, {52}, set(range(WINDOW, TOTAL, WINDOW)), set(range(2 * WINDOW, TOTAL, 2 * WINDOW))):
        assert train(reports, give_back, evaluate) == undisturbed


def test_a_log_step_and_an_evaluation_at_the_same_samples_are_one_report() -> None:
    patience = Patience()
    assert [patience.report(s, c) for s, c in [(4, True), (4, True), (8, True), (8, True)]] == [1, 1, 2, 2]
    assert patience.report(12, True) == 3
    assert patience.report(12, False) == 0
    assert [patience.report(s, c) for s, c in [(16, False), (16, True), (20, True)]] == [0, 0, 1]


def test_reports_to_the_store_fall_on_the_same_samples_after_a_trial_has_changed_hands(tmp_path: Path) -> None:
    def due(give_back: set[int]) -> list[int]:
        reports = reports_in(tmp_path)
        sent: list[int] = []
        reports._send = lambda progress, samples, shown, values: sent.append(samples)  # type: ignore[method-assign]
        reports._read_curve = lambda progress: None  # type: ignore[method-assign]
        reports._name_curve = lambda measured: None  # type: ignore[method-assign]
        train(reports, give_back, set())
        while not reports._queue.empty():
            action = reports._queue.get()
            assert action is not None
            action()
        return sent

    assert due({8, 9, 20, 36}) == due(set())
