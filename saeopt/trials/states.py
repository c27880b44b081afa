"""The states of a trial, how they may change, and the one function that changes them.

A trial is WAITING in the queue, RUNNING while a claim on it holds, PAUSED where it stands behind others at a rung (it
has a checkpoint and nobody claims it), and ended as COMPLETE, PRUNED or FAIL. It keeps its number and its run folder
for life.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from optuna.trial import TrialState

from saeopt.trials import internals as db
from saeopt.trials.storage import identity_of
from saeopt.trials.waiting import ALONE, BEHIND

WAITING, RUNNING, FAIL = TrialState.WAITING, TrialState.RUNNING, TrialState.FAIL
COMPLETE, PRUNED = TrialState.COMPLETE, TrialState.PRUNED
PAUSED: Final = "PAUSED"
State = TrialState | Literal["PAUSED"]
"""Optuna knows no paused trials: for it they wait, and have a mark (`internals.PAUSED`)."""

TRANSITIONS: Mapping[tuple[State | None, State], str] = {
    (None, WAITING): "created: a cell, or a trial whose parameters a sampler will propose",
    (WAITING, RUNNING): "claimed by one worker",
    (RUNNING, WAITING): "given back, failed with retries left, or its worker or training process was lost",
    (RUNNING, COMPLETE): "trained to its end, with a value of every objective",
    (RUNNING, PRUNED): "stopped early, collapsed, diverged, or without a finite value of every objective",
    (RUNNING, FAIL): "its retries, losses or deaths are used up",
    (FAIL, WAITING): "a person puts it back, with fresh retries",
    (RUNNING, PAUSED): "others are ahead of it at a rung",
    (PAUSED, WAITING): "promoted: it goes on from its rung",
    (PAUSED, PRUNED): "the study has come to its end, and nobody has promoted it",
    (PRUNED, WAITING): "a person promotes what was paused until the study's end",
    (PRUNED, PAUSED): "a person gives a study that has ended more budget: it may be promoted as before the end",
}
"""(from, to) → when. Every other change is refused; COMPLETE is final, and so is PRUNED for what was never paused."""

CLAIM = "saeopt:claim"
"""Trial: the token and the worker of the claim that holds. Only RUNNING trials have it."""


@dataclass(frozen=True)
class Claim:
    """A trial that this worker may train until it gives it back or ends it, or is taken for dead."""

    study_id: int
    trial_id: int
    number: int
    token: str
    stream: str | None
    """What it can share a pack with; None until its parameters are known."""
    checkpoint: int
    """Samples of the last checkpoint that was recorded."""
    params: dict[str, Any] = field(default_factory=dict, hash=False)
    turn: int = 1
    """How many claims the trial has had, this one included: of two workers the one with the higher turn is right."""
    identity: str | None = None
    """The study's, which no other study ever has; keys are given anew after a deletion (SQLite)."""
    stood: int = 0
    """Samples of the last rung at which it was judged and went on."""
    promoted: bool = False
    """By a person: no rung pauses it again."""


def create(connection: db.Connection, study_id: int, first_number: int, cells: Sequence[db.TrialToCome]) -> None:
    """New trials at the end of the queue."""
    _check(None, WAITING)
    db.insert_trials(connection, study_id, first_number, cells, WAITING)


def move(
    connection: db.Connection,
    what: Claim | Iterable[int],
    to: State,
    of: State = RUNNING,
    told: Mapping[str, Any] | None = None,
) -> set[int]:
    """Change the state of the trial of a claim, or of trials by their keys, from `of` to `to`; returns those it moved.

    What is not in state `of` stays as it is, and so does the trial of a claim that holds no longer. `told`: where and
    why trials are paused.

    Raises:
        ValueError: there is no such transition.
    """
    _check(of, to)
    before, after = _stored(of), _stored(to)
    ids = still_ours(connection, [what]) if isinstance(what, Claim) else set(what)
    mark: tuple[str, bool] | None = None
    if before == WAITING or of == PRUNED:  # a claim has locked its rows already
        mark = (db.PAUSED, of != WAITING)
        ids = ids if of == WAITING else set(db.in_state(connection, ids, before, lock=True))
    if not ids:
        return set()
    times: dict[str, Any] = {}
    if to == RUNNING:
        times["datetime_start"] = db.db_now(connection)
    elif after.is_finished() or before.is_finished():
        times["datetime_complete"] = db.db_now(connection) if after.is_finished() else None
    moved = db.change_state(connection, ids, before, after, mark, **times)
    if of == RUNNING:
        ended = [ALONE, BEHIND] if after.is_finished() else []
        for trial_id in moved:
            db.drop_attrs(connection, db.trial_attrs, trial_id, [CLAIM, *ended])
    for trial_id in moved if (of, to) == (RUNNING, PAUSED) else ():
        db.set_attrs(connection, db.trial_attrs, trial_id, {db.PAUSED: dict(told or {})})
    for trial_id in moved if mark == (db.PAUSED, True) and to == WAITING else ():
        db.drop_attrs(connection, db.trial_attrs, trial_id, [db.PAUSED])
    return moved


def _stored(state: State) -> TrialState:
    return WAITING if state == PAUSED else TrialState(state)


def _check(of: State | None, to: State) -> None:
    if (of, to) not in TRANSITIONS:
        names = ["nowhere" if state is None else getattr(state, "name", state) for state in (of, to)]
        raise ValueError(f"no trial goes from {names[0]} to {names[1]}")


def still_ours(connection: db.Connection, claims: Iterable[Claim], lock: bool = True) -> set[int]:
    """Trials whose claim still holds; with `lock` nobody takes them until the transaction ends.

    The rows are locked before the claims are read, in two statements: one that had waited for the lock would compare
    with a claim as it was before.
    """
    claims = list(claims)
    studies = {c.study_id for c in claims if c.identity is not None}
    known = {study_id: identity_of(connection, study_id) for study_id in studies}
    tokens = {c.trial_id: c.token for c in claims if c.identity is None or known[c.study_id] == c.identity}
    running = db.in_state(connection, tokens, RUNNING, lock)
    marks = db.attrs_of(connection, db.trial_attrs, running, [CLAIM])
    return {trial_id for (trial_id, _), mark in marks.items() if mark.get("token") == tokens[trial_id]}


def marked(token: str, owner: Mapping[str, Any]) -> str:
    """The text of :data:`CLAIM`."""
    return json.dumps({"token": token, **owner})
