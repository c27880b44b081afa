"""States, order and signs of life of trials: the statements behind the queue (`trials.states`, `trials.claims`)."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.trial import TrialState

from saeopt.trials.internals.tables import heartbeats, models, studies, trial_attrs, trial_params, trial_reports, trials
from saeopt.trials.internals.values import upsert

TrialToCome = tuple[dict[str, tuple[Any, BaseDistribution]], dict[str, Any]]
"""Parameter → (value, distribution), and system attributes."""
PAUSED = "saeopt:paused"
"""Trial: where and why it was paused. Optuna knows no such state: it is WAITING there, with this mark."""
_t = trials.c


def _has(key: str) -> sa.Exists:
    """Whether a trial has a system attribute."""
    return sa.exists().where(trial_attrs.c.trial_id == _t.trial_id, trial_attrs.c.key == key)


def change_state(
    connection: sa.Connection,
    trial_ids: Iterable[int],
    of: TrialState,
    to: TrialState,
    having: tuple[str, bool] | None = None,
    **times: dt.datetime | None,
) -> set[int]:
    """Those of the trials that were in state `of`, and are in state `to` now; one statement.

    `having`: only those that have (or have not) this system attribute; then their rows are to be locked before.
    """
    statement = sa.update(trials).where(_t.trial_id.in_(list(trial_ids)), _t.state == of).values(state=to, **times)
    if having is not None:
        key, there = having
        statement = statement.where(_has(key) if there else ~_has(key))
    return set(connection.execute(statement.returning(_t.trial_id)).scalars())


def in_state(connection: sa.Connection, trial_ids: Iterable[int], state: TrialState, lock: bool) -> list[int]:
    """Those of the trials that are in a state; with `lock` nobody changes them until the transaction ends."""
    statement = sa.select(_t.trial_id).where(_t.trial_id.in_(list(trial_ids)), _t.state == state)
    return list(connection.execute(statement.with_for_update() if lock else statement).scalars())


def waiting_after(connection: sa.Connection, study_id: int, number: int, limit: int) -> list[tuple[int, int]]:
    """(trial, number) of waiting trials in the order of their numbers, without a lock."""
    statement = sa.select(_t.trial_id, _t.number).where(
        _t.study_id == study_id, _t.state == TrialState.WAITING, _t.number > number
    )
    return [(i, n) for i, n in connection.execute(statement.order_by(_t.number).limit(limit))]


def lock_first_waiting(
    connection: sa.Connection, study_id: int, among: Iterable[int] | None = None
) -> tuple[int, int] | None:
    """(trial, number) of the first waiting trial that nobody has locked, locked now."""
    statement = sa.select(_t.trial_id, _t.number).where(_t.study_id == study_id, _t.state == TrialState.WAITING)
    if among is not None:
        statement = statement.where(_t.trial_id.in_(list(among)))
    found = connection.execute(statement.order_by(_t.number).limit(1).with_for_update(skip_locked=True)).first()
    return None if found is None else (found.trial_id, found.number)


def lock_waiting(connection: sa.Connection, trial_ids: Iterable[int]) -> set[int]:
    """Those of the trials that wait and that nobody has locked, locked now."""
    statement = sa.select(_t.trial_id).where(_t.trial_id.in_(list(trial_ids)), _t.state == TrialState.WAITING)
    return set(connection.execute(statement.with_for_update(skip_locked=True)).scalars())


def first_beats(connection: sa.Connection, trial_ids: Iterable[int], now: dt.datetime) -> None:
    """A sign of life, also of trials that never gave one."""
    rows = [{"trial_id": trial_id, "heartbeat": now} for trial_id in trial_ids]
    upsert(connection, heartbeats, ("trial_id",), rows)


def beats(connection: sa.Connection, trial_ids: Iterable[int], now: dt.datetime) -> None:
    """A sign of life of trials that have given one before."""
    known = heartbeats.c.trial_id.in_(list(trial_ids))
    connection.execute(sa.update(heartbeats).where(known).values(heartbeat=now))


def running(connection: sa.Connection, study_id: int) -> dict[int, dt.datetime]:
    """Running trials and their last signs of life."""
    statement = sa.select(_t.trial_id, heartbeats.c.heartbeat).join(heartbeats, heartbeats.c.trial_id == _t.trial_id)
    found = connection.execute(statement.where(_t.study_id == study_id, _t.state == TrialState.RUNNING))
    return {row.trial_id: row.heartbeat for row in found}


def numbers_in_state(connection: sa.Connection, study_id: int, state: TrialState) -> dict[int, int]:
    """Trial → number of the study's trials in a state, in the order of their numbers."""
    statement = sa.select(_t.trial_id, _t.number).where(_t.study_id == study_id, _t.state == state).order_by(_t.number)
    return {row.trial_id: row.number for row in connection.execute(statement)}


def first_trial(connection: sa.Connection, study_id: int) -> int | None:
    """The study's trial of the lowest number."""
    statement = sa.select(_t.trial_id).where(_t.study_id == study_id).order_by(_t.number).limit(1)
    return connection.execute(statement).scalar()


def lock_study(connection: sa.Connection, study_id: int) -> None:
    """Nobody else locks the study until the transaction ends."""
    connection.execute(sa.select(studies.c.study_id).where(studies.c.study_id == study_id).with_for_update())


def next_number(connection: sa.Connection, study_id: int) -> int:
    """The number of the study's next trial. Who asks this first adds first: the study is locked until then."""
    lock_study(connection, study_id)
    last = connection.execute(sa.select(sa.func.max(_t.number)).where(_t.study_id == study_id)).scalar()
    return 0 if last is None else int(last) + 1


def counts(connection: sa.Connection, study_id: int) -> dict[str, int]:
    """State → trials of the study; zeros included. What is paused (`PAUSED`) does not count as waiting."""
    mark = sa.and_(trial_attrs.c.trial_id == _t.trial_id, trial_attrs.c.key == PAUSED)
    statement = sa.select(_t.state, sa.func.count(), sa.func.count(trial_attrs.c.trial_id))
    rows = connection.execute(
        statement.select_from(trials.outerjoin(trial_attrs, mark)).where(_t.study_id == study_id).group_by(_t.state)
    )
    found = {state: (int(n), int(marked)) for state, n, marked in rows}
    paused = found.get(TrialState.WAITING, (0, 0))[1]
    told = {state.name: found.get(state, (0, 0))[0] for state in TrialState}
    return told | {"WAITING": told["WAITING"] - paused, "PAUSED": paused}


def n_waiting_with_params(connection: sa.Connection, study_id: int, without: Iterable[str] = ()) -> int:
    """Waiting trials whose parameters are known, and that have none of the system attributes `without`."""
    known = sa.exists().where(trial_params.c.trial_id == _t.trial_id)
    statement = sa.select(sa.func.count()).select_from(trials).where(*(~_has(key) for key in without))
    found = connection.execute(statement.where(_t.study_id == study_id, _t.state == TrialState.WAITING, known))
    return int(found.scalar() or 0)


def with_params(connection: sa.Connection, trial_ids: Iterable[int]) -> set[int]:
    """Those of the trials whose parameters are known."""
    statement = sa.select(trial_params.c.trial_id).where(trial_params.c.trial_id.in_(list(trial_ids)))
    return set(connection.execute(statement.distinct()).scalars())


def reporters(connection: sa.Connection, study_id: int, without: Iterable[int] = ()) -> dict[int, tuple[int, str]]:
    """Trial → (number, state) of the trials that may have reported something and have not failed."""
    untouched = sa.and_(_t.state == TrialState.WAITING, ~sa.exists().where(trial_reports.c.trial_id == _t.trial_id))
    statement = sa.select(_t.trial_id, _t.number, _t.state).where(
        _t.study_id == study_id, _t.state != TrialState.FAIL, ~untouched
    )
    if known := list(without):
        statement = statement.where(_t.trial_id.not_in(known))
    return {trial_id: (number, state.name) for trial_id, number, state in connection.execute(statement)}


def in_order_of_end(connection: sa.Connection, study_id: int) -> list[tuple[int, str]]:
    """(trial, state) of the complete and pruned trials in the order in which they ended, without what was paused."""
    ended = _t.state.in_([TrialState.COMPLETE, TrialState.PRUNED])
    statement = sa.select(_t.trial_id, _t.state).where(_t.study_id == study_id, ended, ~_has(PAUSED))
    rows = connection.execute(statement.order_by(_t.datetime_complete, _t.number))
    return [(trial_id, state.name) for trial_id, state in rows]


def told_in_study(connection: sa.Connection, study_id: int, key: str) -> dict[int, tuple[int, str, Any]]:
    """Trial → (number, state, value) of the study's trials that have a system attribute."""
    mark = sa.and_(trial_attrs.c.trial_id == _t.trial_id, trial_attrs.c.key == key)
    statement = sa.select(_t.trial_id, _t.number, _t.state, trial_attrs.c.value_json).join(trial_attrs, mark)
    rows = connection.execute(statement.where(_t.study_id == study_id).order_by(_t.number))
    return {trial_id: (number, state.name, json.loads(text)) for trial_id, number, state, text in rows}


def reports_of(connection: sa.Connection, study_id: int, without: Iterable[int] = ()) -> dict[int, dict[int, float]]:
    """Trial → step → finite intermediate value."""
    kinds = models.TrialIntermediateValueModel.TrialIntermediateValueType
    columns = (trial_reports.c.trial_id, trial_reports.c.step, trial_reports.c.intermediate_value)
    statement = sa.select(*columns).join(trials, trials.c.trial_id == trial_reports.c.trial_id)
    statement = statement.where(_t.study_id == study_id, trial_reports.c.intermediate_value_type == kinds.FINITE)
    if known := list(without):
        statement = statement.where(_t.trial_id.not_in(known))
    found: dict[int, dict[int, float]] = {}
    for trial_id, step, value in connection.execute(statement):
        found.setdefault(trial_id, {})[int(step)] = float(value)
    return found


def study_keys(connection: sa.Connection) -> dict[str, int]:
    """Name → key of all studies, oldest first."""
    statement = sa.select(studies.c.study_name, studies.c.study_id).order_by(studies.c.study_id)
    return {str(name): int(key) for name, key in connection.execute(statement)}


def insert_trials(
    connection: sa.Connection, study_id: int, first_number: int, cells: Sequence[TrialToCome], state: TrialState
) -> None:
    """Append trials in bulk."""
    if not cells:
        return
    rows = [{"study_id": study_id, "number": first_number + i, "state": state} for i in range(len(cells))]
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
