"""What a worker does: claim a pack, train it, store each result; lose nothing whatever breaks."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from saeopt.config.run import RunConfig
from saeopt.console import log
from saeopt.errors import HostError, UserError, WorkerFault
from saeopt.host.pulse import listen
from saeopt.search.objectives import objective_names
from saeopt.search.space import Space
from saeopt.training.plan import Observer, TrialPlan, TrialResult
from saeopt.trials import budget, claims, endings
from saeopt.trials import internals as db
from saeopt.trials.allowed import check_allowed
from saeopt.trials.growth import Growth
from saeopt.trials.heart import Heart
from saeopt.trials.packing import Assignment, Refused, acquire, room
from saeopt.trials.paused import Ending
from saeopt.trials.presence import Presence
from saeopt.trials.refine import Refinement
from saeopt.trials.reports import Progress, Reports
from saeopt.trials.rungs import Rung
from saeopt.trials.storage import Store, StudyGone, is_transient, patience, persistently
from saeopt.views import monitoring
from saeopt.workers.faults import (  # fmt: skip
    Failure,
    TrainingDied,
    TrainingLeft,
    TrainingStalled,
    failure_of,
    free_memory,
)
from saeopt.workers.folder import same_start, start_of
from saeopt.workers.outcomes import Outcomes
from saeopt.workers.trial_log import trial_logs
from saeopt.workers.watcher import Watcher

__all__ = ["Options", "Worker", "start_of"]

LEAVE_SECONDS = 9.0
"""A scheduler kills ten seconds after its signal: what has not been given back by then is given back at once."""
_HOST_PAUSE = 30.0
"""After a fault of the host: a disk may have room again."""

Trainer = Callable[[Sequence[TrialPlan], Observer], dict[str, TrialResult]]
Limit = Callable[[Space], int]
Probe = Callable[[RunConfig, bool, Observer], None]
"""Raises what would keep a trial like this one from being trained here; its architecture may be left out."""


@dataclass(frozen=True)
class Options:
    """How a worker works."""

    device: str = "cpu"
    max_trials: int | None = None
    idle_timeout: float = 0.0
    """Seconds without a waiting or running trial after which the worker ends."""
    poll: float = 1.0
    sequential: bool = False
    """One trial at a time; the first error is raised."""
    auto: bool = False
    """The size of packs is the worker's to choose."""


class Worker:
    """One device's worker. `train` trains plans together; `limit` says how many fit (asked once)."""

    def __init__(
        self,
        store: Store,
        name: str,
        options: Options,
        train: Trainer,
        limit: Limit,
        interrupted: threading.Event,
        probe: Probe = lambda config, architecture, observer: None,
    ) -> None:
        self.store, self.options, self.train, self.interrupted = store, options, train, interrupted
        what = "reading the study"
        self.study_id = persistently(partial(store.study_id, name), what)
        self.identity = persistently(partial(store.identity, self.study_id), what)  # before the spec it is checked with
        self.spec = persistently(partial(store.spec, name), what)
        check_allowed(self.spec)
        self.space = Space(self.spec)
        host, pid = socket.gethostname(), os.getpid()
        label = f"{host}/{pid}/{options.device}"
        self.me = Presence(label, host, options.device, pid, time.time())
        self.heart = Heart(store, self.study_id, self.spec, self.me, self.identity)
        self.reports = Reports(store, self.study_id, self.spec, self.heart.settle)
        self.outcomes = Outcomes(store, self.study_id, self.spec, self.heart, self.leaving)
        self._refinement = Refinement(store, self.study_id, self.space, self.identity)
        self._growth = Growth(store, self.study_id, self.spec, self.identity)
        self._ending = Ending(store, self.study_id, self.spec, self.identity)
        self.rung = Rung(store, self.study_id, self.spec) if self.spec.early_stopping.type == "halving" else None
        self._ask_limit, self._probe = limit, probe
        self._limit: int | None = None
        self._over: str | None = None
        self._ended = threading.Event()
        listen(self.heart.pulse)

    def run(self) -> int:
        """Until the study is done, `max_trials` have ended, or a signal comes; returns how many trials it has ended.

        Raises:
            WorkerFault: nothing can be trained here, and it is not the trials' fault.
        """
        self.heart.start()
        self.reports.start()
        guard = threading.Thread(target=self._leave_in_time, name="saeopt-leave", daemon=True)
        guard.start()
        try:
            self._loop()
        except StudyGone:
            self.heart.study_gone.set()
        except Exception as error:
            if is_transient(error):
                reason = failure_of(error).reason
                raise WorkerFault(f"the store {self.store.shown} could not be reached: {reason}") from error
            raise
        finally:
            for claim in self.heart.held():  # something unforeseen: the next worker goes on
                self.outcomes.give_back(claim)
            self.reports.stop()
            self.heart.stop()
            self._ended.set()
        if self.heart.study_gone.is_set():
            log.warning("study %s was deleted, or made again as another one: this worker ends", self.spec.name)
        ended = self.me.finished
        log.info("this worker ended %d trial%s of study %s", ended, "s"[: ended != 1], self.spec.name)
        return ended

    # ---- the queue
    def _loop(self) -> None:
        idle_since: float | None = None
        self._check_host()
        while not (self.interrupted.is_set() or self.heart.study_gone.is_set()):
            persistently(self._refinement.step, "refining")
            persistently(self._growth.step, "measuring the front")
            room = self._room()
            if room == 0:
                return
            pack = self._acquire(room)
            if pack:
                idle_since = None
                self._train_pack(pack)
                self.outcomes.draw_paused()
                monitoring.on_study_progress(self.store, self.study_id, self.spec, identity=self.identity)
                continue
            if self._others_work():
                idle_since = None
            elif not self.heart.study_stopped.is_set() and persistently(partial(self._ending.step, room), "the end"):
                continue  # what has ended now may be followed by a refinement
            else:
                idle_since = idle_since or time.monotonic()
                if time.monotonic() - idle_since >= self.options.idle_timeout:
                    monitoring.on_study_progress(
                        self.store, self.study_id, self.spec, force=True, identity=self.identity
                    )
                    return
            self.interrupted.wait(self.options.poll * random.uniform(0.5, 1.0))

    def _acquire(self, room: int) -> list[Assignment]:
        try:
            return acquire(self.heart, self.space, room, self._owner(), start_of, self._most)
        except Refused as error:
            self.outcomes.fault(str(error), [error.number], host=True)
        except HostError as error:
            self._host_fault(str(error), [])
        return []

    def _check_host(self) -> None:
        """Before anything is claimed: what would keep every trial from being trained here is this worker's fault."""
        try:
            config = self._example()
        except UserError as error:
            raise self.outcomes.worker_fault(str(error)) from None
        architecture = not self.space.varies("saes.sae_type")
        try:
            self._check(config, architecture)
        except TrainingDied as error:
            log.warning("the probe of the architecture: %s", error)
            self._check(config, False)

    def _check(self, config: RunConfig, architecture: bool) -> None:
        try:
            self._probe(config, architecture, self._watcher([]))
        except (TrainingLeft, StudyGone):
            return
        except TrainingDied as error:
            if architecture:
                raise
            raise self.outcomes.worker_fault(str(error)) from None
        except Exception as error:
            failure = failure_of(error)
            if failure.kind != "host" and self.space.fixes_stream:  # other trials have other data, another model
                log.warning("the probe: %s", failure.reason)
                return
            log.debug("%s", failure.text)
            raise self.outcomes.worker_fault(failure.reason) from None

    def _example(self) -> RunConfig:
        """A config that was valid when the study was made; :class:`UserError` where this version does not know it."""
        if self.spec.sampler.type == "grid":
            first = persistently(lambda: claims.first_params(self.store, self.study_id), "reading the first trial")
            return self.space.config(first)
        self.space.corners()
        return self.space.middle().config

    def _host_fault(self, reason: str, trials: Sequence[int]) -> None:
        log.error("not the trials' fault, they are back in the queue: %s", reason)
        self.outcomes.fault(reason, trials, host=True)
        self.interrupted.wait(_HOST_PAUSE)
        if not self.leaving():
            self._check_host()

    def _room(self) -> int:
        """How many trials to claim next."""
        if self._limit is None:
            self._limit = 1 if self.options.sequential else max(1, self._ask_limit(self.space))
        where, most = (self.store, self.study_id, self.spec), self._most
        return persistently(lambda: room(*where, most, auto=self.options.auto), "counting trials")

    @property
    def _most(self) -> int:
        """How many trials this worker may have together."""
        limit = self._limit or 1
        left = limit if self.options.max_trials is None else self.options.max_trials - self.me.finished
        return max(0, min(limit, left))

    def _others_work(self) -> bool:
        """Whether a trial of the study runs, or waits and may be begun (a stopped study waits for nobody)."""
        if self.heart.study_stopped.is_set():
            return False
        now, over = persistently(self._standing, "counting trials")
        if over is not None and over != self._over:
            log.info("study %s: %s", self.spec.name, over)
        self._over = over
        return now["RUNNING"] + (now["WAITING"] if over is None else 0) > 0

    def _standing(self) -> tuple[dict[str, int], str | None]:
        with self.store.read() as connection:
            over = budget.why_over(connection, self.study_id, self.spec)
            return db.counts(connection, self.study_id), over

    def _owner(self) -> dict[str, Any]:
        return {"worker": self.me.worker, "host": self.me.host, "device": self.me.device, "pid": self.me.pid}

    # ---- a pack
    def _watcher(self, pack: Sequence[Assignment]) -> Observer:
        return Watcher(self.heart, self.reports, self.outcomes, self.leaving, pack, self.rung, self._most)

    def _train_pack(self, pack: list[Assignment]) -> None:
        """Train together; what fails together is tried apart, so that one trial's fault is no other's."""
        if self.leaving():
            for assignment in pack:
                self.outcomes.give_back(assignment.claim)
            return
        pack = self._judged(pack)
        if not pack:
            return
        with trial_logs(a.run_dir for a in pack):
            numbers, start = ", ".join(a.name for a in pack), pack[0].start
            log.info(
                "study %s: training trial%s %s%s on %s", self.spec.name, "s"[: len(pack) != 1], numbers,
                f" from sample {start:,}" if start else "", self.me.worker,
            )  # fmt: skip
            self._train_together(pack)

    def _judged(self, pack: list[Assignment]) -> list[Assignment]:
        """Without those that others had passed at the rung where they stand, when their worker was lost."""
        rung, start = self.rung, pack[0].start
        asked = [a.claim for a in pack if start and a.claim.stood != start]
        if rung is None or not asked:
            return pack
        total = pack[0].config.data.n_train_samples or 0
        reasons = persistently(lambda: rung.judge(asked, start, total), "judging trials")
        values = {s.number: s.values for s in rung.standings(start)} if reasons else {}
        n = len(objective_names(self.spec))
        for a in pack:
            if reason := reasons.get(a.claim.number):
                came_to = values.get(a.claim.number)
                self.outcomes.pause(a, TrialResult("paused", start, reason), came_to and came_to[:n])
        return [a for a in pack if a.claim.number not in reasons]

    def _train_together(self, pack: list[Assignment]) -> None:
        try:
            results = self._train(pack)
        except TrainingLeft:
            self.outcomes.give_all_back(pack)
            return
        except TrainingDied as error:
            self._after_death(pack, str(error))
            return
        except TrainingStalled as error:
            self.outcomes.stalled(pack, str(error))
            return
        except Exception as error:
            self._after_error(pack, error)
            return
        for assignment in self.outcomes.pending(pack):
            self.outcomes.store_safely(assignment, results[assignment.name])

    def _train(self, pack: list[Assignment]) -> dict[str, TrialResult]:
        self.me.latest = {}
        self.outcomes.begin({a.name: Progress(a.claim, a.config) for a in pack})
        plans = [TrialPlan(a.name, a.config, a.run_dir, resume=a.start > 0, owner=a.owner) for a in pack]
        for a in pack:
            monitoring.on_trial_start(
                self.store, self.study_id, a.claim.trial_id, self.spec, self.me.worker, claim=a.claim
            )
        self.heart.training(len(pack))
        try:
            return self.train(plans, self._watcher(pack))
        finally:
            self.heart.training(0)
            self.reports.book()
            self.reports.flush(3.0 if self.leaving() else patience())

    def _after_error(self, pack: list[Assignment], error: Exception) -> None:
        failure = failure_of(error)
        if self.options.sequential:
            self.outcomes.give_all_back(pack)
            raise error
        error.__traceback__ = None  # its frames hold the pack's tensors
        free_memory()
        together = len(pack) > 1
        pack = self.outcomes.pending(pack)
        if not pack:
            log.error("%s, after all trials of the pack had ended", failure.reason)
        elif failure.kind == "host":
            self.outcomes.give_all_back(pack, failure.reason)
            self._host_fault(failure.reason, [a.claim.number for a in pack])
        elif together:
            self._apart(pack, failure)
        else:
            self.outcomes.fail(pack[0], failure)

    def _apart(self, pack: list[Assignment], failure: Failure) -> None:
        """What fails together is tried in parts."""
        exhausted = failure.kind == "memory"
        half = (len(pack) + 1) // 2 if exhausted else 1
        if exhausted:
            self._limit = half
            log.warning("out of memory with %d trials together: going on with %d", len(pack), half)
        else:
            log.warning("%s: training these %d trials one by one", failure.reason, len(pack))
        again = [self._again(a) for a in pack]
        for i in range(0, len(pack), half):
            for part in same_start(again[i : i + half]):
                self._train_pack(part)

    def _after_death(self, pack: list[Assignment], reason: str) -> None:
        """The training process ended by itself: counted where a fresh one shows that this host can train."""
        pack = self.outcomes.pending(pack)
        if self.leaving():
            self.outcomes.give_all_back(pack)
            return
        log.error("%s: trials %s", reason, ", ".join(a.name for a in pack))
        try:
            self._check_host()
        except WorkerFault:
            self.outcomes.give_all_back(pack, reason)
            raise
        self.outcomes.died(pack, reason)

    def _again(self, assignment: Assignment) -> Assignment:
        start = start_of(assignment.run_dir, assignment.config)
        assignment.owner.take(assignment.run_dir)
        return replace(assignment, start=start)

    # ---- leaving
    def leaving(self) -> bool:
        """Whether it gives its trials back and ends."""
        heart = self.heart
        why = (self.interrupted, heart.study_stopped, heart.study_gone, heart.budget_spent)
        return any(event.is_set() for event in why)

    def _leave_in_time(self) -> None:
        """After a signal: whatever hangs, the trials are given back and the process ends within ten seconds."""
        self.interrupted.wait()
        if self._ended.wait(LEAVE_SECONDS - 1.0):
            return
        last = threading.Timer(1.0, os._exit, [1])
        last.daemon = True
        last.start()
        for claim in self.heart.held():
            endings.release(self.store, claim)
        os._exit(0)
