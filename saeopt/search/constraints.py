"""A study's constraints: what a trial may be on no front for, though it has not collapsed."""

from __future__ import annotations

import math
from collections.abc import Mapping

from saeopt.config.limits import COSTS, Bound
from saeopt.config.study import StudySpec
from saeopt.metrics import value_of
from saeopt.search.objectives import Evaluation

_FAR = 10.0
"""How far a trial counts that lacks the value; the most that any counts."""


def bounds(spec: StudySpec) -> list[Bound]:
    """The constraints, in the order of the file."""
    return [Bound.parse(name, text) for name, text in spec.constraints.items()]


def violations(spec: StudySpec, evaluation: Evaluation, cost: Mapping[str, float]) -> dict[str, float]:
    """Constraint → how far the trial's worst SAE is beyond it, as a share of the limit; at most 0: it is kept.

    `cost`: what holds for the trial as a whole (`COSTS`).
    """
    return {
        bound.name: max((_excess(bound, row, cost) for row in evaluation.values()), default=_FAR)
        for bound in bounds(spec)
    }


def why_infeasible(spec: StudySpec, row: Mapping[str, float], cost: Mapping[str, float]) -> str | None:
    """Which constraints an SAE with these metrics violates; None: none."""
    found = [_said(bound, row, cost) for bound in bounds(spec) if _excess(bound, row, cost) > 0]
    return "; ".join(found) or None


def why_trial_infeasible(spec: StudySpec, evaluation: Evaluation, cost: Mapping[str, float]) -> str | None:
    """Which constraints SAEs of a trial violate, and where."""
    found = [(hook, why_infeasible(spec, row, cost)) for hook, row in evaluation.items()]
    return "; ".join(f"{hook}: {why}" for hook, why in found if why is not None) or None


def _value(bound: Bound, row: Mapping[str, float], cost: Mapping[str, float]) -> float:
    value = cost.get(bound.name) if bound.name in COSTS else value_of(row, bound.name)
    return math.nan if value is None else float(value)


def _excess(bound: Bound, row: Mapping[str, float], cost: Mapping[str, float]) -> float:
    value = _value(bound, row, cost)
    if not math.isfinite(value):
        return _FAR
    beyond = (value - bound.limit) if bound.at_most else (bound.limit - value)
    return max(-_FAR, min(_FAR, beyond / (abs(bound.limit) or 1.0)))


def _said(bound: Bound, row: Mapping[str, float], cost: Mapping[str, float]) -> str:
    value = _value(bound, row, cost)
    if not math.isfinite(value):
        return f"{bound.name} is not known"
    return f"{bound.name} {value:.4g} is {'above' if bound.at_most else 'below'} {bound.limit:g}"
