"""Time left, by a clock that the tests set: right within a fifth from the first tenth of a study on."""

from __future__ import annotations

import dataclasses
import datetime as dt
import heapq
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from _stores import grid_spec

from saeopt.trials.clock import PackClock
from saeopt.trials.internals.queries import TrialRow
from saeopt.trials.presence import Presence
from saeopt.views.eta import seconds_left
from saeopt.views.status import Status

TOTAL, STEP = 1000, 20


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


Event = tuple[float, int]


class Simulated:
    """A worker that trains pack after pack: a step takes `step_s(trials)`; it loads before and evaluates behind."""

    def __init__(self, i: int, queue: list[float], size: int, step_s: Callable[[int], float], **seconds: float) -> None:
        self.clock = Clock()
        self.pack = PackClock(self.clock)
        self.queue, self.size, self.step_s = queue, size, step_s
        self.load, self.evaluation, self.hint = (seconds.get(k, 0.0) for k in ("load", "evaluation", "hint"))
        self.tell = seconds.get("tell", 1.0)
        self.me = Presence(f"w{i}", "host", "cpu", i, 0.0)

    def run(self) -> Iterator[float]:
        """The times at which something happens."""
        now = 0.0
        while self.queue:
            shares = [self.queue.pop(0) for _ in range(min(self.size, len(self.queue)))]
            self.me.trials = list(range(len(shares)))
            self.pack.claimed(len(shares))
            now += self.load
            yield now
            samples = round(TOTAL * (1 - max(shares)))
            for _ in shares:
                self.pack.begun(samples, TOTAL)
            self.pack.evaluation_takes(self.hint)
            while samples < TOTAL:
                now += self.step_s(len(shares))
                yield now
                samples += STEP
                self.pack.moved(samples)
            now += self.evaluation
            for _ in shares:
                now += self.tell
                yield now
                self.pack.ended()
            self.pack.over()
            self.load = min(self.load, 1.0)  # the model stays
            self.me.trials = []

    def presence(self, now: float) -> Presence:
        """What it says at a moment."""
        self.clock.now = now
        return dataclasses.replace(self.me, pack=self.pack.trials, left=self.pack.left, whole=self.pack.whole)


def simulate(workers: list[Simulated], queue: list[float]) -> list[tuple[float, float | None]]:
    """(time, time left as told) at every event; the last time is the end."""
    runs = [worker.run() for worker in workers]
    events: list[Event] = [(next(run), i) for i, run in enumerate(runs)]
    heapq.heapify(events)
    told = []
    while events:
        now, i = heapq.heappop(events)
        told.append((now, seconds_left([w.presence(now) for w in workers], queue)))
        workers[i].clock.now = now
        if (following := next(runs[i], None)) is not None:
            heapq.heappush(events, (following, i))
    return told


def check(told: list[tuple[float, float | None]], tolerance: float = 0.2) -> None:
    end = told[-1][0]
    for now, left in told:
        if 0.1 * end <= now <= 0.98 * end:
            assert left is not None, now
            assert abs(left - (end - now)) <= tolerance * max(end - now, 0.02 * end), (now, end, left)


def one(step_s: float) -> Callable[[int], float]:
    return lambda trials: step_s


STUDIES: dict[str, tuple[int, list[float], int, Callable[[int], float], dict[str, float]]] = {
    "one pack": (1, [1.0] * 8, 8, one(2.0), {}),
    "a pack that was resumed": (1, [0.5] * 8, 8, one(2.0), {}),
    "three packs": (1, [1.0] * 24, 8, one(2.0), {}),
    "loading and evaluation": (1, [1.0] * 24, 8, one(2.0), {"load": 8, "evaluation": 15, "hint": 150}),
    "pictures that take long": (1, [1.0] * 16, 8, one(2.0), {"evaluation": 5, "hint": 50, "tell": 2}),
    "an evaluation as long as training": (1, [1.0] * 8, 8, one(2.0), {"evaluation": 100, "hint": 1000}),
    "a short last pack": (1, [1.0] * 20, 8, lambda n: 1.0 + n / 8, {}),
    "two workers": (2, [1.0] * 32, 8, one(2.0), {"load": 3}),
    "three workers, packs of one": (3, [1.0] * 30, 1, one(0.5), {}),
    "workers, some trials resumed": (2, [0.4] * 8 + [1.0] * 24, 8, one(2.0), {}),
}


@pytest.mark.parametrize("name", STUDIES)
def test_time_left_is_right_within_a_fifth(name: str) -> None:
    n, queue, size, step_s, seconds = STUDIES[name]
    workers = [Simulated(i, queue, size, step_s, **seconds) for i in range(n)]
    check(simulate(workers, queue))


def test_a_pack_of_a_hundred_seconds() -> None:
    queue = [1.0] * 4
    told = dict(simulate([Simulated(0, queue, 4, one(2.0))], queue))
    assert max(told) == 100 + 4
    assert {now: told[now] for now in (10.0, 26.0, 50.0, 90.0, 100.0)} == pytest.approx(
        {10.0: 94, 26.0: 78, 50.0: 54, 90.0: 14, 100.0: 4}, abs=2.5
    )


def test_an_evaluation_that_takes_longer_than_expected_counts_for_the_packs_to_come() -> None:
    clock = Clock()
    pack = PackClock(clock)
    pack.claimed(8)
    pack.begun(0, TOTAL)
    pack.evaluation_takes(50)  # five seconds
    for samples in range(STEP, TOTAL + 1, STEP):
        clock.now += 2.0
        pack.moved(samples)
    assert (pack.left, pack.whole) == (5 + 8, 100 + 5 + 8)
    clock.now += 30
    assert (pack.left, pack.whole) == (8, 100 + 30 + 8)


def test_a_pack_that_becomes_faster_is_seen_soon() -> None:
    clock = Clock()
    pack = PackClock(clock)
    pack.claimed(8)
    pack.begun(0, TOTAL)
    for samples in range(STEP, TOTAL + 1, STEP):
        clock.now += 2.0 if samples <= 300 else 0.5  # members that were stopped have left
        pack.moved(samples)
        if 0 < TOTAL - samples <= 300:
            assert pack.left == pytest.approx((TOTAL - samples) / STEP * 0.5 + 8, rel=0.2)  # eight are to be told


def test_nobody_knows_before_the_first_progress() -> None:
    pack = PackClock(Clock())
    assert pack.left is None
    pack.claimed(2)
    pack.begun(0, TOTAL)
    assert pack.left is pack.whole is None
    assert seconds_left([Presence("w", "h", "cpu", 1, 0.0, trials=[1])], [1.0]) is None
    assert seconds_left([], [1.0]) is None


def status(rows: list[TrialRow], workers: list[Presence], **fields: Any) -> Status:
    return Status(grid_spec(12, **fields), rows, workers, False, dt.datetime(2026, 1, 1), lambda *words: "")


def row(number: int, state: str, **fields: Any) -> TrialRow:
    values = {f.name: None for f in dataclasses.fields(TrialRow)}
    return TrialRow(**{**values, "number": number, "trial_id": number, "state": state, "attributes": {}, **fields})


def test_status_counts_what_waits_and_what_dead_workers_have() -> None:
    worker = Presence("w", "h", "cpu", 1, 0.0, trials=[0, 1], total=1000, pack=2, left=30.0, whole=100.0)
    running = [row(0, "RUNNING"), row(1, "RUNNING")]
    assert status(running, [worker]).eta_s == 30
    assert status(running, [dataclasses.replace(worker, age=10.0)]).eta_s == 20
    more = [*running, row(2, "WAITING"), row(3, "RUNNING", step=500)]  # half done by a worker that is gone
    assert status(more, [worker]).eta_s == 130
    killed = dataclasses.replace(worker, age=12.0, left=3.0)  # it was to end nine seconds ago
    assert status(running, [killed]).eta_s is None
    over = [row(4, "COMPLETE", start=dt.datetime(2025, 12, 31, 23), complete=dt.datetime(2026, 1, 1))]
    assert status([*running, *over], [killed]).eta_s == pytest.approx(2 * 3600)
    assert status([row(2, "COMPLETE")], [worker]).eta_s == 0
    space = {"lr": {"low": 1e-4, "high": 1e-2}}
    tpe = {"space": space, "sampler": {"type": "tpe", "n_startup_trials": 2}, "max_trials": 12}
    assert status([*running, row(2, "WAITING"), row(3, "WAITING")], [worker], **tpe).eta_s == 30 + 2 * 75
