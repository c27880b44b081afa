"""Optuna's private names that we use are where we think; this fails when they move."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
import sqlalchemy as sa
from _stores import grid_spec

from saeopt.trials import claims, endings
from saeopt.trials import internals as db
from saeopt.trials.create import create_study
from saeopt.trials.storage import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(f"sqlite:///{tmp_path}/store.db")


def test_optuna_is_the_version_whose_inside_we_know() -> None:
    assert optuna.__version__.startswith(db.SUPPORTED + ".")


def test_the_tables_have_the_columns_that_we_write() -> None:
    expected = {
        db.trials: {"trial_id", "number", "study_id", "state", "datetime_start", "datetime_complete"},
        db.trial_attrs: {"trial_id", "key", "value_json"},
        db.trial_user_attrs: {"trial_id", "key", "value_json"},
        db.study_attrs: {"study_id", "key", "value_json"},
        db.trial_params: {"trial_id", "param_name", "param_value", "distribution_json"},
        db.trial_values: {"trial_id", "objective", "value", "value_type"},
        db.trial_reports: {"trial_id", "step", "intermediate_value", "intermediate_value_type"},
        db.heartbeats: {"trial_id", "heartbeat"},
    }
    for table, columns in expected.items():
        assert columns <= set(table.c.keys()), table.name


def test_what_we_write_is_what_optuna_reads(store: Store) -> None:
    study_id = create_study(store, grid_spec(2)).study_id
    (claim,) = claims.claim(store, study_id, 1, {"worker": "w"})
    claims.report(store, claim, 8, 0.5)
    claims.report(store, claim, 16, float("nan"))
    limits = {"min_l0": -1.0, "max_fvu": 0.25}
    endings.finish(store, claim, "COMPLETE", [1.5, float("inf")], constraints=limits, attrs={"a": {"b": 1}})
    done, waiting = store.study("s").trials
    assert (done.state.name, done.values, done.params) == ("COMPLETE", [1.5, float("inf")], {"lr": 0.001})
    assert done.intermediate_values[8] == 0.5
    assert done.intermediate_values[16] != done.intermediate_values[16]
    assert list(done.constraints.values()) == [-1.0, 0.25]
    assert done.user_attrs == {"a": {"b": 1}}
    assert done.datetime_start <= done.datetime_complete
    assert (waiting.state.name, waiting.params) == ("WAITING", {"lr": 0.002})
    assert waiting.distributions["lr"] == optuna.distributions.CategoricalDistribution([0.001, 0.002])


def test_a_live_trial_is_proposed_to_and_a_heartbeat_row_is_kept(store: Store) -> None:
    spec = grid_spec(1, sampler="random", max_trials=3, space={"lr": {"low": 1e-4, "high": 1e-2, "log": True}})
    study_id = create_study(store, spec).study_id
    (claim,) = claims.claim(store, study_id, 1, {"worker": "w"})
    study = store.study("s")
    assert db.study_id_of(study) == study_id
    trial = db.live_trial(study, claim.trial_id)
    value = trial.suggest_float("lr", 1e-4, 1e-2, log=True)
    assert db.frozen_trial(study, claim.trial_id).params == {"lr": value}
    with store.read() as connection:
        assert claim.trial_id in db.running(connection, study_id)
        assert db.params_of(connection, [claim.trial_id]) == {claim.trial_id: {"lr": value}}
        assert connection.execute(sa.select(db.heartbeats.c.trial_id)).scalars().all() == [claim.trial_id]
