"""Who trains which trial: claims that are taken once, fenced by a token, and given back when their worker is lost.

A trial keeps its number for life: RUNNING goes back to WAITING by an update that holds only while the claim does, so
the run folder stays the same and the next worker goes on from the checkpoint. Whoever lost a claim can no longer
report, release or finish the trial.
"""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import sqlalchemy as sa
from optuna.trial import TrialState

from saeopt.config.settings import redact
from saeopt.trials import internals as db
from saeopt.trials import waiting
from saeopt.trials.attributes import REASON, TRACEBACK
from saeopt.trials.storage import Store, check_identity, identity_of
from saeopt.trials.waiting import ALONE, BEHIND, CHECKPOINT, STREAM, TURN

CLAIM, STOPPED = "saeopt:claim", "saeopt:stopped"
LOSSES, LOST_AT, FAILURES = "saeopt:losses", "saeopt:lost_at", "saeopt:failures"
DEATHS, DIED_AT = "saeopt:deaths", "saeopt:died_at"
MAX_DEATHS = 3
"""Deaths of the training process without a new checkpoint after which a trial fails."""
_ALONE_AFTER = 2  # losses after which a trial is no longer packed with others, which it may be killing
_TRACEBACK = 8000  # characters kept


@dataclass(frozen=True)
class Claim:
    """A trial that this worker may train until it releases or finishes it, or is taken for dead."""

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


def claim(
    store: Store, study_id: int, limit: int, owner: Mapping[str, Any], identity: str | None = None
) -> list[Claim]:
    """Up to `limit` waiting trials that can be trained together, the first of the queue among them.

    Together: equal stream and equal last checkpoint. `owner` (worker, host, device, …) is stored with the claim.

    Raises:
        StudyGone: the study under this key is not the one with that `identity`.
    """
    with store.write() as connection:
        check_identity(connection, study_id, identity)
        if is_stopped(connection, study_id):
            return []
        rows = waiting.first(connection, study_id, limit)
        now = db.db_now(connection)
        taken = connection.execute(
            sa.update(db.trials)
            .where(db.trials.c.trial_id.in_([r.trial_id for r in rows]), db.trials.c.state == TrialState.WAITING)
            .values(state=TrialState.RUNNING, datetime_start=now)
            .returning(db.trials.c.trial_id)
        )
        mine = set(taken.scalars())
        won = [row for row in rows if row.trial_id in mine]
        token = uuid.uuid4().hex
        mark = json.dumps({"token": token, **owner})
        marks = [{"trial_id": row.trial_id, "key": CLAIM, "value_json": mark} for row in won]
        marks += [{"trial_id": row.trial_id, "key": TURN, "value_json": str(row.turn + 1)} for row in won]
        db.upsert(connection, db.trial_attrs, ("trial_id", "key"), marks)
        beats = [{"trial_id": row.trial_id, "heartbeat": now} for row in won]
        db.upsert(connection, db.heartbeats, ("trial_id",), beats)
        params = db.params_of(connection, [row.trial_id for row in won])
    return [
        Claim(
            study_id,
            row.trial_id,
            row.number,
            token,
            row.stream,
            row.checkpoint,
            params[row.trial_id],
            row.turn + 1,
            identity,
        )
        for row in won
    ]


def _still_ours(connection: sa.Connection, claims: Iterable[Claim], lock: bool = True) -> set[int]:
    """Trials whose claim still holds; locked against the reaper until the transaction ends."""
    claims = list(claims)
    known = {c.study_id: identity_of(connection, c.study_id) for c in claims if c.identity is not None}
    tokens = {c.trial_id: c.token for c in claims if c.identity is None or known[c.study_id] == c.identity}
    statement = sa.select(db.trials.c.trial_id).where(
        db.trials.c.trial_id.in_(list(tokens)), db.trials.c.state == TrialState.RUNNING
    )
    running = list(connection.execute(statement.with_for_update() if lock else statement).scalars())
    owners = connection.execute(
        sa.select(db.trial_attrs.c.trial_id, db.trial_attrs.c.value_json).where(
            db.trial_attrs.c.trial_id.in_(running), db.trial_attrs.c.key == CLAIM
        )
    )
    return {trial_id for trial_id, text in owners if json.loads(text).get("token") == tokens[trial_id]}


def beat(store: Store, claims: Sequence[Claim]) -> set[int]:
    """A sign of life for all claims; returns the trials that are still ours."""
    if not claims:
        return set()
    with store.write() as connection:
        ours = _still_ours(connection, claims, lock=False)
        connection.execute(
            sa.update(db.heartbeats)
            .where(db.heartbeats.c.trial_id.in_(list(ours)))
            .values(heartbeat=db.db_now(connection))
        )
    return ours


def describe(store: Store, claim: Claim, stream: str, attrs: Mapping[str, Any]) -> bool:
    """Store the stream of a trial whose parameters are known now, and more system attributes."""
    with store.write() as connection:
        if not _still_ours(connection, [claim]):
            return False
        db.set_attrs(connection, db.trial_attrs, claim.trial_id, {STREAM: stream, **attrs})
    return True


def checkpointed(store: Store, claim: Claim, samples: int) -> bool:
    """Record that the trial can go on from here; a loss after it starts counting anew."""
    with store.write() as connection:
        if not _still_ours(connection, [claim]):
            return False
        db.set_attrs(connection, db.trial_attrs, claim.trial_id, {CHECKPOINT: samples})
    return True


def report(store: Store, claim: Claim, step: int, value: float, attrs: Mapping[str, Any] | None = None) -> bool:
    """An intermediate value (also in studies of several objectives, where Optuna's own call refuses)."""
    with store.write() as connection:
        if not _still_ours(connection, [claim]):
            return False
        db.set_report(connection, claim.trial_id, step, value)
        db.set_attrs(connection, db.trial_attrs, claim.trial_id, attrs or {})
    return True


def release(
    store: Store, claim: Claim, checkpoint: int | None = None, *, alone: bool = False, reason: str | None = None
) -> bool:
    """Give a trial back to the queue without counting anything against it.

    With a `reason` (a fault of the host, not of the trial) it goes behind the trials that nobody has tried yet.
    """
    with store.write() as connection:
        if not _still_ours(connection, [claim]):
            return False
        _requeue(connection, claim.trial_id)
        attrs: dict[str, Any] = {} if checkpoint is None else {CHECKPOINT: checkpoint}
        if reason is not None:
            attrs[BEHIND] = True
            db.set_attrs(connection, db.trial_user_attrs, claim.trial_id, {REASON: redact(reason)})
        db.set_attrs(connection, db.trial_attrs, claim.trial_id, attrs | ({ALONE: True} if alone else {}))
    return True


def _requeue(connection: sa.Connection, trial_id: int) -> bool:
    done = connection.execute(
        sa.update(db.trials)
        .where(db.trials.c.trial_id == trial_id, db.trials.c.state == TrialState.RUNNING)
        .values(state=TrialState.WAITING)
    )
    db.drop_attrs(connection, db.trial_attrs, trial_id, [CLAIM])
    return done.rowcount == 1


def _end(connection: sa.Connection, trial_id: int, state: TrialState) -> None:
    connection.execute(
        sa.update(db.trials)
        .where(db.trials.c.trial_id == trial_id, db.trials.c.state == TrialState.RUNNING)
        .values(state=state, datetime_complete=db.db_now(connection))
    )
    db.drop_attrs(connection, db.trial_attrs, trial_id, [CLAIM, ALONE, BEHIND])


def finish(
    store: Store,
    claim: Claim,
    state: Literal["COMPLETE", "PRUNED"],
    values: Sequence[float] | None,
    *,
    constraints: Mapping[str, float] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> bool:
    """Tell the result in one transaction; False if the claim was lost (somebody else tells it then)."""
    with store.write() as connection:
        if not _still_ours(connection, [claim]):
            return False
        if values is not None:
            db.set_values(connection, claim.trial_id, values)
        db.set_attrs(connection, db.trial_attrs, claim.trial_id, db.constraint_attrs(constraints or {}))
        # What an earlier attempt failed of is no longer true.
        db.drop_attrs(connection, db.trial_user_attrs, claim.trial_id, [REASON, TRACEBACK])
        db.set_attrs(connection, db.trial_user_attrs, claim.trial_id, attrs or {})
        _end(connection, claim.trial_id, TrialState[state])
    return True


def fail(
    store: Store, claim: Claim, reason: str, traceback: str = "", retries: int = 0
) -> Literal["waiting", "failed"]:
    """A failure of the trial itself: back, behind the untouched trials, until its retries are used up.

    Returns where it went.
    """
    with store.write() as connection:
        if not _still_ours(connection, [claim]):
            return "waiting"
        number = 1 + int(db.get_attrs(connection, db.trial_attrs, claim.trial_id, FAILURES).get(FAILURES, 0))
        again = number <= retries
        attrs = {REASON: redact(reason), TRACEBACK: redact(traceback)[-_TRACEBACK:], "failures": number}
        db.set_attrs(connection, db.trial_user_attrs, claim.trial_id, attrs)
        db.set_attrs(connection, db.trial_attrs, claim.trial_id, {FAILURES: number, BEHIND: True})
        if again:
            _requeue(connection, claim.trial_id)
        else:
            _end(connection, claim.trial_id, TrialState.FAIL)
    return "waiting" if again else "failed"


def running(connection: sa.Connection, study_id: int) -> dict[int, dt.datetime]:
    """Running trials and their last signs of life."""
    rows = connection.execute(
        sa.select(db.trials.c.trial_id, db.heartbeats.c.heartbeat)
        .join(db.heartbeats, db.heartbeats.c.trial_id == db.trials.c.trial_id)
        .where(db.trials.c.study_id == study_id, db.trials.c.state == TrialState.RUNNING)
    )
    return {row.trial_id: row.heartbeat for row in rows}


def died(store: Store, claim: Claim, reason: str) -> Literal["waiting", "failed", "lost"]:
    """The process that trained it ended by itself: behind the untouched trials, and alone from now on.

    A trial whose process died `MAX_DEATHS` times without a new checkpoint in between fails.
    """
    with store.write() as connection:
        if not _still_ours(connection, [claim]):
            return "lost"
        changed, deaths = _counted(connection, claim.trial_id, DEATHS, DIED_AT)
        told = redact(f"{reason} ({deaths} time{'s'[: deaths != 1]} without a new checkpoint in between)")
        db.set_attrs(connection, db.trial_user_attrs, claim.trial_id, {REASON: told})
        db.set_attrs(connection, db.trial_attrs, claim.trial_id, {**changed, BEHIND: True, ALONE: True})
        if deaths < MAX_DEATHS:
            _requeue(connection, claim.trial_id)
            return "waiting"
        _end(connection, claim.trial_id, TrialState.FAIL)
    return "failed"


def stalled(store: Store, claim: Claim, reason: str, max_losses: int) -> bool:
    """Give back a trial that made no progress for long: counted as a loss of its worker; False if it was not ours."""
    with store.write() as connection:
        if not _still_ours(connection, [claim]):
            return False
        _lose(connection, claim.trial_id, max_losses, redact(reason))
        db.set_attrs(connection, db.trial_attrs, claim.trial_id, {BEHIND: True})
    return True


def _counted(connection: sa.Connection, trial_id: int, count: str, at: str) -> tuple[dict[str, Any], int]:
    """One more of something that counts anew after each new checkpoint: the changed attributes, and the number."""
    attrs = db.get_attrs(connection, db.trial_attrs, trial_id, "saeopt:")
    checkpoint = int(attrs.get(CHECKPOINT, 0))
    progressed = at in attrs and checkpoint > int(attrs[at])
    number = 1 if progressed else 1 + int(attrs.get(count, 0))
    return {count: number, at: checkpoint}, number


def _lose(connection: sa.Connection, trial_id: int, max_losses: int, reason: str | None = None) -> None:
    """Back to the queue; a trial that was lost `max_losses` times without a new checkpoint in between fails."""
    changed, losses = _counted(connection, trial_id, LOSSES, LOST_AT)
    if losses >= max_losses:
        lost = f"its worker was lost {losses} times without a new checkpoint in between"
        db.set_attrs(connection, db.trial_user_attrs, trial_id, {REASON: f"{lost}; {reason}" if reason else lost})
        _end(connection, trial_id, TrialState.FAIL)
    else:
        _requeue(connection, trial_id)
        if reason is not None:
            db.set_attrs(connection, db.trial_user_attrs, trial_id, {REASON: reason})
        if losses >= _ALONE_AFTER:
            changed[ALONE] = True
    db.set_attrs(connection, db.trial_attrs, trial_id, changed)


def reap(
    store: Store,
    study_id: int,
    suspects: Iterable[int],
    grace: float,
    max_losses: int,
    silent: Mapping[int, dt.datetime] | None = None,
) -> list[int]:
    """Take running trials without a sign of life for `grace` seconds back into the queue; returns which.

    `silent`: the last signs that the caller itself has seen unchanged for so long; they need no clock, which on SQLite
    is that of whoever wrote the sign. A trial that was lost `max_losses` times without a new checkpoint fails.
    """
    reaped = []
    for trial_id in suspects:
        with store.write() as connection:
            state = sa.select(db.trials.c.state).where(db.trials.c.trial_id == trial_id).with_for_update()
            if connection.execute(state).scalar() != TrialState.RUNNING:
                continue
            last = running(connection, study_id).get(trial_id)
            if last is None:
                continue
            seen_silent = silent is not None and silent.get(trial_id) == last
            if not seen_silent and db.db_now(connection) - last <= dt.timedelta(seconds=grace):
                continue
            _lose(connection, trial_id, max_losses)
            reaped.append(trial_id)
    return reaped


def retry(store: Store, study_id: int, numbers: Iterable[int] | None = None) -> list[int]:
    """Put failed trials (all, or those numbers) back into the queue with fresh retries; returns their numbers."""
    wanted = None if numbers is None else set(numbers)
    done = []
    with store.write() as connection:
        rows = connection.execute(
            sa.select(db.trials.c.trial_id, db.trials.c.number)
            .where(db.trials.c.study_id == study_id, db.trials.c.state == TrialState.FAIL)
            .order_by(db.trials.c.number)
        ).all()
        for row in rows:
            if wanted is not None and row.number not in wanted:
                continue
            connection.execute(
                sa.update(db.trials)
                .where(db.trials.c.trial_id == row.trial_id)
                .values(state=TrialState.WAITING, datetime_complete=None)
            )
            counts = [LOSSES, LOST_AT, DEATHS, DIED_AT, FAILURES, ALONE, BEHIND, CLAIM]
            db.drop_attrs(connection, db.trial_attrs, row.trial_id, counts)
            db.drop_attrs(connection, db.trial_user_attrs, row.trial_id, [REASON, TRACEBACK, "failures"])
            done.append(row.number)
    return done


def first_params(store: Store, study_id: int) -> dict[str, Any]:
    """The parameters of the study's first trial."""
    with store.read() as connection:
        numbers = sa.select(db.trials.c.trial_id).where(db.trials.c.study_id == study_id).order_by(db.trials.c.number)
        first = connection.execute(numbers.limit(1)).scalars().all()
        return next(iter(db.params_of(connection, first).values()), {})


def counts(store: Store, study_id: int) -> dict[str, int]:
    """Trials by state (`WAITING`, `RUNNING`, `COMPLETE`, `PRUNED`, `FAIL`); zeros included."""
    with store.read() as connection:
        rows = connection.execute(
            sa.select(db.trials.c.state, sa.func.count())
            .where(db.trials.c.study_id == study_id)
            .group_by(db.trials.c.state)
        )
        found = {state.name: int(n) for state, n in rows}
    return {state.name: found.get(state.name, 0) for state in TrialState}


def is_stopped(connection: sa.Connection, study_id: int) -> bool:
    """Whether `study stop` asked the workers to hand their trials back."""
    return bool(db.get_attrs(connection, db.study_attrs, study_id, STOPPED).get(STOPPED))


def set_stopped(store: Store, study_id: int, stopped: bool) -> None:
    """Ask all workers to checkpoint and release (or let them claim again)."""
    with store.write() as connection:
        db.set_attrs(connection, db.study_attrs, study_id, {STOPPED: stopped})
