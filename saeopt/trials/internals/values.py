"""Attributes, parameters, values and reports of trials and studies; the store's clock."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from optuna.distributions import json_to_distribution
from optuna.storages._rdb import models

from saeopt.trials.internals.tables import (  # fmt: skip
    constraint_attrs,
    trial_attrs,
    trial_params,
    trial_reports,
    trial_values,
    trials,
)


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
    wanted = (column == owner, table.c.key.startswith(prefix, autoescape=True))  # SQLite's takes capitals for small
    rows = connection.execute(sa.select(table.c.key, table.c.value_json).where(*wanted))
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


def forget_result(connection: sa.Connection, trial_id: int) -> None:
    """A trial that had ended goes on: its values and what samplers were told of it are no longer true."""
    connection.execute(sa.delete(trial_values).where(trial_values.c.trial_id == trial_id))
    drop_attrs(connection, trial_attrs, trial_id, constraint_attrs({"": 0.0}))


def values_of(connection: sa.Connection, study_id: int) -> dict[int, list[float]]:
    """Trial → its finite objective values."""
    columns = (trial_values.c.trial_id, trial_values.c.value)
    statement = sa.select(*columns).join(trials, trials.c.trial_id == trial_values.c.trial_id)
    finite = trial_values.c.value_type == models.TrialValueModel.TrialValueType.FINITE
    found: dict[int, list[float]] = {}
    rows = connection.execute(statement.where(trials.c.study_id == study_id, finite).order_by(trial_values.c.objective))
    for trial_id, value in rows:
        found.setdefault(trial_id, []).append(float(value))
    return found


def infeasible(connection: sa.Connection, study_id: int) -> set[int]:
    """The trials that violate a constraint, as samplers see them."""
    (key,) = constraint_attrs({"": 0.0})
    statement = sa.select(trial_attrs.c.trial_id, trial_attrs.c.value_json)
    statement = statement.join(trials, trials.c.trial_id == trial_attrs.c.trial_id)
    rows = connection.execute(statement.where(trials.c.study_id == study_id, trial_attrs.c.key == key))
    return {trial_id for trial_id, text in rows if any(value > 0 for value in json.loads(text))}


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


def attrs_of(
    connection: sa.Connection, table: sa.Table, trial_ids: Iterable[int], keys: Sequence[str]
) -> dict[tuple[int, str], Any]:
    """(trial, key) → some attributes of some trials."""
    statement = sa.select(table.c.trial_id, table.c.key, table.c.value_json).where(
        table.c.trial_id.in_(list(trial_ids)), table.c.key.in_(list(keys))
    )
    return {(trial_id, key): json.loads(text) for trial_id, key, text in connection.execute(statement)}


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
