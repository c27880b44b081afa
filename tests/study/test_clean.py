"""What `study clean` removes, what it never touches, and what run folders are said to hold."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from saeopt.config.io import validate_run
from saeopt.runs.folder import RunFolder, bytes_of
from saeopt.trials import budget, claims, endings
from saeopt.trials import internals as db
from saeopt.trials.storage import Store
from saeopt.trials.waiting import CHECKPOINT
from saeopt.views.disk import run_folder_bytes
from saeopt.views.spending import gigabytes

Cli = Callable[..., Any]
WEIGHTS, STATE = 40, 80


def fill(run: RunFolder, *samples: int) -> None:
    for one in samples:
        for path, size in ((run.weights_path(one), WEIGHTS), (run.state_path(one), STATE)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x" * size)
    (run.path / "evaluation.json").write_text("{}")


@pytest.fixture
def study(cli: Cli, study_file: Path, store_url: str, finish: Callable[..., None]) -> Store:
    """Trial 0 on the front, 1 beaten, 2 failed, 3 running, 4 given back with a checkpoint, 5 waiting."""
    cli("create", study_file)
    finish("six", (8.0, 0.2))
    finish("six", (16.0, 0.5))
    store = Store.open(store_url)
    spec, study_id = store.spec("six"), store.study_id("six")
    failed, _, given_back = claims.claim(store, study_id, 3, {})
    endings.fail(store, failed, "broken")
    claims.checkpointed(store, given_back, 500)
    endings.release(store, given_back)
    for number in range(5):
        fill(RunFolder(spec.run_dir(number)), 500, 1000)
    return store


def held(store: Store) -> dict[int, tuple[int, int]]:
    """Number → how many weights files and states it has."""
    runs = {n: RunFolder(store.spec("six").run_dir(n)) for n in range(5)}
    return {n: (len(run.weights()), len(run.states())) for n, run in runs.items()}


ALL = dict.fromkeys(range(5), (2, 2))


def test_nothing_goes_before_somebody_says_yes(study: Store, cli: Cli) -> None:
    shown = cli("clean", "six").stdout
    assert "2 ended trials: what only resuming needs, 4 files, 0.32 kB" in shown
    assert f"{4 * STATE} bytes" in shown
    assert "nothing has; do it: " in shown
    assert "study clean six --yes" in shown
    assert held(study) == ALL


def test_ended_trials_lose_what_only_resuming_needs(study: Store, cli: Cli) -> None:
    assert "0.32 kB removed from " in cli("clean", "six", "--yes").stdout
    assert held(study) == ALL | {0: (2, 0), 1: (2, 0)}
    assert "nothing to remove" in cli("clean", "six", "--yes").stdout


def test_the_weights_of_the_front_stay_and_the_others_of_ended_trials_go(study: Store, cli: Cli) -> None:
    shown = cli("clean", "six", "--keep", "front", "--yes").stdout
    assert "and the weights of" not in shown
    assert "kept: the weights of 2 trials on a front or best in a range of L0: 0, 1" in shown  # 1: the best of L0 16–32
    assert held(study) == ALL | {0: (2, 0), 1: (2, 0)}


def test_what_is_best_nowhere_loses_its_weights(study: Store, cli: Cli, finish: Callable[..., None]) -> None:
    run = RunFolder(study.spec("six").run_dir(4))
    shutil.rmtree(run.path)
    finish("six", (9.0, 0.6))  # trial 4: beaten by 0 in the same range
    fill(run, 500, 1000)
    assert (
        "3 ended trials: what only resuming needs and the weights of 1 of them"
        in cli("clean", "six", "--keep", "front", "--yes").stdout
    )
    assert held(study) == ALL | {0: (2, 0), 1: (2, 0), 4: (0, 0)}
    assert (study.spec("six").run_dir(4) / "evaluation.json").exists()


def test_trials_that_can_go_on_lose_theirs_only_when_named(study: Store, cli: Cli) -> None:
    shown = cli("clean", "six", "--also", "waiting", "--also", "failed", "--yes").stdout
    assert "1 waiting trials: all checkpoints, 4 files" in shown
    assert held(study) == {0: (2, 0), 1: (2, 0), 2: (0, 0), 3: (2, 2), 4: (0, 0)}
    with study.read() as connection:
        marks = db.told_in_study(connection, study.study_id("six"), CHECKPOINT)
    assert {number: samples for number, _, samples in marks.values()} == {2: 0, 4: 0}


def test_paused_trials_can_go_on_and_stay(study: Store, cli: Cli) -> None:
    claim = claims.claim(study, study.study_id("six"), 1, {})[0]
    assert claim.number == 4
    assert endings.pause(study, claim, 500, "behind others")
    cli("clean", "six", "--also", "waiting", "--yes")
    assert held(study)[4] == (2, 2)
    cli("clean", "six", "--also", "paused", "--yes")
    assert held(study)[4] == (0, 0)


def test_a_trial_that_is_claimed_meanwhile_keeps_its_files(study: Store) -> None:
    from saeopt.trials import cleaning

    where = study, study.study_id("six"), study.spec("six")
    removals = cleaning.planned(*where, also=["waiting"])
    assert claims.claim(study, where[1], 1, {})[0].number == 4
    cleaning.clean(*where, removals)
    assert held(study)[4] == (2, 2)


def test_what_cannot_be_kept_or_cleaned_is_one_line(study: Store, cli: Cli) -> None:
    assert "--keep best: 'front' is what can be kept" in cli("clean", "six", "--keep", "best", code=2).stderr
    assert "--also running: one of paused, waiting, failed" in cli("clean", "six", "--also", "running", code=2).stderr


def test_what_is_left_is_measured_anew_and_shown(study: Store, cli: Cli) -> None:
    cli("clean", "six", "--yes")
    spec, study_id = study.spec("six"), study.study_id("six")
    with study.read() as connection:
        found = budget.account(connection, study_id, spec).spent["disk_gb"]
    assert found == pytest.approx(sum(bytes_of(spec.run_dir(n)) for n in (0, 1)) / 1e9)
    assert f"run folders: {gigabytes(1e9 * found)}" in cli("status", "six").stdout


def test_a_worker_begins_no_trial_that_the_disk_has_no_room_for(
    cli: Cli, study_file: Path, store_url: str, tmp_path: Path
) -> None:
    raw = yaml.safe_load(study_file.read_text())
    study_file.write_text(yaml.safe_dump(raw | {"budget": {"disk_gb": 1e-6}}))  # a thousand bytes
    cli("create", study_file)
    store = Store.open(store_url)
    spec, study_id = store.spec("six"), store.study_id("six")
    (first,) = claims.claim(store, study_id, 1, {}, spec=spec)
    claims.checkpointed(store, first, 500, 300)
    # 300 of 1000 bytes: two more of that size, of which one has begun without a word yet
    (second,) = claims.claim(store, study_id, 1, {}, spec=spec)
    assert len(claims.claim(store, study_id, 6, {}, spec=spec)) == 1
    assert claims.claim(store, study_id, 6, {}, spec=spec) == []
    claims.checkpointed(store, second, 500, 600)
    with store.read() as connection:
        assert budget.why_over(connection, study_id, spec) == "the budget is used up: 9e-07 of 1e-06 disk_gb"
    shown = cli("status", "six").stdout
    assert "budget: 9e-07 of 1e-06 disk_gb" in shown
    assert "make room: " in shown
    assert "study clean six" in shown


def test_the_estimate_counts_weights_and_two_states(base_config: dict[str, Any]) -> None:
    base = base_config | {"data": base_config["data"] | {"n_train_samples": 1000}}
    for fields, weights, states in (
        ({}, 1, 1),
        ({"save_every_n_samples": 250}, 4, 2),
        ({"save_every_n_samples": 300, "keep_checkpoints": 1}, 2, 2),
    ):
        config = validate_run(base | fields, "here")
        assert run_folder_bytes(config, 10) == (10 * (4 * weights + 8 * states), 40)
