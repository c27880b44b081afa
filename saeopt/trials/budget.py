"""What a study may spend and has spent, over all its workers.

Each worker keeps one number per unit for itself, from its start on, under a key that no other worker has, and always
writes all of it: whatever is written twice, or by a worker that is killed between two writes, nothing counts twice. It
is written with every sign of life, and before each checkpoint and result that is recorded: what others go on from is
paid for. What a killed worker did after its last word nobody knows of.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from saeopt.config.limits import UNITS, Budget
from saeopt.config.study import StudySpec
from saeopt.trials import internals as db
from saeopt.trials.storage import StudyGone, check_identity

SPENT = "saeopt:spent:"
"""Study: what one worker has spent since its start."""
LIMITS = "saeopt:budget"
"""Study: the budget that a person has given after its creation; it replaces the spec's."""
DISK = "saeopt:disk"
"""Trial: bytes of its run folder, at its last checkpoint or after `study clean`."""
ENDED, FROM = "saeopt:ended", "saeopt:ended_from"
"""Study: that it has ended by itself, and why; how many trials had ended when a person let it go on after that."""
AT_ONCE = ("gpu_hours", "tokens")
"""Units that go on being spent by what has begun: packs go back to the queue when they are used up."""


@dataclass(frozen=True)
class Account:
    """A study's budget and what has been spent of it."""

    limits: Mapping[str, float]
    """Unit → what may be spent; empty without a budget."""
    spent: Mapping[str, float]
    next_trial: Mapping[str, float] = field(default_factory=dict)
    """Unit → what one more trial may need at once."""

    @property
    def left(self) -> dict[str, float]:
        """Unit → what may still be spent, below 0 where there was more; empty without a budget."""
        return {unit: limit - self.spent.get(unit, 0.0) for unit, limit in self.limits.items()}

    @property
    def used_up(self) -> list[str]:
        """The units of which nothing is left, or too little for one more trial."""
        return [unit for unit, rest in self.left.items() if rest <= 0 or rest < self.next_trial.get(unit, 0.0)]

    @property
    def why_over(self) -> str | None:
        """Why no trial is begun any more; None: something is left, or there is no budget."""
        units = self.used_up
        return "the budget is used up: " + ", ".join(map(self.text, units)) if units else None

    def text(self, unit: str) -> str:
        """`3.2 of 10 gpu_hours`."""
        return f"{amount(unit, self.spent.get(unit, 0.0))} of {amount(unit, self.limits[unit])} {unit}"

    def as_json(self) -> dict[str, dict[str, float | None]]:
        """Unit → what was spent and what may be."""
        return {
            unit: {"spent": self.spent.get(unit, 0.0), "budget": self.limits.get(unit)}
            for unit in UNITS
            if unit in self.limits or unit in self.spent
        }


def amount(unit: str, value: float) -> str:
    """A number of some unit for people."""
    if unit == "trials":
        return f"{value:.0f}"
    return f"{value:,.0f}" if 1000 <= value < 10**6 else f"{value:.3g}"


def account(connection: db.Connection, study_id: int, spec: StudySpec) -> Account:
    """What the study may spend and has spent."""
    given = db.get_attrs(connection, db.study_attrs, study_id, LIMITS).get(LIMITS)
    budget = spec.budget if given is None else Budget.model_validate(given)
    now = db.counts(connection, study_id)  # what was paused until the end was never trained to its own
    workers = db.get_attrs(connection, db.study_attrs, study_id, SPENT).values()
    spent: dict[str, float] = {"trials": now["FAIL"] + len(db.in_order_of_end(connection, study_id))}
    if workers:
        spent["gpu_hours"] = sum(w["seconds"] for w in workers) / 3600
        spent["tokens"] = sum(w["tokens"] for w in workers)
    sizes = [size for _, _, size in db.told_in_study(connection, study_id, DISK).values()]
    if sizes:
        spent["disk_gb"] = sum(sizes) / 1e9
    return Account({} if budget is None else budget.limits, spent, {"disk_gb": max(sizes, default=0) / 1e9})


def has_budget(connection: db.Connection, study_id: int, spec: StudySpec) -> bool:
    """Whether the study has one, from its creation or given later."""
    return spec.budget is not None or LIMITS in db.get_attrs(connection, db.study_attrs, study_id, LIMITS)


def left(connection: db.Connection, study_id: int, spec: StudySpec) -> dict[str, float]:
    """Unit → what may still be spent (at most 0: nothing); empty where the study has no budget."""
    return account(connection, study_id, spec).left


def is_left(connection: db.Connection, study_id: int, spec: StudySpec) -> bool:
    """Whether the study has a budget of which something is left in every unit."""
    rest = left(connection, study_id, spec)
    return bool(rest) and all(value > 0 for value in rest.values())


def why_over(connection: db.Connection, study_id: int, spec: StudySpec) -> str | None:
    """Why no trial of the study is begun any more; None where nothing keeps it from going on."""
    mark = db.get_attrs(connection, db.study_attrs, study_id, ENDED).get(ENDED)
    return account(connection, study_id, spec).why_over if mark is None else str(mark["reason"])


def go_on(connection: db.Connection, study_id: int, spec: StudySpec, given: Budget | None) -> str | None:
    """Let a study go on that had ended by itself, with a new budget where one is `given`.

    Returns why it cannot: what was given is spent already; then nothing has changed.
    """
    db.lock_study(connection, study_id)
    found = account(connection, study_id, spec)
    limits = {**found.limits, **(given.limits if given else {})}
    if (reason := replace(found, limits=limits).why_over) is not None:
        return reason
    if given is not None:
        db.set_attrs(connection, db.study_attrs, study_id, {LIMITS: limits})
    if (mark := db.get_attrs(connection, db.study_attrs, study_id, ENDED).get(ENDED)) is not None:
        db.drop_attrs(connection, db.study_attrs, study_id, [ENDED])
        ended = max(int(mark["trials"]), len(db.in_order_of_end(connection, study_id)))
        db.set_attrs(connection, db.study_attrs, study_id, {FROM: ended})
    return None


def room(connection: db.Connection, study_id: int, spec: StudySpec, most: int) -> int:
    """How many trials may be begun now, at most `most`; what is begun in this transaction counts for everybody.

    Who asks this first begins first: the study is locked until then.
    """
    if spec.stop_when is None and not has_budget(connection, study_id, spec):
        return most
    db.lock_study(connection, study_id)
    running = db.running(connection, study_id)  # first: what ends from here on counts twice, not never
    if why_over(connection, study_id, spec) is not None:
        return 0
    found = account(connection, study_id, spec)
    if "trials" in found.limits:
        most = min(most, int(found.left["trials"]) - len(running))
    if "disk_gb" in found.limits and (each := found.next_trial["disk_gb"]) > 0:
        sized = db.told_in_study(connection, study_id, DISK)
        begun = [trial_id for trial_id in running if trial_id not in sized]
        most = min(most, int(found.left["disk_gb"] / each) - len(begun))
    return max(0, most)


class Meter:
    """What one worker has spent since its start. Its threads may all use it."""

    def __init__(self, worker: str, identity: str | None = None) -> None:
        self.worker, self.identity = worker, identity
        self._key = SPENT + uuid.uuid4().hex
        self._seconds, self._tokens = 0.0, 0
        self._since: float | None = None
        self._reached: dict[str, tuple[int, int]] = {}
        self._guard, self._booking = threading.Lock(), threading.Lock()

    def begin(self) -> None:
        """A pack takes the device."""
        with self._guard:
            self._since = time.monotonic() if self._since is None else self._since

    def end(self) -> None:
        """The device is free again."""
        with self._guard:
            self._seconds, self._since = self._now(), None

    def start(self, trial: str, samples: int, tokens_per_sample: int) -> None:
        """A trial is trained from `samples` on."""
        with self._guard:
            self._reached[trial] = samples, tokens_per_sample

    def reached(self, trial: str, samples: int) -> None:
        """A trial has come this far."""
        with self._guard:
            before, tokens = self._reached.get(trial, (samples, 0))
            self._tokens += max(0, samples - before) * tokens
            self._reached[trial] = max(samples, before), tokens

    def _now(self) -> float:
        return self._seconds + (0.0 if self._since is None else time.monotonic() - self._since)

    @property
    def tokens(self) -> int:
        """Of its trials, so far."""
        return self._tokens

    @property
    def spent(self) -> dict[str, Any]:
        """What is stored: the worker, its device's seconds, its trials' tokens."""
        with self._guard:
            return {"worker": self.worker, "seconds": round(self._now(), 3), "tokens": self._tokens}

    def book(self, connection: db.Connection, study_id: int) -> int:
        """Store what has been spent so far, and how many tokens that are; nothing where the study is another one."""
        try:
            check_identity(connection, study_id, self.identity)
        except StudyGone:
            return 0
        with self._booking:  # of two threads the later one writes the larger numbers
            spent = self.spent
            if spent["seconds"] or spent["tokens"]:
                db.set_attrs(connection, db.study_attrs, study_id, {self._key: spent})
            return int(spent["tokens"])
