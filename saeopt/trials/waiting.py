"""Which waiting trials come next, and which of them can be trained together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from saeopt.trials import internals as db

STREAM, CHECKPOINT, TURN = "saeopt:stream", "saeopt:checkpoint", "saeopt:turn"
ALONE, BEHIND = "saeopt:alone", "saeopt:behind"
_CHUNK = 256  # trials looked at together


@dataclass(frozen=True)
class Waiting:
    """A waiting trial with what decides about its pack."""

    trial_id: int
    number: int
    stream: str | None
    checkpoint: int
    alone: bool
    """It may be killing what trains with it."""
    behind: bool
    """Something went wrong with it: those that nobody has tried yet come first."""
    turn: int
    """How often it has been claimed."""

    @property
    def _kind(self) -> tuple[object, ...]:
        return self.stream, self.checkpoint, self.behind

    def joins(self, first: Waiting) -> bool:
        """Whether it can be trained with the first (of trials without parameters no stream is known yet)."""
        return self.trial_id != first.trial_id and not self.alone and self._kind == first._kind


def first(connection: sa.Connection, study_id: int, limit: int) -> list[Waiting]:
    """The first waiting trial and others that can join it, locked; in steps that need no join of attribute tables
    (PostgreSQL plans those badly until it has gathered statistics: 400 ms with a fresh thousand cells)."""
    t = db.trials
    queue = sa.select(t.c.trial_id, t.c.number).where(t.c.study_id == study_id, t.c.state == TrialState.WAITING)
    head = _head(connection, queue)
    if head is None:
        return []
    found, after = [head], -1
    while len(found) < limit and not head.alone:
        rows = connection.execute(queue.where(t.c.number > after).order_by(t.c.number).limit(_CHUNK)).all()
        joining = [w for w in _described(connection, rows) if w.joins(head)][: limit - len(found)]
        locking = sa.select(t.c.trial_id).where(t.c.trial_id.in_([w.trial_id for w in joining]))
        free = connection.execute(locking.where(t.c.state == TrialState.WAITING).with_for_update(skip_locked=True))
        locked = set(free.scalars())
        found += [w for w in joining if w.trial_id in locked]
        if len(rows) < _CHUNK:
            break
        after = rows[-1].number
    return found


def _head(connection: sa.Connection, queue: Any) -> Waiting | None:
    """The first trial that nobody has had trouble with, else the first; locked."""
    t = db.trials
    ordered = queue.order_by(t.c.number)
    found = _described(connection, connection.execute(ordered.limit(1).with_for_update(skip_locked=True)).all())
    if not found or not found[0].behind:
        return found[0] if found else None
    first, after = found[0], found[0].number
    while rows := connection.execute(ordered.where(t.c.number > after).limit(_CHUNK)).all():
        untouched = {w.trial_id: w for w in _described(connection, rows) if not w.behind}
        locking = ordered.where(t.c.trial_id.in_(list(untouched))).limit(1).with_for_update(skip_locked=True)
        if untouched and (locked := connection.execute(locking).first()):
            return untouched[locked.trial_id]
        after = rows[-1].number
    return first


def _described(connection: sa.Connection, rows: Sequence[Any]) -> list[Waiting]:
    a = db.trial_attrs
    keys = [STREAM, CHECKPOINT, ALONE, BEHIND, TURN]
    statement = sa.select(a.c.trial_id, a.c.key, a.c.value_json).where(
        a.c.trial_id.in_([row.trial_id for row in rows]), a.c.key.in_(keys)
    )
    attrs = {(trial_id, key): json.loads(text) for trial_id, key, text in connection.execute(statement)}
    return [
        Waiting(
            row.trial_id,
            row.number,
            attrs.get((row.trial_id, STREAM)),
            int(attrs.get((row.trial_id, CHECKPOINT), 0)),
            bool(attrs.get((row.trial_id, ALONE))),
            bool(attrs.get((row.trial_id, BEHIND))),
            int(attrs.get((row.trial_id, TURN), 0)),
        )
        for row in rows
    ]
