"""Workers whose training is pretended."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _stores import grid_spec

from saeopt.config.study import StudySpec
from saeopt.training.plan import Observer, TrialPlan, TrialResult
from saeopt.trials.create import create_study
from saeopt.trials.storage import Store
from saeopt.workers.loop import Options, Worker
from saeopt.workers.watcher import Watcher

HOOK = "blocks.1.hook_resid_pre"
TOTAL = 64


class OutOfMemoryError(RuntimeError):
    """What torch raises bears this name."""


Measure = Callable[[TrialPlan, int], dict[str, float]]


def good(plan: TrialPlan, samples: int) -> dict[str, float]:
    return {"l0": 20.0, "fvu": 0.2}


class Trainer:
    """Pretends to train; remembers the packs."""

    def __init__(
        self,
        measure: Measure = good,
        before: Callable[[list[str]], None] = lambda names: None,
        evaluates: bool = False,
    ) -> None:
        self.measure, self.before, self.evaluates = measure, before, evaluates
        self.after_step: Callable[[], object] = lambda: None
        self.packs: list[list[str]] = []

    def __call__(self, plans: Sequence[TrialPlan], observer: Observer) -> dict[str, TrialResult]:
        self.packs.append([p.name for p in plans])
        self.before(self.packs[-1])
        results: dict[str, TrialResult] = {}
        for plan in plans:
            observer.on_start(plan.name, 0, TOTAL)
        for samples in range(4, TOTAL + 1, 4):
            if observer.should_interrupt():
                break
            for plan in plans:
                if plan.name not in results:
                    reason = observer.on_log(plan.name, samples, {HOOK: self.measure(plan, samples)})
                    time.sleep(0.01)
                    if reason:
                        results[plan.name] = TrialResult("stopped", samples, reason)
            observer.progress(samples, TOTAL, 1000.0)
            self.after_step()
            if self.evaluates and samples % 8 == 0:
                self._evaluate([p for p in plans if p.name not in results], samples, observer, results)
        for plan in plans:
            if plan.name not in results:
                done = samples >= TOTAL
                evaluation = {HOOK: self.measure(plan, samples)} if done else {}
                results[plan.name] = TrialResult("finished" if done else "interrupted", samples, None, evaluation)
        return results

    def _evaluate(
        self, plans: Sequence[TrialPlan], samples: int, observer: Observer, results: dict[str, TrialResult]
    ) -> None:
        found = {plan.name: {HOOK: self.measure(plan, samples)} for plan in plans}
        reasons = {name: observer.on_eval(name, samples, metrics) for name, metrics in found.items()}
        for name, reason in {**reasons, **observer.on_evaluated(samples)}.items():
            if reason and name in found:
                results[name] = TrialResult("stopped", samples, reason, found[name])


class Resuming(Trainer):
    """Goes on from its checkpoints, notes every sample that it trains, and is killed at one."""

    def __init__(self, dies_at: int | None = None, every: int = 16) -> None:
        super().__init__()
        self.dies_at, self.every = dies_at, every

    def __call__(self, plans: Sequence[TrialPlan], observer: Observer) -> dict[str, TrialResult]:
        at = {plan.name: plan.run_dir / "at" for plan in plans}
        begin = min(int(path.read_text()) if path.exists() else 0 for path in at.values())
        for plan in plans:
            plan.run_dir.mkdir(parents=True, exist_ok=True)
            observer.on_start(plan.name, begin, TOTAL)
        for samples in range(begin + 4, TOTAL + 1, 4):
            for plan in plans:
                with (plan.run_dir / "trained").open("a") as file:
                    file.write("4\n")
                observer.on_log(plan.name, samples, {HOOK: good(plan, samples)})
                if samples % self.every == 0:
                    at[plan.name].write_text(str(samples))
                    observer.on_checkpoint(plan.name, samples, at[plan.name])
            if samples == self.dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            assert isinstance(observer, Watcher)
            observer.reports.flush(30.0)  # a real step takes longer than what is sent
        return {p.name: TrialResult("finished", TOTAL, None, {HOOK: good(p, TOTAL)}) for p in plans}


def work_until_killed(address: str, spec: str, dies_at: int) -> None:
    """A process of its own: a worker whose training is killed, and itself with it."""
    start(Store.open(address), StudySpec.from_json(spec), Resuming(dies_at), pack=2).run()


def start(store: Store, spec: StudySpec, trainer: Trainer, pack: int = 4, **options: Any) -> Worker:
    create_study(store, spec)
    settings = Options(poll=0.05, **options)
    return Worker(store, spec.name, settings, trainer, lambda space: pack, threading.Event())


def run_in_step(store: Store, spec: StudySpec, measure: Measure) -> None:
    """One trial after another, each step after the verdict on the one before: verdicts come from a thread."""
    trainer = Trainer()
    worker = start(store, spec, trainer, pack=1)

    def after_reports(plan: TrialPlan, samples: int) -> dict[str, float]:
        worker.reports.flush(30.0)
        return measure(plan, samples)

    trainer.measure = after_reports
    worker.run()


def spec_in(folder: Path, n: int = 6, **fields: Any) -> StudySpec:
    return grid_spec(n, output_dir=str(folder / "out"), heartbeat=0.2, grace=1.0, **fields)


def states(store: Store) -> list[str]:
    return [t.state.name for t in store.study("s").trials]


def run_together(workers: Sequence[Worker]) -> None:
    """All of them at once, each in a thread, until they have ended."""
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
