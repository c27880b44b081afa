"""What a study stores beside Optuna's own: names and form of the attributes. Small: dashboards read them all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from saeopt.errors import UserError
from saeopt.metrics import Shown, in_order, shown_in

Evaluation = Mapping[str, Mapping[str, Any]]
"""Hook point → metric → value."""

RUN_DIR = "run_dir"
"""Trial: the run folder."""
REASON = "reason"
"""Trial: why it was stopped or failed, one line."""
TRACEBACK = "traceback"
"""Trial: the end of the traceback of its last failure."""
CURVE_NAME = "intermediate_values"
"""Study: what the trials' intermediate values are."""
EVALUATION = "eval/"
"""Trial: `eval/<hook point>` → {metric: value}."""
LIMIT = 1_024
"""optuna-dashboard cuts JSON values at this number of characters."""
DIGITS = 5


def number(value: object) -> float | int | None:
    """A plain Python number (also from numpy and 0-d tensors) with few digits; None for anything else and for NaN."""
    if isinstance(value, str | bytes) or value is None:
        return None
    if isinstance(value, bool | int):
        return int(value)
    try:
        plain = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return None
    return float(f"{plain:.{DIGITS}g}") if math.isfinite(plain) else None


def evaluation_attributes(evaluation: Evaluation) -> dict[str, Any]:
    """What a trial's evaluation leaves in its attributes.

    `eval/<hook point>` → its metrics, the important ones first; a long list (a histogram) goes if it is too much. For
    the dashboard's columns and axes also numbers of their own: `<metric>`, the mean over hook points, and, of the most
    important ones where there are several hook points, `<metric>@<hook point>`.
    """
    result: dict[str, Any] = {}
    for hook, metrics in evaluation.items():
        compact: dict[str, Any] = {}
        for name in in_order(metrics):
            value = metrics[name]
            short = [number(v) for v in value] if isinstance(value, list | tuple) else number(value)
            if short is not None and len(json.dumps({**compact, name: short})) <= LIMIT:
                compact[name] = short
        result[f"{EVALUATION}{hook}"[:512]] = compact
    for metric in shown_in(Shown.COLUMN, seeds=True):
        if (mean := number(mean_metric(evaluation, metric.name))) is not None:
            result[metric.name] = mean
    headlines = shown_in(Shown.HEADLINE) if len(evaluation) > 1 else []
    for name, hook in ((metric.name, hook) for metric in headlines for hook in evaluation):
        if (value := number(evaluation[hook].get(name))) is not None:
            result[f"{name}@{hook}"[:512]] = value
    return result


def evaluation_of(attributes: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The evaluation that a trial's user attributes hold."""
    found = {k.removeprefix(EVALUATION): v for k, v in attributes.items() if k.startswith(EVALUATION)}
    return {
        hook: {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        for hook, metrics in found.items()
        if isinstance(metrics, dict)
    }


def mean_metric(evaluation: Evaluation, metric: str) -> float | None:
    """The mean of a metric over hook points; None where one lacks it."""
    values = [row.get(metric) for row in evaluation.values()]
    numbers = [v for v in values if isinstance(v, int | float)]
    return sum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None


def not_found(kind: str, wanted: str, known: Iterable[str]) -> UserError:
    """One line that lists the nearest names, or all of a few."""
    from saeopt.config.base import nearest

    names = list(known)
    near = nearest(wanted, names)
    if not near:
        shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        near = f" (there is {shown})" if names else " (there is none)"
    return UserError(f"no {kind} '{wanted}'{near}")
