"""Taking trials from the queue, and what a worker may do while its claim holds (how a claim ends: `trials.endings`)."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from saeopt.config.study import StudySpec
from saeopt.trials import budget, states, waiting
from saeopt.trials import internals as db
from saeopt.trials.states import CLAIM, Claim, still_ours
from saeopt.trials.storage import Store, check_identity
from saeopt.trials.waiting import CHECKPOINT, STOOD, STREAM, TURN, Merging

STOPPED = "saeopt:stopped"


def claim(
    store: Store,
    study_id: int,
    limit: int,
    owner: Mapping[str, Any],
    identity: str | None = None,
    merging: Merging | None = None,
    spec: StudySpec | None = None,
) -> list[Claim]:
    """Up to `limit` waiting trials that can be trained together, the first of the queue among them.

    Together: equal stream and equal last checkpoint. `owner` (worker, host, device, …) is stored with the claim. A
    study with rungs is claimed with `merging`, in the order of `waiting.merged`. With a `spec`: no more than its budget
    has room for.

    Raises:
        StudyGone: the study under this key is not the one with that `identity`.
    """
    with store.write() as connection:
        check_identity(connection, study_id, identity)
        if is_stopped(connection, study_id):
            return []
        if spec is not None:
            room = budget.room(connection, study_id, spec, limit if merging is None else max(limit, merging.most))
            limit = min(limit, room)
            merging = merging and replace(merging, most=min(merging.most, room))
            if room == 0:
                return []
        if merging is None:
            rows = waiting.first(connection, study_id, limit)
        else:
            rows = waiting.merged(connection, study_id, limit, merging)
        mine = states.move(connection, [row.trial_id for row in rows], states.RUNNING, of=states.WAITING)
        won = [row for row in rows if row.trial_id in mine]
        token = uuid.uuid4().hex
        mark = states.marked(token, owner)
        marks = [{"trial_id": row.trial_id, "key": CLAIM, "value_json": mark} for row in won]
        marks += [{"trial_id": row.trial_id, "key": TURN, "value_json": str(row.turn + 1)} for row in won]
        db.upsert(connection, db.trial_attrs, ("trial_id", "key"), marks)
        db.first_beats(connection, mine, db.db_now(connection))
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
            row.stood,
            row.promoted,
        )
        for row in won
    ]


def beat(store: Store, claims: Sequence[Claim]) -> set[int]:
    """A sign of life for all claims; returns the trials that are still ours."""
    if not claims:
        return set()
    with store.write() as connection:
        ours = still_ours(connection, claims, lock=False)
        db.beats(connection, ours, db.db_now(connection))
    return ours


def describe(store: Store, claim: Claim, stream: str, attrs: Mapping[str, Any]) -> bool:
    """Store the stream of a trial whose parameters are known now, and more system attributes."""
    with store.write() as connection:
        if not still_ours(connection, [claim]):
            return False
        db.set_attrs(connection, db.trial_attrs, claim.trial_id, {STREAM: stream, **attrs})
    return True


def checkpointed(store: Store, claim: Claim, samples: int, size: int | None = None) -> bool:
    """Record that the trial can go on from here; losses and deaths after it are counted from the beginning.

    `size`: bytes of its run folder.
    """
    sized = {} if size is None else {budget.DISK: size}
    with store.write() as connection:
        if not still_ours(connection, [claim]):
            return False
        db.set_attrs(connection, db.trial_attrs, claim.trial_id, {CHECKPOINT: samples, **sized})
    return True


def stood(store: Store, claims: Sequence[Claim], samples: int) -> None:
    """Record that these trials were judged at a rung and go on: whoever claims one there does not judge it again."""
    with store.write() as connection:
        for trial_id in still_ours(connection, claims):
            db.set_attrs(connection, db.trial_attrs, trial_id, {STOOD: samples})


def report(store: Store, claim: Claim, step: int, value: float, attrs: Mapping[str, Any] | None = None) -> bool:
    """An intermediate value (also in studies of several objectives, where Optuna's own call refuses)."""
    with store.write() as connection:
        if not still_ours(connection, [claim]):
            return False
        db.set_report(connection, claim.trial_id, step, value)
        db.set_attrs(connection, db.trial_attrs, claim.trial_id, attrs or {})
    return True


def first_params(store: Store, study_id: int) -> dict[str, Any]:
    """The parameters of the study's first trial."""
    with store.read() as connection:
        first = db.first_trial(connection, study_id)
        return {} if first is None else db.params_of(connection, [first])[first]


def counts(store: Store, study_id: int) -> dict[str, int]:
    """Trials by state (`WAITING`, `RUNNING`, `PAUSED`, `COMPLETE`, `PRUNED`, `FAIL`); zeros included."""
    with store.read() as connection:
        return db.counts(connection, study_id)


def is_stopped(connection: db.Connection, study_id: int) -> bool:
    """Whether `study stop` asked the workers to hand their trials back."""
    return bool(db.get_attrs(connection, db.study_attrs, study_id, STOPPED).get(STOPPED))


def set_stopped(store: Store, study_id: int, stopped: bool) -> None:
    """Ask all workers to checkpoint and give back (or let them claim again)."""
    with store.write() as connection:
        db.set_attrs(connection, db.study_attrs, study_id, {STOPPED: stopped})
