"""Which waiting trials come next, and which of them can be trained together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from saeopt.trials import internals as db

STREAM, CHECKPOINT, TURN = "saeopt:stream", "saeopt:checkpoint", "saeopt:turn"
ALONE, BEHIND = "saeopt:alone", "saeopt:behind"
STOOD, PROMOTED = "saeopt:stood", "saeopt:promoted"
"""Samples of the last rung at which a trial was judged and went on; whether a person has promoted it."""
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
    stood: int = 0
    promoted: bool = False

    @property
    def kind(self) -> tuple[object, ...]:
        """What trials of one pack have in common."""
        return self.stream, self.checkpoint, self.behind

    @property
    def at_rung(self) -> bool:
        """Whether it was judged where it stands: others may come to the same rung."""
        return 0 < self.stood == self.checkpoint

    def joins(self, first: Waiting) -> bool:
        """Whether it can be trained with the first (of trials without parameters no stream is known yet)."""
        return self.trial_id != first.trial_id and not self.alone and self.kind == first.kind


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


@dataclass(frozen=True)
class Merging:
    """How survivors of a rung are put together."""

    most: int
    """Trials of a full pack."""
    results_first: bool = False
    """A sampler learns from results: what has parameters is trained before anything new is proposed."""


def merged(connection: db.Connection, study_id: int, limit: int, how: Merging) -> list[Waiting]:
    """The trials of the next pack of a study with rungs, locked: see :func:`packs`."""
    ready = everyone(connection, study_id)
    known = (
        db.with_params(connection, [w.trial_id for w in ready]) if how.results_first else {w.trial_id for w in ready}
    )
    for pack, size in packs(ready, known, limit, how.most):
        locked = db.lock_waiting(connection, [w.trial_id for w in pack[:size]])
        if found := [w for w in pack[:size] if w.trial_id in locked]:
            return found
    return []


def packs(ready: Sequence[Waiting], known: set[int], limit: int, most: int) -> Iterator[tuple[list[Waiting], int]]:
    """Packs and how many of each may be taken, the most wanted first.

    A full pack of the highest rung; trials that stand at no rung, in the order of their numbers; what stands at the
    highest rung, though it fills no pack; trials whose parameters nobody has proposed yet, where a sampler learns from
    results; trials that had trouble.
    """
    groups: dict[tuple[object, ...], list[Waiting]] = {}
    for w in ready:
        if w.at_rung and not w.alone and not w.behind:
            groups.setdefault(w.kind, []).append(w)
    highest = sorted(groups.values(), key=lambda group: (-group[0].checkpoint, group[0].number))
    yield from ((group, most) for group in highest if len(group) >= most)
    below = [w for w in ready if not w.at_rung and not w.behind]
    yield from ((pack, limit) for pack in _joined(w for w in below if w.trial_id in known))
    yield from ((group, most) for group in highest)
    yield from ((pack, limit) for pack in _joined(w for w in below if w.trial_id not in known))
    yield from ((pack, limit) for pack in _joined(w for w in ready if w.behind or (w.at_rung and w.alone)))


def _joined(ready: Iterable[Waiting]) -> Iterator[list[Waiting]]:
    """Each first one with all that can join it."""
    left = list(ready)
    while left:
        head = left[0]
        pack = [head] + ([] if head.alone else [w for w in left if w.joins(head)])
        taken = {w.trial_id for w in pack}
        left = [w for w in left if w.trial_id not in taken]
        yield pack


def everyone(connection: db.Connection, study_id: int) -> list[Waiting]:
    """All trials that can be claimed, in the order of their numbers."""
    found: list[Waiting] = []
    after = -1
    while rows := db.waiting_after(connection, study_id, after, _CHUNK):
        marks = db.attrs_of(connection, db.trial_attrs, [trial_id for trial_id, _ in rows], [db.PAUSED])
        paused = {trial_id for trial_id, _ in marks}
        found += _described(connection, [row for row in rows if row[0] not in paused])
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
    keys = [STREAM, CHECKPOINT, ALONE, BEHIND, TURN, STOOD, PROMOTED]
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
            int(attrs.get((trial_id, STOOD), 0)),
            bool(attrs.get((trial_id, PROMOTED))),
        )
        for trial_id, number in rows
    ]
