"""How a trial leaves its worker: ended, failed, given back; and when failures are the worker's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from saeopt.config.study import StudySpec
from saeopt.console import log
from saeopt.errors import WorkerFault
from saeopt.search import constraints
from saeopt.search.collapse import COLLAPSED, rule_of, violations, why_all_collapsed
from saeopt.search.constraints import why_trial_infeasible
from saeopt.search.objectives import objective_names, objective_values
from saeopt.training.plan import TrialResult
from saeopt.trials import endings
from saeopt.trials.attributes import INFEASIBLE, REASON, evaluation_attributes
from saeopt.trials.heart import Heart
from saeopt.trials.packing import Assignment, owner_of
from saeopt.trials.reports import Progress
from saeopt.trials.states import Claim
from saeopt.trials.storage import Store, is_transient, persistently
from saeopt.views import monitoring
from saeopt.workers.faults import SAME_REASON, Failure, Faults, failure_of


class Outcomes:
    """Stores what became of the trials of a pack."""

    def __init__(self, store: Store, study_id: int, spec: StudySpec, heart: Heart, leaving: Callable[[], bool]) -> None:
        self.store, self.study_id, self.spec, self.heart, self.leaving = store, study_id, spec, heart, leaving
        self.faults = Faults()
        self.progress: dict[str, Progress] = {}
        self._stored: set[str] = set()
        self._undrawn: list[int] = []

    def begin(self, progress: dict[str, Progress]) -> None:
        """A pack starts."""
        self.progress, self._stored = progress, set()

    def pending(self, pack: Sequence[Assignment]) -> list[Assignment]:
        """Those that did not end before the rest of their pack."""
        return [a for a in pack if a.name not in self._stored]

    # ---- whose fault
    def worker_fault(self, reason: str) -> WorkerFault:
        """What ends this worker."""
        return WorkerFault(f"study {self.spec.name} cannot be trained by this worker: {reason}")

    def fault(self, reason: str, trials: Sequence[int], *, host: bool = False) -> None:
        """A failure that was booked on nobody, or not for good; raises when it is this worker's."""
        if self.faults.note(reason, trials, host=host):
            raise self.worker_fault(reason)

    def fail(self, assignment: Assignment, failure: Failure) -> None:
        """A failure of the trial itself; raises :class:`WorkerFault` when others have failed of the same."""
        claim, reason = assignment.claim, failure.reason
        if self.faults.note(reason, [claim.number]):
            self.give_back(claim, reason=reason)
            raise self.worker_fault(f"{SAME_REASON} different trials failed of the same: {reason}")
        self.heart.closing(claim)
        where = persistently(
            lambda: endings.fail(self.store, claim, reason, failure.text, self.spec.retries), "storing a failure"
        )
        log.error("trial %d failed (%s): %s", claim.number, "tried again" if where == "waiting" else "for good", reason)
        self.part_with(claim)  # the last: its folder's log is closed to us then
        self.heart.me.finished += where == "failed"

    def died(self, pack: Sequence[Assignment], reason: str) -> None:
        """The process that trained them ended by itself."""
        for claim in [a.claim for a in pack]:
            self.heart.closing(claim)
            where = persistently(partial(endings.died, self.store, claim, reason), "storing a failure")
            if where == "failed":
                self.heart.me.finished += 1
                log.error("trial %d failed for good: %s", claim.number, reason)
            self.part_with(claim)

    def stalled(self, pack: Sequence[Assignment], reason: str) -> None:
        """They made no progress for long."""
        pending = self.pending(pack)
        log.error("%s: trials %s go back to the queue", reason, ", ".join(a.name for a in pending))
        why, limit = f"{reason} (on {self.heart.me.worker})", self.spec.max_losses
        for claim in [a.claim for a in pending]:
            self.heart.closing(claim)
            persistently(partial(endings.stalled, self.store, claim, why, limit), "giving a trial back")
            self.part_with(claim)

    # ---- the end of a trial
    def store_safely(self, assignment: Assignment, result: TrialResult, seconds: float | None = None) -> None:
        """Store a result; one that cannot be stored is its trial's failure, not the worker's.

        Raises:
            SQLAlchemyError: the store could not be reached for `seconds`.
        """
        try:
            self._store(assignment, result, seconds)
        except Exception as error:
            if is_transient(error):
                raise
            self.fail(assignment, failure_of(error))
        self._stored.add(assignment.name)
        self.heart.clock.ended()

    def _store(self, assignment: Assignment, result: TrialResult, seconds: float | None) -> None:
        claim, spec = assignment.claim, self.spec
        if result.status == "interrupted":
            self.give_back(claim, result.samples)
            return
        if result.status == "lost" and not self.heart.has_lost(claim):
            self.give_back(claim)  # a stranger has taken its folder: whoever claims it next takes it back
            return
        if self.heart.has_lost(claim):
            assignment.owner.leave(assignment.run_dir)
            return
        if result.status == "paused":
            self.pause(assignment, result, objective_values(spec, result.evaluation), seconds)
            return
        values, reason = self._judged(result)
        attrs: dict[str, Any] = {**evaluation_attributes(result.evaluation), "samples": result.samples, **result.cost}
        violated = None if values is None else why_trial_infeasible(spec, result.evaluation, result.cost)
        if violated:
            attrs[INFEASIBLE] = violated
        if reason:
            attrs[REASON] = reason
        limits = self._constraints(result, reason, pruned=values is None)
        how = "complete" if values is not None else "no candidate" if result.status == "finished" else "stopped early"
        outcome = reason if reason and reason.startswith(how) else f"{how}{': ' + reason if reason else ''}"
        outcome += f"; violates a constraint: {violated}" if violated else ""
        monitoring.on_trial_end(
            self.store, self.study_id, claim.trial_id, spec, outcome, claim=claim, evaluation=result.evaluation
        )
        state: Literal["COMPLETE", "PRUNED"] = "PRUNED" if values is None else "COMPLETE"
        self.heart.closing(claim)
        final = self._last_values(assignment) if values is None else values
        stored = persistently(
            lambda: endings.finish(self.store, claim, state, final, constraints=limits, attrs=attrs),
            f"storing the result of trial {claim.number}",
            seconds,
        )
        self.heart.me.finished += stored
        if stored:
            self.faults.clear()
            named = zip(objective_names(spec), values or [], strict=False)
            shown = "" if values is None else " (" + ", ".join(f"{name} {v:.4g}" for name, v in named) + ")"
            log.info("trial %d: %s%s", claim.number, outcome, shown)
        self.part_with(claim)

    def pause(
        self, assignment: Assignment, result: TrialResult, values: Sequence[float] | None, seconds: float | None = None
    ) -> None:
        """Others are ahead of it: it stays where it is, and nobody is told of a result."""
        claim, reason = assignment.claim, result.reason or "paused"
        where = (self.store, self.study_id, claim.trial_id, self.spec)
        monitoring.on_trial_end(*where, reason, claim=claim, evaluation=result.evaluation, curves=False)
        limits = self._constraints(result, reason, pruned=True)
        last = values if values is not None and len(values) == 1 else None
        self.heart.closing(claim)
        paused = persistently(
            lambda: endings.pause(self.store, claim, result.samples, reason, values=last, constraints=limits),
            f"pausing trial {claim.number}",
            seconds,
        )
        if paused:
            log.info("trial %d: %s", claim.number, reason)
            self._undrawn.append(claim.trial_id)
        self.part_with(claim)

    def draw_paused(self) -> None:
        """The curves of trials that were paused while the rest of their pack waited: a picture takes a second."""
        while self._undrawn and not self.leaving():
            monitoring.on_trial_paused(self.store, self.study_id, self._undrawn.pop(), self.spec)

    def _judged(self, result: TrialResult) -> tuple[list[float] | None, str | None]:
        """The objectives of a trial, and what is to be said of it; None for one that no front may hold.

        A collapsed trial has the lowest L0 of all. Optuna's fronts leave out trials that violate a constraint, the
        dashboard's and a storage's best trial do not; what all of them leave out is a pruned trial.
        """
        if result.status != "finished":
            return None, result.reason
        if collapsed := why_all_collapsed(rule_of(self.spec), result.evaluation):
            return None, collapsed
        values = objective_values(self.spec, result.evaluation)
        if values is None:
            return None, f"no finite value of every objective in the evaluation ({result.reason or 'all hook points'})"
        return values, result.reason

    def _last_values(self, assignment: Assignment) -> list[float] | None:
        """What a trial that was given up had reached, as Optuna keeps it for a single objective."""
        curve = self.progress[assignment.name].curve
        return curve[max(curve)] if curve and len(curve[max(curve)]) == 1 else None

    def _constraints(self, result: TrialResult, reason: str | None, *, pruned: bool) -> dict[str, float]:
        """What the sampler learns about a trial that collapsed or was given up: it is infeasible, by so much."""
        rule = self.spec.early_stopping.collapse
        found: dict[str, float] = {}
        ended = result.status == "finished"
        if rule is not None and rule.constraint:
            found = violations(rule, result.evaluation) if ended else {"min_l0": 0.0, "max_fvu": 0.0}
        limits = constraints.violations(self.spec, result.evaluation, result.cost)
        found |= limits if ended else dict.fromkeys(limits, 0.0)  # nobody knows what it would have come to
        if not pruned:
            return found
        hopeless = result.status == "diverged" or (reason or "").startswith(COLLAPSED)
        # Optuna's TPE cannot rank pruned trials by several objectives: hardly infeasible is how they get past it.
        return {**found, "stopped": 1.0 if hopeless else 1e-3} if found or len(self.spec.objectives) > 1 else found

    def give_all_back(self, pack: Sequence[Assignment], reason: str | None = None) -> None:
        """All whose results are not stored."""
        for assignment in self.pending(pack):
            self.give_back(assignment.claim, reason=reason)

    def give_back(self, claim: Claim, samples: int | None = None, reason: str | None = None) -> None:
        """To the queue, with nothing counted against it."""
        self.heart.closing(claim)
        seconds = 5.0 if self.leaving() else 60.0
        release = partial(endings.release, self.store, claim, samples, reason=reason)
        try:
            persistently(release, "giving a trial back", seconds)
        except Exception as error:
            log.warning("trial %d could not be given back (%s); it will be reaped", claim.number, type(error).__name__)
        self.part_with(claim)

    def part_with(self, claim: Claim) -> None:
        """Neither the trial nor its folder is ours any more."""
        self.heart.drop(claim)
        owner_of(claim).leave(self.spec.run_dir(claim.number))
