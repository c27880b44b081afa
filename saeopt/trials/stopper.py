"""Whether a trial should stop, from what the study's other trials have reported."""

from __future__ import annotations

from collections.abc import Sequence

import optuna

from saeopt.config.study import StudySpec
from saeopt.search.objectives import expanded
from saeopt.search.pruning import Curve, at, dominated, make_pruner, parse_curve
from saeopt.trials import internals as db
from saeopt.trials.storage import Store

CURVE = "saeopt:curve"
"""Trial: samples → objective values, as it reported them."""


class Stopper:
    """Decides for one study; keeps the curves of finished trials."""

    def __init__(self, store: Store, study_id: int, spec: StudySpec) -> None:
        self.store, self.study_id, self.spec = store, study_id, spec
        self.maximised = [o.maximised for _, o in expanded(spec)]
        self._finished: dict[int, tuple[int, Curve]] = {}
        self._study: optuna.Study | None = None

    def reason(
        self, trial_id: int, samples: int, values: Sequence[float] | None, warmup: int, total: int
    ) -> str | None:
        """Why the trial should stop now, after its report at `samples`; None: it goes on."""
        rule = self.spec.early_stopping
        if rule.type == "none" or samples < warmup:
            return None
        if rule.type == "pareto":
            return None if values is None else self._dominated_by(samples, values)
        if self._study is None:
            self._study = self.store.sampling_study(self.spec.name)
        self._study.pruner = make_pruner(rule, warmup, total)
        if self._study.pruner.prune(self._study, db.frozen_trial(self._study, trial_id)):
            return f"stopped early by {rule.type} at {samples} of {total} samples"
        return None

    def _dominated_by(self, samples: int, values: Sequence[float]) -> str | None:
        self._read_finished()
        if len(self._finished) < self.spec.early_stopping.n_startup_trials:
            return None
        for number, curve in self._finished.values():
            then = at(curve, samples)
            if then and dominated(values, then, self.maximised, self.spec.early_stopping.margin):
                return f"stopped early: at {samples} samples trial {number} was better in every objective"
        return None

    def _read_finished(self) -> None:
        with self.store.read() as connection:
            for trial_id, number, curve in db.complete_with(connection, self.study_id, CURVE, self._finished):
                self._finished[trial_id] = (number, parse_curve(curve))
