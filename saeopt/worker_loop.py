"""What a worker does: claim a pack, train it, tell each trial; lose nothing whatever breaks."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import random
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from saeopt.config import RunConfig, load_run_config
from saeopt.console import log
from saeopt.errors import UserError
from saeopt.files import read_error
from saeopt.search import claims, monitoring
from saeopt.search.attributes import REASON, evaluation_attributes
from saeopt.search.claims import Claim
from saeopt.search.heart import Heart
from saeopt.search.objectives import objective_values, violations
from saeopt.search.packing import Assignment, acquire
from saeopt.search.presence import Presence
from saeopt.search.reports import Progress, Reports
from saeopt.search.space import Space
from saeopt.search.storage import Store, persistently
from saeopt.search.trial_log import trial_logs
from saeopt.training.launch import EXHAUSTED, MAY_DIFFER
from saeopt.training.plan import LOST, Metrics, Observer, TrialPlan, TrialResult
from saeopt.training.run_folder import RunFolder, resume_point

LEAVE_SECONDS = 9.0
"""A scheduler kills ten seconds after its signal: what has not been given back by then is given back at once."""
_FULL_DISK_PAUSE = 30.0

Trainer = Callable[[Sequence[TrialPlan], Observer], dict[str, TrialResult]]
Limit = Callable[[Space], int]


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


class Worker:
    """One device's worker. `train` trains plans together; `limit` says how many fit (asked once)."""

    def __init__(
        self, store: Store, name: str, options: Options, train: Trainer, limit: Limit, interrupted: threading.Event
    ) -> None:
        self.store, self.options, self.train, self.interrupted = store, options, train, interrupted
        self.spec, self.study_id = store.spec(name), store.study_id(name)
        self.space = Space(self.spec)
        host, pid = socket.gethostname(), os.getpid()
        label = f"{host}/{pid}/{options.device}"
        self.me = Presence(label, host, options.device, pid, time.time())
        self.heart = Heart(store, self.study_id, self.spec, self.me)
        self.reports = Reports(store, self.study_id, self.spec)
        self._ask_limit = limit
        self._limit: int | None = None
        self._ended = threading.Event()
        self._progress: dict[str, Progress] = {}
        self._results: dict[str, TrialResult] = {}

    def run(self) -> int:
        """Until the study is done, `max_trials` are told, or a signal comes; returns the number of trials told."""
        self.heart.start()
        self.reports.start()
        guard = threading.Thread(target=self._leave_in_time, name="saeopt-leave", daemon=True)
        guard.start()
        try:
            self._loop()
        finally:
            for claim in self.heart.held():  # something unforeseen: the next worker goes on
                self._give_back(claim, None)
            self.reports.stop()
            self.heart.stop()
            self._ended.set()
        log.info(
            "this worker told %d trial%s of study %s", self.me.finished, "s"[: self.me.finished != 1], self.spec.name
        )
        return self.me.finished

    # ---- the queue
    def _loop(self) -> None:
        idle_since: float | None = None
        while not self.interrupted.is_set():
            room = self._room()
            if room == 0:
                return
            pack = acquire(self.heart, self.space, room, self._owner(), start_of)
            if pack:
                idle_since = None
                self._train_pack(pack)
                monitoring.on_study_progress(self.store, self.study_id, self.spec)
                continue
            if self._others_work():
                idle_since = None
            else:
                idle_since = idle_since or time.monotonic()
                if time.monotonic() - idle_since >= self.options.idle_timeout:
                    monitoring.on_study_progress(self.store, self.study_id, self.spec, force=True)
                    return
            self.interrupted.wait(self.options.poll * random.uniform(0.5, 1.0))

    def _room(self) -> int:
        """How many trials to claim next."""
        if self._limit is None:
            self._limit = 1 if self.options.sequential else max(1, self._ask_limit(self.space))
        if self.options.max_trials is None:
            return self._limit
        return min(self._limit, max(0, self.options.max_trials - self.me.finished))

    def _others_work(self) -> bool:
        """Whether a trial of the study is waiting or running (a stopped study waits for nobody)."""
        if self.heart.study_stopped.is_set():
            return False
        now = persistently(lambda: claims.counts(self.store, self.study_id), "counting trials")
        return now["WAITING"] + now["RUNNING"] > 0

    def _owner(self) -> dict[str, Any]:
        return {"worker": self.me.worker, "host": self.me.host, "device": self.me.device, "pid": self.me.pid}

    # ---- a pack
    def _train_pack(self, pack: list[Assignment]) -> None:
        """Train together; what fails together is tried apart, so that one trial's fault is no other's."""
        if self._leaving():
            for assignment in pack:
                self._give_back(assignment.claim, None)
            return
        numbers = ", ".join(a.name for a in pack)
        log.info("study %s: training trial%s %s", self.spec.name, "s"[: len(pack) != 1], numbers)
        try:
            with trial_logs(a.run_dir for a in pack):
                results = self._train(pack)
        except Exception as error:
            self._after_error(pack, error)
            return
        for assignment in pack:
            try:
                self._tell(assignment, results[assignment.name])
            except Exception as error:  # a result that cannot be stored is that trial's failure, not the worker's
                self._after_error([assignment], error)

    def _train(self, pack: list[Assignment]) -> dict[str, TrialResult]:
        self._results = {}
        by_name = self._progress = {a.name: Progress(a.claim, a.config) for a in pack}
        plans = [TrialPlan(a.name, a.config, a.run_dir, resume=a.start > 0) for a in pack]
        for a in pack:
            monitoring.on_trial_start(self.store, self.study_id, a.claim.trial_id, self.spec, self.me.worker)
        try:
            results = self.train(plans, _Watcher(self, by_name))
            self._results = {}
            return results
        finally:
            self.reports.flush(3.0 if self._leaving() else 900.0)

    def _after_error(self, pack: list[Assignment], error: Exception) -> None:
        text = "".join(traceback.format_exception(error))
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        exhausted = is_out_of_memory(error)
        if self.options.sequential:
            for assignment in pack:
                self._give_back(assignment.claim, None)
            raise error
        error.__traceback__ = None  # its frames hold the pack's tensors
        free_memory()
        together = len(pack) > 1
        pack = self._tell_ended(pack)
        if not pack:
            log.error("%s, after all trials of the pack had ended", reason)
            return
        if together:
            half = (len(pack) + 1) // 2 if exhausted else 1
            if exhausted:
                self._limit = half
                log.warning("out of memory with %d trials together: going on with %d", len(pack), half)
            else:
                log.warning("%s: training these %d trials one by one", reason, len(pack))
            again = [self._again(a) for a in pack]
            for i in range(0, len(pack), half):
                for part in same_start(again[i : i + half]):
                    self._train_pack(part)
            return
        claim = pack[0].claim
        self.heart.closing(claim)
        where = persistently(
            lambda: claims.fail(self.store, claim, reason, text, self.spec.retries), "telling a failure"
        )
        self.heart.drop(claim)
        self.me.finished += where == "failed"
        log.error("trial %d failed (%s): %s", claim.number, "tried again" if where == "waiting" else "for good", reason)
        if disk_is_full(error):
            self.interrupted.wait(_FULL_DISK_PAUSE)  # else a full disk uses up the retries of a whole study

    def _tell_ended(self, pack: list[Assignment]) -> list[Assignment]:
        """Tell the trials that had ended before their pack failed; gives the others."""
        ended = {a.name: result for a in pack if (result := self._results.pop(a.name, None)) is not None}
        for assignment in pack:
            if assignment.name in ended:
                self._tell(assignment, ended[assignment.name])
        return [a for a in pack if a.name not in ended]

    def _again(self, assignment: Assignment) -> Assignment:
        start = start_of(assignment.run_dir, assignment.config)
        return Assignment(assignment.claim, assignment.config, assignment.run_dir, start)

    # ---- the end of a trial
    def _tell(self, assignment: Assignment, result: TrialResult) -> None:
        claim, spec = assignment.claim, self.spec
        if result.status == "interrupted":
            self._give_back(claim, result.samples)
            return
        if self.heart.has_lost(claim):
            return
        values = objective_values(spec, result.evaluation) if result.status == "finished" else None
        reason = result.reason
        if result.status == "finished" and values is None:
            reason = f"no finite value of every objective in the evaluation ({reason or 'all hook points'})"
        attrs: dict[str, Any] = {**evaluation_attributes(result.evaluation), "samples": result.samples}
        if reason:
            attrs[REASON] = reason
        limits = self._constraints(result, reason, pruned=values is None)
        outcome = f"{'complete' if values is not None else 'stopped early'}{': ' + reason if reason else ''}"
        monitoring.on_trial_end(self.store, self.study_id, claim.trial_id, spec, outcome)
        state: Literal["COMPLETE", "PRUNED"] = "PRUNED" if values is None else "COMPLETE"
        self.heart.closing(claim)
        final = self._last_values(assignment) if values is None else values
        told = persistently(
            lambda: claims.finish(self.store, claim, state, final, constraints=limits, attrs=attrs),
            f"telling trial {claim.number}",
        )
        self.heart.drop(claim)
        self.me.finished += told
        if told:
            shown = "" if values is None else " (" + ", ".join(f"{v:.4g}" for v in values) + ")"
            log.info("trial %d: %s%s", claim.number, outcome, shown)

    def _last_values(self, assignment: Assignment) -> list[float] | None:
        """What a trial that was given up had reached, as Optuna keeps it for a single objective."""
        curve = self._progress[assignment.name].curve
        return curve[max(curve)] if curve and len(curve[max(curve)]) == 1 else None

    def _constraints(self, result: TrialResult, reason: str | None, *, pruned: bool) -> dict[str, float]:
        """What the sampler learns about a trial that collapsed or was given up: it is infeasible, by so much."""
        rule = self.spec.early_stopping.collapse
        found: dict[str, float] = {}
        if rule is not None and rule.constraint:
            found = violations(rule, result.evaluation) if not pruned else {"min_l0": 0.0, "max_fvu": 0.0}
        if not pruned:
            return found
        hopeless = result.status == "diverged" or (reason or "").startswith("collapsed")
        # Optuna's TPE cannot rank pruned trials by several objectives: hardly infeasible is how they get past it.
        return {**found, "stopped": 1.0 if hopeless else 1e-3} if found or len(self.spec.objectives) > 1 else found

    def _give_back(self, claim: Claim, samples: int | None) -> None:
        self.heart.closing(claim)
        patience = 5.0 if self._leaving() else 60.0
        try:
            persistently(lambda: claims.release(self.store, claim, samples), "giving a trial back", patience)
        except Exception as error:
            log.warning("trial %d could not be given back (%s); it will be reaped", claim.number, type(error).__name__)
        self.heart.drop(claim)

    # ---- leaving
    def _leaving(self) -> bool:
        return self.interrupted.is_set() or self.heart.study_stopped.is_set()

    def _leave_in_time(self) -> None:
        """After a signal: whatever hangs, the trials are given back and the process ends within ten seconds."""
        self.interrupted.wait()
        if self._ended.wait(LEAVE_SECONDS - 1.0):
            return
        last = threading.Timer(1.0, os._exit, [1])
        last.daemon = True
        last.start()
        for claim in self.heart.held():
            claims.release(self.store, claim)
        os._exit(0)


class _Watcher(Observer):
    """Passes on what a pack says."""

    def __init__(self, worker: Worker, by_name: dict[str, Progress]) -> None:
        self.worker, self.by_name = worker, by_name

    def on_start(self, name: str, samples: int, total: int) -> None:
        self.worker.reports.started(self.by_name[name], samples, total)

    def on_log(self, name: str, samples: int, metrics: Metrics) -> str | None:
        return self._measured(name, samples, metrics, evaluated=False)

    def on_eval(self, name: str, samples: int, metrics: Metrics) -> str | None:
        return self._measured(name, samples, metrics, evaluated=True)

    def _measured(self, name: str, samples: int, metrics: Metrics, *, evaluated: bool) -> str | None:
        progress = self.by_name[name]
        if self.worker.heart.has_lost(progress.claim):
            return LOST
        return self.worker.reports.measured(progress, samples, metrics, evaluated=evaluated)

    def on_checkpoint(self, name: str, samples: int, path: Path) -> None:
        self.worker.reports.checkpointed(self.by_name[name].claim, samples)

    def on_end(self, name: str, result: TrialResult) -> None:
        self.worker._results[name] = result

    def progress(self, samples: int, total: int, tokens_per_s: float) -> None:
        me = self.worker.me
        me.samples, me.total, me.tokens_per_s = samples, total, tokens_per_s

    def should_interrupt(self) -> bool:
        return self.worker._leaving()


def start_of(run_dir: Path, config: RunConfig) -> int:
    """Samples of the newest usable checkpoint of this config.

    A folder that holds a run of another config (an older study of the same name) is moved aside.
    """
    saved = RunFolder(run_dir).config_path
    try:
        saved.read_bytes()
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise read_error(saved, error) from error
    kept = set(config.model_dump()) - MAY_DIFFER
    try:
        before = load_run_config(saved).model_dump(mode="json", include=kept)
    except UserError:
        before = {}
    if before == config.model_dump(mode="json", include=kept):
        return resume_point(run_dir)
    aside = next(p for i in itertools.count(1) if not (p := run_dir.with_name(f"{run_dir.name}-old-{i}")).exists())
    log.warning("%s holds the run of another config: it is now %s", run_dir, aside.name)
    with suppress(FileNotFoundError):
        run_dir.rename(aside)
    return 0


def same_start(again: Sequence[Assignment]) -> list[list[Assignment]]:
    """Parts that can be trained together after some of them have written checkpoints."""
    parts: dict[int, list[Assignment]] = {}
    for assignment in again:
        parts.setdefault(assignment.start, []).append(assignment)
    return list(parts.values())


def disk_is_full(error: BaseException) -> bool:
    """Whether a write failed for want of room (files.py turns the system's error into a line for people)."""
    causes = (error, error.__cause__)
    return any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in causes)


def is_out_of_memory(error: BaseException) -> bool:
    """The device's memory or the host's."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in EXHAUSTED))
    )


def free_memory() -> None:
    """Give back what the failed pack held."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
