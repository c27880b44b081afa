"""Reading a study straight from its tables: what `status`, `best` and the stop flag need costs a few statements.

Optuna's own way loads every intermediate value of every trial (seconds for 1,000 trials). Nothing here writes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import optuna
from sqlalchemy import Engine, bindparam, text

from saeopt.trials.internals.queue import PAUSED


@dataclass
class TrialRow:
    """A trial as the tables hold it, `PAUSED` as a state of its own. Times are UTC without a zone."""

    trial_id: int
    number: int
    state: str
    start: datetime | None
    complete: datetime | None
    attributes: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    values: list[float] = field(default_factory=list)
    step: int | None = None
    """The last reported step, for running trials."""

    @property
    def seconds(self) -> float | None:
        """How long the trial took."""
        return (self.complete - self.start).total_seconds() if self.complete and self.start else None


_PAUSED = f"LEFT JOIN trial_system_attributes p ON p.trial_id = t.trial_id AND p.key = '{PAUSED}'"
_STATE = "CASE WHEN p.key IS NOT NULL AND t.state = 'WAITING' THEN 'PAUSED' ELSE CAST(t.state AS VARCHAR) END"


def _rows(engine: Engine, sql: str, **values: Any) -> list[Any]:
    statement = text(sql)
    for name, value in values.items():
        if isinstance(value, list):
            statement = statement.bindparams(bindparam(name, expanding=True))
    with engine.connect() as connection:
        return list(connection.execute(statement, values))


def _time(value: object) -> datetime | None:
    if value is None or isinstance(value, datetime):
        return value
    return datetime.fromisoformat(str(value))


def study_ids(engine: Engine) -> dict[str, int]:
    """Names of all studies, in order of creation, with their ids."""
    return {name: key for key, name in _rows(engine, "SELECT study_id, study_name FROM studies ORDER BY study_id")}


def attributes(engine: Engine, study_id: int, prefix: str, kind: str = "system") -> dict[str, Any]:
    """The attributes of a study whose key starts with `prefix` (without wildcards in it)."""
    sql = f"SELECT key, value_json FROM study_{kind}_attributes WHERE study_id = :study AND key LIKE :like"
    return {k: json.loads(v) for k, v in _rows(engine, sql, study=study_id, like=prefix + "%")}


def state_counts(engine: Engine) -> dict[int, dict[str, int]]:
    """Study id → state → number of trials."""
    result: dict[int, dict[str, int]] = {}
    sql = f"SELECT t.study_id, {_STATE}, count(*) FROM trials t {_PAUSED} GROUP BY 1, 2"
    for study, state, n in _rows(engine, sql):
        result.setdefault(study, {})[state] = n
    return result


def trial_rows(engine: Engine, study_id: int) -> list[TrialRow]:
    """All trials with their user attributes, without parameters, values and reports.

    Attributes of one hook point (`fvu@…`) are left out: they are there for the dashboard, and many.
    """
    sql = (
        f"SELECT t.trial_id, t.number, {_STATE}, t.datetime_start, t.datetime_complete FROM trials t {_PAUSED}"
        " WHERE t.study_id = :study"
    )
    rows = [TrialRow(i, n, s, _time(a), _time(b)) for i, n, s, a, b in _rows(engine, sql, study=study_id)]
    by_id = {row.trial_id: row for row in rows}
    sql = (
        "SELECT a.trial_id, a.key, a.value_json FROM trial_user_attributes a JOIN trials t ON a.trial_id = t.trial_id"
        " WHERE t.study_id = :study AND a.key NOT LIKE '%@%'"
    )
    for trial, key, value in _rows(engine, sql, study=study_id):
        by_id[trial].attributes[key] = json.loads(value)
    return sorted(rows, key=lambda row: row.number)


def curves(engine: Engine, study_id: int, newest: int) -> dict[int, list[tuple[int, float]]]:
    """Trial → (step, value) of its finite intermediate values, for the newest trials that have any."""
    sql = (
        "SELECT t.number, v.step, v.intermediate_value FROM trial_intermediate_values v"
        " JOIN trials t ON v.trial_id = t.trial_id WHERE t.trial_id IN (SELECT trial_id FROM trials WHERE"
        " study_id = :study AND trial_id IN (SELECT trial_id FROM trial_intermediate_values)"
        " ORDER BY trial_id DESC LIMIT :newest) AND v.intermediate_value_type = 'FINITE' ORDER BY t.number, v.step"
    )
    found: dict[int, list[tuple[int, float]]] = {}
    for number, step, value in _rows(engine, sql, study=study_id, newest=newest):
        found.setdefault(number, []).append((step, value))
    return found


def add_steps(engine: Engine, rows: list[TrialRow]) -> None:
    """Fill in the last reported step of some trials."""
    by_id = {row.trial_id: row for row in rows}
    if by_id:
        sql = "SELECT trial_id, max(step) FROM trial_intermediate_values WHERE trial_id IN :ids GROUP BY trial_id"
        for trial, step in _rows(engine, sql, ids=list(by_id)):
            by_id[trial].step = step


def add_params(engine: Engine, rows: list[TrialRow], study_id: int) -> None:
    """Fill in the parameters, as Optuna stores them."""
    by_id = {row.trial_id: row for row in rows}
    sql = (
        "SELECT p.trial_id, p.param_name, p.param_value, p.distribution_json FROM trial_params p"
        " JOIN trials t ON p.trial_id = t.trial_id WHERE t.study_id = :study ORDER BY p.param_id"
    )
    known: dict[str, Any] = {}
    for trial, name, value, distribution in _rows(engine, sql, study=study_id):
        if trial in by_id:
            if distribution not in known:
                known[distribution] = optuna.distributions.json_to_distribution(distribution)
            by_id[trial].params[name] = known[distribution].to_external_repr(value)


def add_values(engine: Engine, rows: list[TrialRow], study_id: int) -> None:
    """Fill in the objective values."""
    by_id = {row.trial_id: row for row in rows}
    sql = (
        "SELECT v.trial_id, v.value, v.value_type FROM trial_values v JOIN trials t ON v.trial_id = t.trial_id"
        " WHERE t.study_id = :study ORDER BY v.objective"
    )
    infinite = {"INF_POS": float("inf"), "INF_NEG": float("-inf")}
    for trial, value, kind in _rows(engine, sql, study=study_id):
        if trial in by_id:
            by_id[trial].values.append(infinite.get(kind, value))
