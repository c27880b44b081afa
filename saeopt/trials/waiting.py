"""Which waiting trials come next, and which of them can be trained together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def first(connection: db.Connection, study_id: int, limit: int) -> list[Waiting]:
    """The first waiting trial and others that can join it, locked; in steps that need no join of attribute tables
    (PostgreSQL plans those badly until it has gathered statistics: 400 ms with a fresh thousand cells)."""
    head = _head(connection, study_id)
    if head is None:
        return []
    found, after = [head], -1
    while len(found) < limit and not head.alone:
        rows = db.waiting_after(connection, study_id, after, _CHUNK)
        joining = [w for w in _described(connection, rows) if w.joins(head)][: limit - len(found)]
        locked = db.lock_waiting(connection, [w.trial_id for w in joining])
        found += [w for w in joining if w.trial_id in locked]
        if len(rows) < _CHUNK:
            break
        after = rows[-1][1]
    return found


def _head(connection: db.Connection, study_id: int) -> Waiting | None:
    """The first trial that nobody has had trouble with, else the first; locked."""
    row = db.lock_first_waiting(connection, study_id)
    if row is None:
        return None
    (first,) = _described(connection, [row])
    if not first.behind:
        return first
    after = first.number
    while rows := db.waiting_after(connection, study_id, after, _CHUNK):
        untouched = {w.trial_id: w for w in _described(connection, rows) if not w.behind}
        if untouched and (locked := db.lock_first_waiting(connection, study_id, untouched)):
            return untouched[locked[0]]
        after = rows[-1][1]
    return first


def _described(connection: db.Connection, rows: Sequence[tuple[int, int]]) -> list[Waiting]:
    keys = [STREAM, CHECKPOINT, ALONE, BEHIND, TURN]
    attrs = db.attrs_of(connection, db.trial_attrs, [trial_id for trial_id, _ in rows], keys)
    return [
        Waiting(
            trial_id,
            number,
            attrs.get((trial_id, STREAM)),
            int(attrs.get((trial_id, CHECKPOINT), 0)),
            bool(attrs.get((trial_id, ALONE))),
            bool(attrs.get((trial_id, BEHIND))),
            int(attrs.get((trial_id, TURN), 0)),
        )
        for trial_id, number in rows
    ]
