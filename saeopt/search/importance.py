"""Which parameters mattered: the share of an objective's variance that each explains by itself (fANOVA).

A random forest learns the objective from the parameters, and each parameter's share is the variance of the forest's
mean over all others, divided by its whole variance (Hutter, Hoos and Leyton-Brown, 2014). The shares do not add up to
1: the rest is what parameters do together. Optuna's own default (PED-ANOVA) looks at what the best trials have in
common, and may put the parameter that decides last.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import pvariance
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution

from saeopt.errors import UserError

LEAST_TRIALS = 10
"""Fewer tell nothing of any parameter."""
_SEED, _TREES = 0, 64


@dataclass(frozen=True)
class Tried:
    """A trial: its parameters, and the value that came of them."""

    params: Mapping[str, Any]
    value: float


@dataclass(frozen=True)
class Importances:
    """Shares of the variance, largest first."""

    shares: dict[str, float]
    n_trials: int

    @property
    def together(self) -> float:
        """What no parameter explains by itself."""
        return max(0.0, 1.0 - sum(self.shares.values()))


def importances(tried: Sequence[Tried], distributions: Mapping[str, BaseDistribution]) -> Importances:
    """The share of each parameter that varies. A trial without a conditional parameter counts at its usual value: what
    it decides where it exists is its share, and whether it exists is the share of what it depends on.

    Raises:
        UserError: too few trials, or nothing varies.
    """
    usable = [trial for trial in tried if math.isfinite(trial.value)]
    if len(usable) < LEAST_TRIALS:
        raise UserError(f"too few trials: {len(usable)} of at least {LEAST_TRIALS} have a value")
    # fANOVA averages over the whole range of each parameter: one that never varies would be a range of one point.
    seen = {name: [t.params[name] for t in usable if name in t.params] for name in distributions}
    varied = [name for name, values in seen.items() if len({repr(value) for value in values}) > 1]
    if not varied:
        raise UserError("no parameter varies")
    if pvariance([trial.value for trial in usable]) == 0.0:
        raise UserError("all trials have the same value")
    columns = {name: _column(name, seen[name], distributions[name]) for name in varied}
    kinds = {name: column.kind for name, column in columns.items()}
    study = optuna.create_study()
    for trial in usable:
        params = {name: column.of(trial.params) for name, column in columns.items()}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=kinds, value=trial.value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=_TREES, seed=_SEED)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator, params=varied, normalize=False)
    return Importances({name: float(share) for name, share in shares.items()}, len(usable))


@dataclass(frozen=True)
class _Column:
    name: str
    kind: BaseDistribution
    usual: Any

    def of(self, params: Mapping[str, Any]) -> Any:
        if self.name not in params:
            return self.usual
        value = params[self.name]
        return repr(value) if isinstance(self.kind, CategoricalDistribution) else value


def _column(name: str, values: Sequence[Any], distribution: BaseDistribution) -> _Column:
    if not isinstance(distribution, CategoricalDistribution):
        return _Column(name, distribution, sorted(values)[len(values) // 2])
    counted = Counter(map(repr, values))
    return _Column(name, CategoricalDistribution(sorted(counted)), counted.most_common(1)[0][0])
