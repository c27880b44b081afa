"""What workers say about themselves, kept in the study so that any host can see it.

A worker writes one small record every few seconds (`beat`) and removes it when it ends (`leave`): a system attribute of
the study, one statement each, which the dashboard does not list.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

from saeopt.trials import internals as db
from saeopt.trials.budget import Meter
from saeopt.trials.storage import Store, check_identity

WORKER = "saeopt:worker:"
ALIVE_S = 30.0
"""A worker that has said nothing for this number of seconds counts as gone."""
FORGET_S = 24 * 3600.0


@dataclass
class Presence:
    """What a worker says about itself."""

    worker: str
    """Unique: host, process and device."""
    host: str
    device: str
    pid: int
    started: float
    """Unix time."""
    seen: float = 0.0
    """Unix time of the last sign, by the store's clock."""
    trials: list[int] = field(default_factory=list)
    """Numbers of the trials that it trains now."""
    samples: int = 0
    total: int = 0
    tokens_per_s: float = 0.0
    """Tokens of the stream; each is used by every trial of the pack."""
    finished: int = 0
    """Trials that it has ended since its start."""
    latest: dict[str, dict[str, float]] = field(default_factory=dict)
    """By the trial's number: samples and the newest training metrics, means over hook points."""
    pack: int = 0
    """Trials that were claimed together, some of which may have ended."""
    left: float | None = None
    """Seconds until all results of its pack are stored, at the last sign; None where it does not know."""
    whole: float | None = None
    """Seconds that such a pack takes from beginning to end."""
    quiet: float | None = None
    """Seconds without progress at the last sign; None where nothing is being trained."""
    age: float = 0.0
    """Seconds since the last sign, by the reader's clock."""

    @property
    def alive(self) -> bool:
        """Whether it has been heard of lately. A sign from the future was made before a clock was set back."""
        return abs(self.age) < ALIVE_S

    @property
    def progress_age(self) -> float | None:
        """Seconds since its training last made progress."""
        return None if self.quiet is None else self.quiet + max(0.0, self.age)


def beat(
    store: Store, study_id: int, presence: Presence, identity: str | None = None, meter: Meter | None = None
) -> None:
    """Say that the worker is alive, by the store's clock, and what it has spent; call it every five to ten seconds.

    Raises:
        StudyGone: the study is not the one with this identity.
    """
    with store.write() as connection:
        check_identity(connection, study_id, identity)
        presence.seen = db.db_time(connection)
        db.set_attrs(connection, db.study_attrs, study_id, {WORKER + presence.worker: asdict(presence)})
        if meter is not None:
            meter.book(connection, study_id)


def leave(store: Store, study_id: int, presence: Presence) -> None:
    """The worker ends: it is no longer listed."""
    with store.write() as connection:
        db.drop_attrs(connection, db.study_attrs, study_id, [WORKER + presence.worker])


def workers(attributes: dict[str, Any], now: float | None = None) -> list[Presence]:
    """The workers in the system attributes of a study, newest word first; those long gone are left out.

    `now`: Unix time by the store's clock (default: this host's).
    """
    now = time.time() if now is None else now
    found = []
    for key, value in attributes.items():
        if not key.startswith(WORKER) or not isinstance(value, dict):
            continue
        try:
            presence = Presence(**{k: v for k, v in value.items() if k in Presence.__dataclass_fields__})
        except TypeError:
            continue
        presence.age = now - presence.seen
        if presence.age < FORGET_S:
            found.append(presence)
    return sorted(found, key=lambda p: -p.seen)
