"""From an evaluation (hook point → metric → value) to the objective values of a trial."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from saeopt.config.sites import keys_of
from saeopt.config.study import Objective, StudySpec
from saeopt.errors import UserError
from saeopt.metrics import value_of

Evaluation = Mapping[str, Mapping[str, float]]


def hook_points(spec: StudySpec) -> list[str]:
    """The hook points of the base config, which may hold patterns."""
    saes = spec.base.get("saes", {})
    return keys_of(saes.get("sae_positions", []))


def expanded(spec: StudySpec) -> list[tuple[str, Objective]]:
    """The objectives with their names; `hook_points: all` becomes one for each."""
    found = []
    for objective in spec.objectives:
        if objective.hook_points == "all":
            hooks = hook_points(spec)
            if any(c in hook for hook in hooks for c in "*?["):
                raise UserError(
                    f"study {spec.name}: 'hook_points: all' needs 'saes.sae_positions' without patterns"
                    " (name the hook points)"
                )
            for hook in hooks:
                found.append((f"{label(objective)}@{hook}", objective.model_copy(update={"hook_points": hook})))
        elif objective.hook_points == "mean":
            found.append((label(objective), objective))
        else:
            names = objective.hook_points
            hook = names if isinstance(names, str) else "+".join(names)
            found.append((f"{label(objective)}@{hook}", objective))
    names = [name for name, _ in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"study {spec.name}: the objective '{name}' is given twice")
    return found


def value_at(spec: StudySpec, objective: Objective, row: Mapping[str, float]) -> float | None:
    """An objective's value at one hook point, from the metrics there."""
    return _value(objective, row, all(o.metric != "l0" for o in spec.objectives))


def label(objective: Objective) -> str:
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


def objective_values(spec: StudySpec, evaluation: Evaluation) -> list[float] | None:
    """Plain floats in the order of the objectives; None where a metric is missing or not finite."""
    values, aims = [], all(objective.metric != "l0" for objective in spec.objectives)
    for _, objective in expanded(spec):
        found = [_value(objective, row, aims) for row in _rows(objective, evaluation)]
        if not found or any(v is None for v in found):
            return None
        value = math.fsum(v for v in found if v is not None) / len(found)
        if not math.isfinite(value):
            return None
        values.append(float(value))
    return values


def _value(objective: Objective, row: Mapping[str, float], aims: bool) -> float | None:
    """`aims`: an objective without a target takes that of the SAE, if it had one."""
    value, target = value_of(row, objective.metric), objective.target_l0
    if target is None and aims:
        target = row.get("target_l0")
    if value is None or target is None:
        return value
    l0 = value_of(row, "l0")
    if l0 is None:
        return None
    distance = abs(math.log(max(l0, 1e-6) / target)) - math.log1p(objective.l0_tolerance)
    cost = objective.l0_weight * max(0.0, distance)
    return value - cost if objective.maximised else value + cost
