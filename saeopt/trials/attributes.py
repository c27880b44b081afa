"""What a study stores beside Optuna's own: names and form of the attributes. Small: dashboards read them all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from saeopt.errors import UserError
from saeopt.metrics import METRICS, Shown, in_order, shown_in
from saeopt.spread import N_SEEDS, STD, WORST

Evaluation = Mapping[str, Mapping[str, Any]]
"""Hook point → metric → value."""

RUN_DIR = "run_dir"
"""Trial: the run folder."""
ORIGIN = "started_from"
"""Trial: the trial of another study whose parameters it has (`start_from`)."""
REASON = "reason"
"""Trial: why it was stopped or failed, one line."""
PAUSED_AT = "paused_at"
"""Trial: samples of the rung at which it is paused, or was until the study's end."""
INFEASIBLE = "infeasible"
"""Trial: which constraints of the study it violates."""
TRACEBACK = "traceback"
"""Trial: the end of the traceback of its last failure."""
CURVE_NAME = "intermediate_values"
"""Study: what the trials' intermediate values are."""
EVALUATION = "eval/"
"""Trial: `eval/<hook point>` → {metric: value}."""
SEEDS = "seeds/"
"""Trial: `seeds/<hook point>` → {metric: value} of what only several seeds have: spreads, and the worst of them."""
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

    `eval/<hook point>` → its metrics, the important ones first; a long list (a histogram) goes if it is too much; with
    several seeds `seeds/<hook point>` → how far they lie apart. For the dashboard's columns and axes also numbers of
    their own: `<metric>`, the mean over hook points, `<metric>_std` likewise, and, of the most important ones where
    there are several hook points, `<metric>@<hook point>`.
    """
    result: dict[str, Any] = {}
    for hook, metrics in evaluation.items():
        apart = [*WORST.values(), *(m.name + STD for m in METRICS.values() if m.name + STD in metrics)]
        result[f"{EVALUATION}{hook}"[:512]] = _compact({k: v for k, v in metrics.items() if k not in apart})
        if N_SEEDS in metrics:
            result[f"{SEEDS}{hook}"[:512]] = _compact({k: metrics[k] for k in apart if k in metrics})
    for metric in shown_in(Shown.COLUMN, seeds=True):
        for name in (metric.name, metric.name + STD):
            if (mean := number(mean_metric(evaluation, name))) is not None:
                result[name] = mean
    headlines = shown_in(Shown.HEADLINE) if len(evaluation) > 1 else []
    for name, hook in ((metric.name, hook) for metric in headlines for hook in evaluation):
        if (value := number(evaluation[hook].get(name))) is not None:
            result[f"{name}@{hook}"[:512]] = value
    return result


def _compact(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The important ones first, as many as a dashboard shows of one attribute."""
    compact: dict[str, Any] = {}
    for name in in_order(metrics):
        value = metrics[name]
        short = [number(v) for v in value] if isinstance(value, list | tuple) else number(value)
        if short is not None and len(json.dumps({**compact, name: short})) <= LIMIT:
            compact[name] = short
    return compact


def evaluation_of(attributes: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The evaluation that a trial's user attributes hold."""
    found = {k.removeprefix(EVALUATION): v for k, v in attributes.items() if k.startswith(EVALUATION)}
    rows = {hook: {**row, **attributes.get(SEEDS + hook, {})} for hook, row in found.items() if isinstance(row, dict)}
    return {
        hook: {name: value for name, value in row.items() if isinstance(value, int | float)}
        for hook, row in rows.items()
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
