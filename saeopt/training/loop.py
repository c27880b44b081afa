"""The one training loop: it trains a pack, whoever asked for it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from saeopt.activations.source import Samples, Source
from saeopt.activations.stream import ActivationStream
from saeopt.console import log
from saeopt.errors import UserError
from saeopt.evaluation.conditions import Seen, conditions, with_conditions
from saeopt.files import LostRun, is_evaluation, write_json
from saeopt.host.pulse import pulse
from saeopt.runs.folder import RunFolder
from saeopt.runs.owner import Owner
from saeopt.training import checkpoint
from saeopt.training.cost import cost_of
from saeopt.training.environment import with_precision
from saeopt.training.loggers import open_sinks
from saeopt.training.measuring import measure
from saeopt.training.pack import Member, Pack
from saeopt.training.plan import Metrics, Observer, TrialPlan, TrialResult
from saeopt.training.runtime import Runtime
from saeopt.training.setup import (
    blank_members,
    calibrate,
    check_plans,
    check_schedules,
    evaluation_in_samples,
    measure_norm_limits,
    sites_of,
    total_samples,
)
from saeopt.training.thresholds import set_thresholds
from saeopt.training.trial import Trial, by_hook_point, named, scalars

_INTERRUPT_POLL = 10  # several ranks agree on an interrupt only every so many windows: agreeing synchronises …
_POLL_SECONDS = 1.0  # … but after so long in any case: a signal leaves ten seconds, however slow the windows are


def train_pack(
    plans: Sequence[TrialPlan], runtime: Runtime, observer: Observer | None = None
) -> dict[str, TrialResult]:
    """Train all plans on one activation stream; one result per plan's name.

    Raises:
        UserError: something in a config, the data or the disk that the user can mend.
        torch.OutOfMemoryError: the pack does not fit on the device.
    """
    config = check_plans(plans)
    resolved = [with_precision(plan, runtime.device.type) for plan in plans]
    plans = [plan for plan, _ in resolved]
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    model = runtime.language_model(config)
    sites = sites_of(plans, model)
    tokens = runtime.token_data(config, model)
    trials = [
        Trial(plan, RunFolder(plan.run_dir), blank_members(plan, sites[plan.name], model, runtime)) for plan in plans
    ]
    loop = _Loop(trials, model, tokens, runtime, observer or Observer())
    log.info("mixed_precision: %s", ", ".join(sorted({told for _, told in resolved})))
    try:
        return loop.run()
    finally:
        loop.close()


class _Loop:
    def __init__(
        self, trials: list[Trial], model: Source, tokens: Samples, runtime: Runtime, observer: Observer
    ) -> None:
        self.trials, self.model, self.tokens = trials, model, tokens
        self.runtime, self.ranks, self.observer = runtime, runtime.ranks, observer
        self.config = trials[0].plan.config
        self.total = total_samples(self.config, tokens, runtime.ranks.data.size)
        check_schedules([trial.plan for trial in trials], self.total)
        if not any(m.sae_config.retrain_saes for t in trials for m in t.members):
            self.total = 0
        self.window = self.config.effective_batch * runtime.ranks.data.size
        self.last_save: int | None = None
        self.identity = {"tokens": tokens.identity(), **model.identities()}
        self.samples, cursor, states = self._restore()
        self.start = self.samples
        learning = [m for t in trials for m in t.members if m.sae_config.retrain_saes]
        self.pack = Pack(learning, runtime, total_samples=self.total)
        for trial in trials:
            for member in trial.active:
                if state := states.get(trial.plan.name, {}).get(member.key):
                    self.pack.load_state(member, state)
        self.cursor: dict[str, Any] = cursor
        self.stream: ActivationStream | None = None
        self._next_poll, self._polled = 1, (0, time.perf_counter())
        self.rungs = self.ranks.agree(self.observer.rungs(self.total, self.window))

    # ---- start
    def _restore(self) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Weights from checkpoints or from calibration; the samples at which the whole pack starts."""
        restored, size = {}, self.ranks.data.size
        for trial in self.trials:
            if trial.plan.resume and (found := checkpoint.restore(trial.folder, trial.members, size, self.identity)):
                restored[trial.plan.name] = found
        starts = {found.samples for found in restored.values()}
        fresh = [t for t in self.trials if t.plan.name not in restored]
        if len(starts | ({0} if fresh else set())) > 1:
            raise ValueError("the trials of a pack must resume from the same sample")
        where = (self.model, self.tokens, self.config, self.runtime)
        calibrate([m for t in fresh for m in t.members], *where)
        measure_norm_limits([m for t in self.trials if t not in fresh for m in t.members], *where)
        first = next(iter(restored.values()), None)
        self.last_save = first.samples if first and not fresh else None
        for trial in self.trials:
            if found := restored.get(trial.plan.name):
                trial.ended = self.ranks.agree(
                    trial.ended_before(found, self.total, self._evaluates) if self.ranks.is_first else None
                )
        states = {name: found.states for name, found in restored.items()}
        return (first.samples, first.cursor, states) if first else (0, {}, {})

    @property
    def _evaluates(self) -> bool:
        return self.config.eval_every_n_samples is not None and self.config.data.n_eval_samples > 0

    def run(self) -> dict[str, TrialResult]:
        if self.samples < self.total and self.pack.groups:
            self.stream = ActivationStream(
                self.model, self.tokens, self.pack.hooks, self.config, rank=self.ranks.data.rank,
                world=self.ranks.data.size, start=self.samples, end=self.total, cursor=self.cursor,
            )  # fmt: skip
        for trial in self.trials:  # after the stream: a cache that cannot be made leaves no run folders
            with self._writing(trial):
                self._open(trial)
        if self._evaluates:
            members = [m for t in self.trials for m in t.members]
            self.observer.evaluation_takes(evaluation_in_samples(self.config, members, self.model.n_parameters))
        if self.stream is not None:
            self._train()
        for trial in self.trials:
            if trial.result is None:
                self._finish(trial)
        return {t.plan.name: t.result for t in self.trials if t.result is not None}

    def _open(self, trial: Trial) -> None:
        if self.ranks.is_first and trial.ended is None:
            if trial.plan.owner is None:
                trial.owner = Owner(turn=time.time_ns())
                trial.owner.take(trial.folder.path)
            trial.describe()
            trial.folder.rewind(self.samples)
            trial.written = trial.folder.rows_at(self.samples)
            trial.folder.write_status("running", self.samples, None)
            trial.sinks = open_sinks(trial.plan.config, trial.plan.run_dir, trial.plan.run_dir.name)
        self.observer.on_start(trial.plan.name, self.samples, self.total)
        if trial.ended is not None:
            self._close(trial, trial.ended)

    # ---- the loop
    def _train(self) -> None:
        assert self.stream is not None
        clock, since = time.perf_counter(), self.samples
        windows = 0
        while self.samples < self.total and self.pack.groups:
            after = self.samples + self.window
            self.pack.step(self.stream, after)
            before, self.samples, windows = self.samples, after, windows + 1
            pulse()
            self._part_with_lost()
            due = self._due(before)
            if due["log"]:
                measured = self.pack.metrics(self.samples)  # waits for the device: only now has the work been done
                rate = (self.samples - since) * self.config.data.context_length / (time.perf_counter() - clock)
                self._log(measured, rate)
            if due["eval"]:
                self._evaluate()
            if due["rung"]:
                self._rung(measured)
                self._next_poll = windows  # the ranks agree at once on whether the others are wanted elsewhere
            if due["save"]:
                self._save()
            if any(due.values()):
                clock, since = time.perf_counter(), self.samples
            if self._interrupted(windows):
                return

    def _due(self, before: int) -> dict[str, bool]:
        """What falls on this window: logging by steps, evaluation, rungs and checkpoints by samples."""
        config, last = self.config, self.samples >= self.total
        step = self.samples // self.window

        def crossed(every: int | None) -> bool:
            return bool(every) and not last and self.samples // int(every or 1) > before // int(every or 1)

        rung = not last and any(before < samples <= self.samples for samples in self.rungs.samples)
        return {
            "log": step % config.log_every_n_grad_steps == 0 or last or rung,
            "eval": crossed(config.eval_every_n_samples),
            "rung": rung,
            "save": crossed(config.save_every_n_samples),
        }

    def _part_with_lost(self) -> None:
        """What another worker trains now is dropped without a word in its folder."""
        for trial in self.trials:
            if trial.result is None and self.observer.lost(trial.plan.name):
                self._abandon(trial, "its claim was lost: another worker trains it")

    def _abandon(self, trial: Trial, reason: str) -> None:
        log.warning("%s: %s", trial.plan.name, reason)
        trial.result = TrialResult("lost", self.samples, reason)
        self._drop(trial.active, reason)
        trial.finish_sinks("interrupted")
        self.observer.on_end(trial.plan.name, trial.result)

    @contextmanager
    def _writing(self, trial: Trial) -> Iterator[None]:
        """Around all that is written for a trial: if another process has taken its folder over, the rest go on."""
        try:
            yield
        except LostRun as error:
            if self.ranks.data.size > 1:
                raise
            self._abandon(trial, str(error))

    def _interrupted(self, windows: int) -> bool:
        interrupted = self.observer.should_interrupt()
        if self.ranks.data.size > 1:
            if windows < self._next_poll:
                return False
            interrupted, self._next_poll = self.ranks.agree((interrupted, windows + self._pause(windows)))
        if not interrupted or self.samples >= self.total:
            return False
        self._save()
        for trial in self.trials:
            if trial.result is None:
                self._close(trial, TrialResult("interrupted", self.samples))
        return True

    def _pause(self, windows: int) -> int:
        """Windows until the ranks agree again: the fewer, the slower they are."""
        (windows_then, then), now = self._polled, time.perf_counter()
        self._polled = windows, now
        in_time = int(_POLL_SECONDS * (windows - windows_then) / max(now - then, 1e-9))
        return max(1, min(_INTERRUPT_POLL, self.config.log_every_n_grad_steps, in_time))

    def _log(self, measured: list[tuple[Member, dict[str, float]]], tokens_per_s: float) -> None:
        for trial in self.trials:
            if trial.result is not None:
                continue
            rows = [(m, values) for m, values in measured if m.trial == trial.plan.name]
            metrics = by_hook_point(rows)
            if not metrics:
                continue  # its SAEs are kept as they are
            for values in metrics.values():
                values["tokens_per_s"] = tokens_per_s
            self._write(trial, metrics)
            if trial.result is not None:
                continue
            if broken := [m for m, values in rows if not values["finite"]]:
                reason = f"NaN or Inf in loss or gradient before sample {self.samples}"
                log.warning("%s: %s at %s", trial.plan.name, reason, ", ".join(map(str, broken)))
                places = {m.hook_point for m in broken}  # no mean over the seeds that are left: it flatters
                self._drop([m for m in trial.active if m.hook_point in places], reason)
            if not trial.active:
                self._stop(trial, "diverged", trial.members[0].reason or "")
            elif reason := self.ranks.agree(self.observer.on_log(trial.plan.name, self.samples, metrics)):
                self._stop(trial, "stopped", reason)
        self.observer.progress(self.samples, self.total, tokens_per_s)

    def _evaluate(self) -> None:
        running = [t for t in self.trials if t.result is None]
        found = self._measure(running, aims=False)
        for trial in running:
            metrics = found.get(trial.plan.name, {})
            self._write(trial, named(metrics))
            if reason := self.ranks.agree(self.observer.on_eval(trial.plan.name, self.samples, metrics)):
                self._stop(trial, "stopped", reason, metrics)
        beaten = self.ranks.agree(self.observer.on_evaluated(self.samples)) if running else {}
        for trial in running:
            if trial.result is None and trial.plan.name in beaten:
                self._stop(trial, "stopped", beaten[trial.plan.name], found.get(trial.plan.name, {}))

    def _rung(self, measured: list[tuple[Member, dict[str, float]]]) -> None:
        """Everybody is compared and has a checkpoint here; those who are behind leave, and could go on from it."""
        running = [t for t in self.trials if t.result is None]
        found = {t.plan.name: by_hook_point((m, v) for m, v in measured if m.trial == t.plan.name) for t in running}
        if self.rungs.held_out:
            found = self._measure(running, self.rungs.held_out)
        behind = self.ranks.agree(self.observer.on_rung(self.samples, found)) if running else {}
        self._save()
        for trial in running:
            if trial.result is None and (reason := behind.get(trial.plan.name)):
                self._drop(trial.active, reason)
                self._close(trial, TrialResult("paused", self.samples, reason, found.get(trial.plan.name, {})))

    def _measure(self, trials: Sequence[Trial], at_most: int | None = None, aims: bool = True) -> dict[str, Metrics]:
        found = measure(trials, self.model, self.tokens, self.runtime, at_most) if self._evaluates else {}
        for trial in trials if aims else ():
            for hook, row in by_hook_point((m, self.pack.aimed(m, self.samples)) for m in trial.active).items():
                found.get(trial.plan.name, {}).get(hook, {}).update(row)
        return found

    # ---- writing
    def _write(self, trial: Trial, metrics: Metrics) -> None:
        if self.samples == self.start:  # a run that was killed between its last rows and its end
            metrics = {h: row for h, row in metrics.items() if (h, is_evaluation(row)) not in trial.written}
        if not self.ranks.is_first or not metrics:
            return
        with self._writing(trial):
            trial.folder.append_metrics(
                {"samples": self.samples, "hook_point": hook, **scalars(row)} for hook, row in metrics.items()
            )
            for sink in trial.sinks:
                sink.log(self.samples, {hook: scalars(row) for hook, row in metrics.items()})

    def _save(self) -> None:
        if self.last_save == self.samples:
            return
        if self.stream is not None:
            self.cursor = self.stream.cursor()
        for trial in self.trials:
            if trial.result is None:
                self._checkpoint(trial)
        self.last_save = self.samples

    def _checkpoint(self, trial: Trial, ended: TrialResult | None = None) -> None:
        """Rank 0 writes; the others wait for it, and fail as it does."""
        failed: UserError | None = None
        if self.ranks.is_first:
            try:
                with self._writing(trial):
                    path = checkpoint.save(
                        trial.folder, trial.members, self.pack, self.samples, self.cursor, ended, self.identity
                    )
                    self.observer.on_checkpoint(trial.plan.name, self.samples, path)
            except UserError as error:
                failed = error
        if message := self.ranks.agree(None if failed is None else str(failed)):
            raise failed or UserError(message)

    # ---- the end of a trial
    def _stop(self, trial: Trial, status: Any, reason: str, evaluation: Metrics | None = None) -> None:
        if self.stream is not None:
            self.cursor = self.stream.cursor()
        result = TrialResult(status, self.samples, reason, evaluation or {})
        self._drop(trial.active, reason)
        self._checkpoint(trial, result)  # says how it ended: who goes on from here has nothing more to do
        self._close(trial, result)

    def _drop(self, members: list[Member], reason: str) -> None:
        self.pack.drop(members, reason)
        if self.stream is not None:
            self.stream.keep_only(self.pack.hooks)

    def _finish(self, trial: Trial) -> None:
        """All trials that reached the end together share one evaluation pass."""
        set_thresholds(self.pack.active, self.model, self.tokens, self.config.data, self.ranks.data)
        self._save()
        together = [t for t in self.trials if t.result is None]
        found = self._measure(together)
        seen = Seen.all_of(self.tokens.eval_batches(self.config.data.eval_batch_size) if found else ())
        for other in together:
            metrics = found.get(other.plan.name, {})
            if self.ranks.is_first and metrics:
                told = conditions(other.plan.config, self.model, seen, self.model.predicts)
                with self._writing(other):
                    write_json(other.folder.evaluation_path, with_conditions(metrics, told))
            self._write(other, named(metrics))
            said = [f"{m.hook_point}: {m.reason}" for m in other.members if m.reason is not None]
            said += [f"{m}: {text}" for m in other.active for text in self.pack.verdicts(m)]
            self._close(other, TrialResult("finished", self.samples, "; ".join(dict.fromkeys(said)) or None, metrics))

    def _close(self, trial: Trial, result: TrialResult) -> None:
        """The trial's last word, unless it has had one (its folder is another's)."""
        weights = trial.folder.weights_path(self.samples)
        result.checkpoint = weights if weights.exists() else None
        if result.status == "finished":
            result.cost = cost_of(trial.plan.config, self.model, self.runtime)
        if self.ranks.is_first and trial.result is None:
            with self._writing(trial):
                news = trial.folder.write_status(result.status, result.samples, result.reason)
                if news and result.status != "interrupted":
                    self.observer.draw(trial.plan.name, trial.folder.path)
        if trial.result is None:
            trial.result = result
            trial.finish_sinks(result.status)
            self.observer.on_end(trial.plan.name, result)

    def close(self) -> None:
        """Stop background work, also after an error."""
        if self.stream is not None:
            self.stream.close()
        for trial in self.trials:
            trial.finish_sinks("failed")
            if trial.owner is not None:
                trial.owner.leave(trial.folder.path)
