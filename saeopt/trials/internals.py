"""The one module that touches private names of Optuna 5.0; `tests/search/test_internals.py` fails when they move.

Why at all: Optuna's own queue hands a waiting trial to two workers on SQLite, its retries make new trials, and a
thousand cells take minutes through its public calls. The tables underneath are plain, and its schema is versioned.
"""

from __future__ import annotations

import datetime as dt
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.storages import RDBStorage, _CachedStorage
from optuna.storages._cached_storage import _StudyInfo
from optuna.storages._rdb import models
from optuna.study._constrained_optimization import _CONSTRAINTS_KEY
from optuna.trial import FrozenTrial, Trial, TrialState

SUPPORTED = "5.0"
# A range ends with its last step, as everybody expects.
warnings.filterwarnings("ignore", message="The distribution is specified by")

studies: sa.Table = models.StudyModel.__table__
study_attrs: sa.Table = models.StudySystemAttributeModel.__table__
study_user_attrs: sa.Table = models.StudyUserAttributeModel.__table__
trials: sa.Table = models.TrialModel.__table__
trial_attrs: sa.Table = models.TrialSystemAttributeModel.__table__
trial_user_attrs: sa.Table = models.TrialUserAttributeModel.__table__
trial_params: sa.Table = models.TrialParamModel.__table__
trial_values: sa.Table = models.TrialValueModel.__table__
trial_reports: sa.Table = models.TrialIntermediateValueModel.__table__
heartbeats: sa.Table = models.TrialHeartbeatModel.__table__


def make_storage(url: str, engine_kwargs: dict[str, Any]) -> RDBStorage:
    """Optuna's storage; creates the tables where they are missing."""
    return RDBStorage(url, engine_kwargs=engine_kwargs, heartbeat_interval=None)


class QueueBlindStorage(_CachedStorage):
    """Optuna's cache without the waiting trials, for samplers and pruners.

    They never look at waiting trials, but the cache would read all of them again at every proposal and every report:
    0.5 s each time with a thousand cells.
    """

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        with self._backend.engine.connect() as connection:
            rows = connection.execute(
                sa.select(trials.c.trial_id, trials.c.number).where(
                    trials.c.study_id == study_id, trials.c.state != TrialState.WAITING
                )
            ).all()
        with self._lock:
            study = self._studies.setdefault(study_id, _StudyInfo())
            finished = {number for number, trial in study.trials.items() if trial.state.is_finished()}
            wanted = {row.trial_id for row in rows if row.number not in finished}
            if wanted:
                found = self._backend._get_trials(study_id, None, wanted, max(wanted))
                self._add_trials_to_cache(study_id, [t for t in found if t._trial_id in wanted])


def schema_is_there(engine: sa.Engine) -> bool:
    """Whether Optuna has finished setting up the tables (the version table comes last)."""
    return bool(sa.inspect(engine).has_table("alembic_version"))


def study_id_of(study: optuna.Study) -> int:
    """The key of a study in the tables."""
    return int(study._study_id)


def live_trial(study: optuna.Study, trial_id: int) -> Trial:
    """The trial as an object that suggests parameters; the study reads everything anew (its cache knows no other way
    to a trial that this process did not create)."""
    study._thread_local.cached_all_trials = None
    study.get_trials(deepcopy=False)
    return Trial(study, trial_id)


def frozen_trial(study: optuna.Study, trial_id: int) -> FrozenTrial:
    """The trial as stored now."""
    study._thread_local.cached_all_trials = None
    return study._storage.get_trial(trial_id)


def constraint_attrs(values: Mapping[str, float]) -> dict[str, Any]:
    """System attributes that say how far a trial is from feasible (at most 0: feasible), for samplers and dashboard.

    The dashboard reads only the older form, a list; the samplers read both and take the named values.
    """
    return {_CONSTRAINTS_KEY: list(values.values())} if values else {}


def upsert(connection: sa.Connection, table: sa.Table, keys: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows, or update those that have the same `keys`; one statement."""
    from sqlalchemy.dialects import postgresql, sqlite

    if not rows:
        return
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = insert(table).values([dict(row) for row in rows])
    changed = {name: statement.excluded[name] for name in rows[0] if name not in keys}
    connection.execute(statement.on_conflict_do_update(index_elements=list(keys), set_=changed))


def insert_missing(connection: sa.Connection, table: sa.Table, keys: Sequence[str], row: Mapping[str, Any]) -> None:
    """Insert a row unless there is one with the same `keys`."""
    from sqlalchemy.dialects import postgresql, sqlite

    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    connection.execute(insert(table).values(dict(row)).on_conflict_do_nothing(index_elements=list(keys)))


def set_attrs(connection: sa.Connection, table: sa.Table, owner: int, attrs: Mapping[str, Any]) -> None:
    """Write attributes (any JSON values) of a study or trial into one of the four attribute tables."""
    column = "study_id" if "study_id" in table.c else "trial_id"
    rows = [{column: owner, "key": key, "value_json": json.dumps(value)} for key, value in attrs.items()]
    upsert(connection, table, (column, "key"), rows)


def get_attrs(connection: sa.Connection, table: sa.Table, owner: int, prefix: str = "") -> dict[str, Any]:
    """Attributes of a study or trial whose keys start with `prefix`."""
    column = table.c["study_id" if "study_id" in table.c else "trial_id"]
    rows = connection.execute(sa.select(table.c.key, table.c.value_json).where(column == owner))
    return {key: json.loads(text) for key, text in rows if key.startswith(prefix)}


def drop_attrs(connection: sa.Connection, table: sa.Table, owner: int, keys: Iterable[str]) -> None:
    """Delete attributes of a study or trial."""
    column = table.c["study_id" if "study_id" in table.c else "trial_id"]
    connection.execute(sa.delete(table).where(column == owner, table.c.key.in_(list(keys))))


def set_values(connection: sa.Connection, trial_id: int, values: Iterable[float]) -> None:
    """The objective values of a trial."""
    connection.execute(sa.delete(trial_values).where(trial_values.c.trial_id == trial_id))
    for objective, value in enumerate(values):
        stored, kind = models.TrialValueModel.value_to_stored_repr(float(value))
        connection.execute(
            sa.insert(trial_values).values(trial_id=trial_id, objective=objective, value=stored, value_type=kind)
        )


def set_report(connection: sa.Connection, trial_id: int, step: int, value: float) -> None:
    """An intermediate value."""
    stored, kind = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(float(value))
    row = {"trial_id": trial_id, "step": step, "intermediate_value": stored, "intermediate_value_type": kind}
    upsert(connection, trial_reports, ("trial_id", "step"), [row])


def params_of(connection: sa.Connection, trial_ids: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Parameters per trial, as the sampler or the queue gave them."""
    found: dict[int, dict[str, Any]] = {trial_id: {} for trial_id in trial_ids}
    columns = (trial_params.c.trial_id, trial_params.c.param_name, trial_params.c.param_value)
    statement = sa.select(*columns, trial_params.c.distribution_json).where(trial_params.c.trial_id.in_(list(found)))
    for trial_id, name, value, distribution in connection.execute(statement.order_by(trial_params.c.param_id)):
        found[trial_id][name] = json_to_distribution(distribution).to_external_repr(value)
    return found


def clear_params(connection: sa.Connection, trial_id: int) -> None:
    """Forget the parameters of a trial."""
    connection.execute(sa.delete(trial_params).where(trial_params.c.trial_id == trial_id))


def other_params(connection: sa.Connection, study_id: int, trial_id: int) -> list[dict[str, Any]]:
    """Parameters of the study's other trials that have some."""
    others = sa.select(trials.c.trial_id).where(trials.c.study_id == study_id, trials.c.trial_id != trial_id)
    return [params for params in params_of(connection, connection.execute(others).scalars()).values() if params]


def insert_waiting(
    connection: sa.Connection,
    study_id: int,
    first_number: int,
    cells: list[tuple[dict[str, tuple[Any, BaseDistribution]], dict[str, Any]]],
) -> None:
    """Append queued trials in bulk. A cell: parameter → (value, distribution), and system attributes."""
    if not cells:
        return
    rows = [{"study_id": study_id, "number": first_number + i, "state": TrialState.WAITING} for i in range(len(cells))]
    connection.execute(sa.insert(trials), rows)
    found = connection.execute(
        sa.select(trials.c.trial_id, trials.c.number).where(
            trials.c.study_id == study_id, trials.c.number >= first_number
        )
    )
    ids = {number: trial_id for trial_id, number in found}
    params, attrs = [], []
    texts: dict[int, str] = {}
    for i, (cell, extra) in enumerate(cells):
        trial_id = ids[first_number + i]
        for name, (value, distribution) in cell.items():
            text = texts.setdefault(id(distribution), distribution_to_json(distribution))
            params.append(
                {
                    "trial_id": trial_id,
                    "param_name": name,
                    "param_value": distribution.to_internal_repr(value),
                    "distribution_json": text,
                }
            )
        attrs += [{"trial_id": trial_id, "key": k, "value_json": json.dumps(v)} for k, v in extra.items()]
    if params:
        connection.execute(sa.insert(trial_params), params)
    if attrs:
        connection.execute(sa.insert(trial_attrs), attrs)


def db_now(connection: sa.Connection) -> dt.datetime:
    """The one clock of all workers, as naive UTC: the server's, or this host's for SQLite."""
    if connection.dialect.name == "postgresql":
        found = connection.execute(sa.text("SELECT clock_timestamp() AT TIME ZONE 'UTC'")).scalar_one()
        assert isinstance(found, dt.datetime)
        return found
    return dt.datetime.now(dt.UTC).replace(tzinfo=None)


def db_time(connection: sa.Connection) -> float:
    """:func:`db_now` as Unix time."""
    return db_now(connection).replace(tzinfo=dt.UTC).timestamp()
