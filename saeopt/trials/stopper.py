"""Which trials should stop, from what all trials of the study have reported: the store is all that workers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from saeopt.config.study import StudySpec
from saeopt.search.collapse import is_hopeless
from saeopt.search.objectives import expanded
from saeopt.search.pruning import Curve, parse_curve
from saeopt.search.stopping import Asked, Judge, Runner
from saeopt.trials import internals as db
from saeopt.trials.attributes import REASON
from saeopt.trials.storage import Store

CURVE = "saeopt:curve"
"""Trial: samples → objective values, as it reported them."""


@dataclass(frozen=True)
class Report:
    """What a trial of this worker has just reported."""

    trial_id: int
    samples: int
    total: int
    warmup: int


class Stopper:
    """Decides for one study; keeps the curves of trials that have ended."""

    def __init__(self, store: Store, study_id: int, spec: StudySpec) -> None:
        self.store, self.study_id, self.judge = store, study_id, Judge(spec)
        self.rule = spec.early_stopping
        self.single = len(expanded(spec)) == 1
        self._ended: dict[int, Runner | None] = {}

    def reasons(self, reports: Sequence[Report]) -> dict[int, str]:
        """Trial → why it should stop now. `reports`: of trials that came to the same samples together."""
        if self.rule.type in ("none", "halving") or not any(report.samples >= report.warmup for report in reports):
            return {}
        runners, found = self._read(), {}
        for report in reports:
            if me := runners.get(report.trial_id):
                others = [runner for trial_id, runner in runners.items() if trial_id != report.trial_id]
                asked = Asked(me, report.samples, report.total, report.warmup)
                if reason := self.judge.reason(asked, others):
                    found[report.trial_id] = reason
        return found

    def _read(self) -> dict[int, Runner]:
        """Trial → who has reported something, without those that failed, collapsed or diverged."""
        with self.store.read() as connection:
            rows = db.reporters(connection, self.study_id, self._ended)
            if self.single:  # also what stands in for an objective that training does not measure
                told = db.reports_of(connection, self.study_id, self._ended)
                curves: dict[int, Curve] = {i: {s: [v] for s, v in curve.items()} for i, curve in told.items()}
            else:
                stored = db.attrs_of(connection, db.trial_attrs, rows, [CURVE])
                curves = {trial_id: parse_curve(curve) for (trial_id, _), curve in stored.items()}
            stopped = [trial_id for trial_id, (_, state) in rows.items() if state == "PRUNED"]
            reasons = db.attrs_of(connection, db.trial_user_attrs, stopped, [REASON])
        living: dict[int, Runner] = {}
        for trial_id, (number, state) in rows.items():
            hopeless = is_hopeless(str(reasons.get((trial_id, REASON), "")))
            curve = curves.get(trial_id)
            runner = Runner(number, curve) if curve and not hopeless else None
            if state in ("COMPLETE", "PRUNED"):
                self._ended[trial_id] = runner
            elif runner is not None:
                living[trial_id] = runner
        return living | {trial_id: runner for trial_id, runner in self._ended.items() if runner is not None}
