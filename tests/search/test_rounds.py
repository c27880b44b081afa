"""How many trials of a sampler that learns from results are trained together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from _stores import grid_spec

from saeopt.config.study import StudySpec
from saeopt.search.rounds import n_proposed, proposals_text, round_size
from saeopt.trials import claims, presence
from saeopt.trials.create import create_study
from saeopt.trials.packing import room
from saeopt.trials.presence import Presence
from saeopt.trials.storage import Store


def spec(sampler: str = "tpe", max_trials: int = 110, startup: int = 10, **fields: Any) -> StudySpec:
    space = {"lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    chosen = {"type": sampler, "n_startup_trials": startup}
    return grid_spec(space=space, sampler=chosen, max_trials=max_trials, **fields)


def test_only_samplers_that_learn_from_results_have_rounds() -> None:
    for sampler in ("tpe", "gp", "nsga2"):
        assert n_proposed(spec(sampler)) == 100
        assert [round_size(spec(sampler), workers) for workers in (1, 2, 4, 100)] == [10, 5, 2, 1]
    for sampler in ("random", "qmc"):
        assert n_proposed(spec(sampler)) == 0
        assert proposals_text(spec(sampler)) is None
    assert n_proposed(grid_spec(12)) == 0
    assert proposals_text(spec(max_trials=5)) is None


def test_what_create_says_about_proposals() -> None:
    first, rounds = "tpe proposes 14 of 24 trials in ", " rounds of up to "
    assert proposals_text(spec(max_trials=24)) == (
        f"{first}14{rounds}1 (one worker): 14 will have seen a result, 13 the result of another proposal"
    )
    assert proposals_text(spec(max_trials=24, pack=24)) == (
        f"{first}1 round of up to 14 (one worker): 14 will have seen a result, 0 the result of another proposal"
    )
    assert "24 of 24 trials in 3 rounds of up to 8 (one worker): 16 will have seen a result, 16" in str(
        proposals_text(spec(max_trials=24, pack=8, startup=0))
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_several_workers_leave_ten_rounds_together(tmp_path: Path, workers: int) -> None:
    store = Store.open(f"sqlite:///{tmp_path}/store.db")
    study_id = create_study(store, spec(max_trials=50)).study_id
    for i in range(workers):
        presence.beat(store, study_id, Presence(f"w{i}", "host", "cpu", i, 0.0))
    assert room(store, study_id, spec(max_trials=50), 64, auto=True) == 10 // workers  # those of the design
    assert room(store, study_id, spec(max_trials=50), 3, auto=True) == 3
    claims.claim(store, study_id, 10, {"worker": "w0"})
    assert room(store, study_id, spec(max_trials=50), 64, auto=True) == 4 // workers
    assert room(store, study_id, spec(max_trials=50), 64, auto=False) == 64
    store.close()
