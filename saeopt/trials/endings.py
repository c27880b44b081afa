"""How a claim ends: the trial is given back, ended, failed, or taken from a worker that is lost."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from saeopt.config.settings import redact
from saeopt.trials import internals as db
from saeopt.trials.attributes import PAUSED_AT, REASON, TRACEBACK
from saeopt.trials.states import CLAIM, FAIL, PAUSED, RUNNING, WAITING, Claim, TrialState, move
from saeopt.trials.storage import Store
from saeopt.trials.waiting import ALONE, BEHIND, CHECKPOINT, STOOD

LOSSES, LOST_AT, FAILURES = "saeopt:losses", "saeopt:lost_at", "saeopt:failures"
DEATHS, DIED_AT = "saeopt:deaths", "saeopt:died_at"
MAX_DEATHS = 3
"""Deaths of the training process without a new checkpoint after which a trial fails."""
_ALONE_AFTER = 2  # losses after which a trial is no longer packed with others, which it may be killing
_TRACEBACK = 8000  # characters kept


def release(
    store: Store, claim: Claim, checkpoint: int | None = None, *, alone: bool = False, reason: str | None = None
) -> bool:
    """Give a trial back to the queue without counting anything against it.

    With a `reason` (a fault of the host, not of the trial) it goes behind the trials that nobody has tried yet.
    """
    with store.write() as connection:
        if not move(connection, claim, WAITING):
            return False
        attrs: dict[str, Any] = {} if checkpoint is None else {CHECKPOINT: checkpoint}
        if reason is not None:
            attrs[BEHIND] = True
            db.set_attrs(connection, db.trial_user_attrs, claim.trial_id, {REASON: redact(reason)})
        db.set_attrs(connection, db.trial_attrs, claim.trial_id, attrs | ({ALONE: True} if alone else {}))
    return True


def finish(
    store: Store,
    claim: Claim,
    state: Literal["COMPLETE", "PRUNED"],
    values: Sequence[float] | None,
    *,
    constraints: Mapping[str, float] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> bool:
    """Store the result in one transaction; False if the claim was lost (then somebody else stores it)."""
    with store.write() as connection:
        if not move(connection, claim, TrialState[state]):
            return False
        if values is not None:
            db.set_values(connection, claim.trial_id, values)
        db.set_attrs(connection, db.trial_attrs, claim.trial_id, db.constraint_attrs(constraints or {}))
        # What an earlier attempt failed of is no longer true.
        db.drop_attrs(connection, db.trial_user_attrs, claim.trial_id, [REASON, TRACEBACK])
        db.set_attrs(connection, db.trial_user_attrs, claim.trial_id, attrs or {})
    return True


def pause(
    store: Store,
    claim: Claim,
    samples: int,
    reason: str,
    *,
    values: Sequence[float] | None = None,
    constraints: Mapping[str, float] | None = None,
) -> bool:
    """Others are ahead of it at a rung: it keeps its checkpoint there, and nobody claims it; False if it was not ours.

    No sampler hears of it before the study's end (`trials.paused`), which tells it `values` and `constraints`.
    """
    told = {"samples": samples, "values": None if values is None else list(values), "limits": dict(constraints or {})}
    with store.write() as connection:
        if not move(connection, claim, PAUSED, told=told):
            return False
        db.set_attrs(connection, db.trial_attrs, claim.trial_id, {CHECKPOINT: samples, STOOD: samples})
        db.drop_attrs(connection, db.trial_user_attrs, claim.trial_id, [TRACEBACK])
        said = {REASON: redact(reason), "samples": samples, PAUSED_AT: samples}
        db.set_attrs(connection, db.trial_user_attrs, claim.trial_id, said)
    return True


def fail(
    store: Store, claim: Claim, reason: str, traceback: str = "", retries: int = 0
) -> Literal["waiting", "failed"]:
    """A failure of the trial itself: back, behind the untouched trials, until its retries are used up.

    Returns where it went.
    """
    with store.write() as connection:
        number = 1 + int(db.get_attrs(connection, db.trial_attrs, claim.trial_id, FAILURES).get(FAILURES, 0))
        again = number <= retries
        if not move(connection, claim, WAITING if again else FAIL):
            return "waiting"
        attrs = {REASON: redact(reason), TRACEBACK: redact(traceback)[-_TRACEBACK:], "failures": number}
        db.set_attrs(connection, db.trial_user_attrs, claim.trial_id, attrs)
        behind = {BEHIND: True} if again else {}
        db.set_attrs(connection, db.trial_attrs, claim.trial_id, {FAILURES: number, **behind})
    return "waiting" if again else "failed"


def died(store: Store, claim: Claim, reason: str) -> Literal["waiting", "failed", "lost"]:
    """The process that trained it ended by itself: behind the untouched trials, and alone from now on.

    A trial whose process died `MAX_DEATHS` times without a new checkpoint in between fails.
    """
    with store.write() as connection:
        changed, deaths = _counted(connection, claim.trial_id, DEATHS, DIED_AT)
        again = deaths < MAX_DEATHS
        if not move(connection, claim, WAITING if again else FAIL):
            return "lost"
        said = redact(f"{reason} ({deaths} time{'s'[: deaths != 1]} without a new checkpoint in between)")
        db.set_attrs(connection, db.trial_user_attrs, claim.trial_id, {REASON: said})
        behind = {BEHIND: True, ALONE: True} if again else {}
        db.set_attrs(connection, db.trial_attrs, claim.trial_id, {**changed, **behind})
    return "waiting" if again else "failed"


def stalled(store: Store, claim: Claim, reason: str, max_losses: int) -> bool:
    """Give back a trial that made no progress for long: counted as a loss of its worker; False if it was not ours."""
    with store.write() as connection:
        return _lose(connection, claim, claim.trial_id, max_losses, redact(reason))


def _counted(connection: db.Connection, trial_id: int, count: str, at: str) -> tuple[dict[str, Any], int]:
    """One more of something that starts from one after each new checkpoint: the changed attributes, and the number."""
    attrs = db.get_attrs(connection, db.trial_attrs, trial_id, "saeopt:")
    checkpoint = int(attrs.get(CHECKPOINT, 0))
    progressed = at in attrs and checkpoint > int(attrs[at])
    number = 1 if progressed else 1 + int(attrs.get(count, 0))
    return {count: number, at: checkpoint}, number


def _lose(
    connection: db.Connection, what: Claim | Iterable[int], trial_id: int, max_losses: int, reason: str | None = None
) -> bool:
    """Back to the queue; a trial that was lost `max_losses` times without a new checkpoint in between fails.

    With a `reason` it goes behind the untouched trials.
    """
    changed, losses = _counted(connection, trial_id, LOSSES, LOST_AT)
    again = losses < max_losses
    if not move(connection, what, WAITING if again else FAIL):
        return False
    said = reason
    if not again:
        lost = f"its worker was lost {losses} times without a new checkpoint in between"
        said = f"{lost}; {reason}" if reason else lost
    if said is not None:
        db.set_attrs(connection, db.trial_user_attrs, trial_id, {REASON: said})
    if again:
        changed |= ({BEHIND: True} if reason is not None else {}) | ({ALONE: True} if losses >= _ALONE_AFTER else {})
    db.set_attrs(connection, db.trial_attrs, trial_id, changed)
    return True


def reap(
    store: Store,
    study_id: int,
    suspects: Iterable[int],
    grace: float,
    max_losses: int,
    silent: Mapping[int, dt.datetime] | None = None,
) -> list[int]:
    """Take running trials without a sign of life for `grace` seconds back into the queue; returns which.

    `silent`: the last signs that the caller itself has seen unchanged for that long; they need no clock, which on
    SQLite is that of whoever wrote the sign. A trial that was lost `max_losses` times without a new checkpoint fails.
    """
    reaped = []
    for trial_id in suspects:
        with store.write() as connection:
            if not db.in_state(connection, [trial_id], RUNNING, lock=True):
                continue
            last = db.running(connection, study_id).get(trial_id)
            if last is None:
                continue
            seen_silent = silent is not None and silent.get(trial_id) == last
            if not seen_silent and db.db_now(connection) - last <= dt.timedelta(seconds=grace):
                continue
            _lose(connection, [trial_id], trial_id, max_losses)
            reaped.append(trial_id)
    return reaped


def retry(store: Store, study_id: int, numbers: Iterable[int] | None = None) -> list[int]:
    """Put failed trials (all, or those numbers) back into the queue with fresh retries; returns their numbers."""
    wanted = None if numbers is None else set(numbers)
    with store.write() as connection:
        failed = db.numbers_in_state(connection, study_id, FAIL)
        chosen = {trial_id: n for trial_id, n in failed.items() if wanted is None or n in wanted}
        moved = move(connection, chosen, WAITING, of=FAIL)
        for trial_id in moved:
            counts = [LOSSES, LOST_AT, DEATHS, DIED_AT, FAILURES, ALONE, BEHIND, CLAIM]
            db.drop_attrs(connection, db.trial_attrs, trial_id, counts)
            db.drop_attrs(connection, db.trial_user_attrs, trial_id, [REASON, TRACEBACK, "failures"])
    return [number for trial_id, number in chosen.items() if trial_id in moved]
