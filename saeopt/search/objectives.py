"""From an evaluation (hook point → metric → value) to the objective values of a trial."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from saeopt.config.study import Collapse, Objective, StudySpec
from saeopt.errors import UserError

COLLAPSED_L0, COLLAPSED_FVU = 1.0, 0.9
"""Below this L0, or from this FVU on, an SAE is no candidate: an empty code is a trivial end of every front."""

Evaluation = Mapping[str, Mapping[str, float]]


def _hook_points(spec: StudySpec) -> list[str]:
    saes = spec.base.get("saes", {})
    return list(saes.get("sae_positions", []))


def expanded(spec: StudySpec) -> list[tuple[str, Objective]]:
    """The objectives with their names; `hook_points: all` becomes one for each."""
    found = []
    for objective in spec.objectives:
        if objective.hook_points == "all":
            hooks = _hook_points(spec)
            if any(c in hook for hook in hooks for c in "*?["):
                raise UserError(
                    f"study {spec.name}: 'hook_points: all' needs 'saes.sae_positions' without patterns"
                    " (name the hook points)"
                )
            for hook in hooks:
                found.append((f"{_label(objective)}@{hook}", objective.model_copy(update={"hook_points": hook})))
        elif objective.hook_points == "mean":
            found.append((_label(objective), objective))
        else:
            names = objective.hook_points
            hook = names if isinstance(names, str) else "+".join(names)
            found.append((f"{_label(objective)}@{hook}", objective))
    names = [name for name, _ in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"study {spec.name}: the objective '{name}' is given twice")
    return found


def _label(objective: Objective) -> str:
    return objective.metric + (f" at L0 {objective.target_l0:g}" if objective.target_l0 else "")


def objective_names(spec: StudySpec) -> list[str]:
    """What the dashboard calls the values."""
    return [name for name, _ in expanded(spec)]


def directions(spec: StudySpec) -> list[Literal["minimize", "maximize"]]:
    """Optuna's directions."""
    return ["maximize" if o.maximised else "minimize" for _, o in expanded(spec)]


def _rows(objective: Objective, evaluation: Evaluation) -> list[Mapping[str, float]]:
    wanted = objective.hook_points
    if wanted == "mean":
        return list(evaluation.values())
    names = [wanted] if isinstance(wanted, str) else wanted
    return [evaluation[name] for name in names if name in evaluation] if set(names) <= set(evaluation) else []


def metric_of(row: Mapping[str, float], metric: str) -> float | None:
    """A metric of one hook point; those that follow from others are derived."""
    if metric in row:
        return float(row[metric])
    if metric == "explained_variance" and "fvu" in row:
        return 1.0 - float(row["fvu"])
    if metric == "fraction_alive" and "fraction_dead" in row:
        return 1.0 - float(row["fraction_dead"])
    if metric == "ce_degradation" and "ce_sae" in row and "ce_clean" in row:
        return float(row["ce_sae"]) - float(row["ce_clean"])
    return None


def objective_values(spec: StudySpec, evaluation: Evaluation) -> list[float] | None:
    """Plain floats in the order of the objectives; None where a metric is missing or not finite."""
    values = []
    for _, objective in expanded(spec):
        rows = _rows(objective, evaluation)
        found = [_value(objective, row) for row in rows]
        if not found or any(v is None for v in found):
            return None
        value = math.fsum(v for v in found if v is not None) / len(found)
        if not math.isfinite(value):
            return None
        values.append(float(value))
    return values


def _value(objective: Objective, row: Mapping[str, float]) -> float | None:
    value = metric_of(row, objective.metric)
    if value is None or objective.target_l0 is None:
        return value
    l0 = metric_of(row, "l0")
    if l0 is None:
        return None
    distance = abs(math.log(max(l0, 1e-6) / objective.target_l0)) - math.log1p(objective.l0_tolerance)
    cost = objective.l0_weight * max(0.0, distance)
    return value - cost if objective.maximised else value + cost


def violations(rule: Collapse, evaluation: Evaluation) -> dict[str, float]:
    """How far the best hook point is from not having collapsed; at most 0: it has not.

    L0 is compared on a logarithmic scale, so that both numbers are of order 1.
    """
    rows = []
    for row in evaluation.values():
        l0, fvu = metric_of(row, "l0"), metric_of(row, "fvu")
        low = 0.0 if l0 is None else _log_ratio(rule.min_l0, l0)
        high = 0.0 if fvu is None else (10.0 if not math.isfinite(fvu) else min(fvu - rule.max_fvu, 10.0))
        if high == 0.0 and fvu is not None:
            high = 1e-6  # the bound itself counts as collapsed
        rows.append((low, high))
    if not rows:
        return {}
    low, high = min(rows, key=lambda r: max(r[0], 0.0) + max(r[1], 0.0))
    return {"min_l0": float(low), "max_fvu": float(high)}


def final_rule(spec: StudySpec) -> Collapse:
    """What counts as collapsed at the end of a trial: the study's rule, and in any case what `best` leaves out."""
    rule = spec.early_stopping.collapse or Collapse()
    bounds = {"min_l0": max(rule.min_l0, COLLAPSED_L0), "max_fvu": min(rule.max_fvu, COLLAPSED_FVU)}
    return rule.model_copy(update=bounds)


def _log_ratio(bound: float, l0: float) -> float:
    if not math.isfinite(l0):
        return 10.0
    if bound <= 0:
        return -1.0
    return max(-10.0, min(10.0, math.log(bound / max(l0, 1e-9))))


def collapse_reason(rule: Collapse, evaluation: Evaluation) -> str | None:
    """Why every hook point has collapsed; None if one has not."""
    reasons = []
    for hook, row in evaluation.items():
        l0, fvu, dead = metric_of(row, "l0"), metric_of(row, "fvu"), metric_of(row, "fraction_dead")
        if l0 is not None and math.isfinite(l0) and l0 < rule.min_l0:
            reasons.append(f"{hook}: L0 {l0:.3g} is below {rule.min_l0:g}")
        elif fvu is not None and math.isfinite(fvu) and fvu >= rule.max_fvu:
            reasons.append(f"{hook}: FVU {fvu:.3g} has reached {rule.max_fvu:g}")
        elif dead is not None and dead >= 1.0:
            reasons.append(f"{hook}: all latents are dead")
        elif any(v is not None and not math.isfinite(v) for v in (l0, fvu)):
            reasons.append(f"{hook}: NaN or Inf in the metrics")
        else:
            return None
    return "collapsed: " + "; ".join(reasons) if reasons else None
