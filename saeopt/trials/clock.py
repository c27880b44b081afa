"""What a worker measures of its pack: its present speed, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable

_FIXED = 0.5
"""Share of a pack's time that does not shrink with its trials (the language model): between 0 and 1, seldom known."""
_RECENT = 1 / 3
"""Share of the time so far that the speed is taken from: members that were stopped make a pack faster."""
_FEWEST = 4
"""Reports that a speed is taken from at least."""
_STORE_SECONDS = 1.0
"""Storing a result, with its pictures, before one was stored here."""


def scaled(trials: int, of: int) -> float:
    """Time of a pack of `trials`, as a share of the time of a pack of `of` trials."""
    return _FIXED + (1 - _FIXED) * trials / max(of, 1)


class PackClock:
    """A worker's measure of its pack: its present speed, and what lies before and behind the training."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._now = clock
        self.trials = 0
        self._open, self._total, self._ahead = 0, 0, 0.0
        self._claimed = 0.0
        self._marks: list[tuple[float, int]] = []
        self._stores: list[float] = []
        """When training was over, and when each result was stored after that."""
        self._before: float | None = None
        self._lead: float | None = None
        self._evaluation: float | None = None
        self._store = _STORE_SECONDS

    def claimed(self, trials: int) -> None:
        """This number of trials is about to be trained together."""
        self._before = None if self._before is None else self._before * scaled(trials, self.trials)
        self.trials = self._open = trials
        self._total, self._ahead, self._marks, self._stores = 0, 0.0, [], []
        self._claimed = self._now()

    def begun(self, samples: int, total: int) -> None:
        """Training starts at `samples` of `total` (said once by each trial of the pack)."""
        if not self._marks:
            self._total, self._marks = total, [(self._now(), samples)]
            lead = self._now() - self._claimed
            self._lead = lead if self._lead is None else min(self._lead, lead)  # the first one loads the model

    def evaluation_takes(self, samples: float) -> None:
        """The evaluation at the end takes about as long as this number of training samples."""
        self._ahead = samples

    def moved(self, samples: int) -> None:
        """The pack has reached this number of samples."""
        if not self._marks:
            return
        now = self._now()
        self._marks.append((now, samples))
        since = now - (now - self._marks[0][0]) * _RECENT
        n_recent = sum(m[0] >= since for m in self._marks[1:])
        self._marks[1:] = self._marks[1:][-max(n_recent, _FEWEST) :]
        if samples >= self._total:
            self._stores = [now]

    def ended(self) -> None:
        """The result of a trial is stored: while others train, or after the evaluation of them all."""
        self._open -= 1
        if self._stores:
            self._stores.append(self._now())

    def over(self) -> None:
        """The pack has ended."""
        if len(self._stores) > 1:
            self._store, self._evaluation = (
                self._per_trial,
                max(0.0, self._stores[1] - self._stores[0] - self._per_trial),
            )
        self._before, self._claimed, self._open = self.whole, self._now(), 0
        self._marks, self._stores = [], []  # the next pack takes as long, until it says more

    @property
    def _per_trial(self) -> float:
        """Seconds of storing a result, with its pictures. The first one also loads what draws them."""
        gaps = sorted(b - a for a, b in zip(self._stores[1:], self._stores[2:], strict=False))
        return gaps[len(gaps) // 2] if gaps else self._store

    @property
    def _speed(self) -> float | None:
        """Samples per second, of the last third of what has passed."""
        if len(self._marks) < 2:
            return None
        first = self._marks[1] if len(self._marks) > _FEWEST else self._marks[0]
        (then, before), (now, samples) = first, self._marks[-1]
        return (samples - before) / (now - then) if now > then and samples > before else None

    def _behind(self, speed: float, trials: int) -> float:
        evaluation = self._ahead / speed if self._evaluation is None else self._evaluation
        if len(self._stores) == 1:  # it goes on: whatever was expected, it takes this long at least
            evaluation = max(evaluation, self._now() - self._stores[0])
        return evaluation + trials * self._store

    @property
    def left(self) -> float | None:
        """Seconds until all results of the pack are stored; None while nobody knows."""
        speed, now = self._speed, self._now()
        if speed is None:  # it has just begun: as the one before, if there was one
            return None if self._before is None else max(0.0, self._before - (now - self._claimed))
        if len(self._stores) > 1:
            return max(0.0, self._open * self._per_trial - (now - self._stores[-1]))
        then, samples = self._marks[-1]
        left = (self._total - samples) / speed + self._behind(speed, self._open)
        return max(0.0, left - (now - then))

    @property
    def whole(self) -> float | None:
        """Seconds that such a pack takes from beginning to end."""
        speed = self._speed
        if speed is None:
            return self._before
        return (self._lead or 0.0) + self._total / speed + self._behind(speed, self.trials)
