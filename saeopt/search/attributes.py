"""What a study stores beside Optuna's own: names and form of the attributes. Small: dashboards read them all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from saeopt.errors import UserError

Evaluation = Mapping[str, Mapping[str, Any]]
"""Hook point → metric → value."""

RUN_DIR = "run_dir"
"""Trial: the run folder."""
REASON = "reason"
"""Trial: why it was stopped or failed, one line."""
TRACEBACK = "traceback"
"""Trial: the end of the traceback of its last failure."""
EVALUATION = "eval/"
"""Trial: `eval/<hook point>` → {metric: value}."""
LIMIT = 1_024
"""optuna-dashboard cuts JSON values at so many characters."""
DIGITS = 5

_ORDER = ("l0", "explained_variance", "fvu", "ce_recovered", "kl", "fraction_dead", "mse", "cosine", "n_tokens")


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


def evaluation_attributes(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """`eval/<hook point>` → its metrics, the important ones first; a long list (a histogram) goes if it is too much."""
    result = {}
    for hook, metrics in evaluation.items():
        names = [n for n in _ORDER if n in metrics] + sorted(n for n in metrics if n not in _ORDER)
        compact: dict[str, Any] = {}
        for name in names:
            value = metrics[name]
            short = [number(v) for v in value] if isinstance(value, list | tuple) else number(value)
            if short is not None and len(json.dumps({**compact, name: short})) <= LIMIT:
                compact[name] = short
        result[f"{EVALUATION}{hook}"[:512]] = compact
    return result


def evaluation_of(attributes: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The evaluation that a trial's user attributes hold."""
    found = {k.removeprefix(EVALUATION): v for k, v in attributes.items() if k.startswith(EVALUATION)}
    return {
        hook: {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        for hook, metrics in found.items()
        if isinstance(metrics, dict)
    }


def mean_metric(evaluation: Evaluation, metric: str, hooks: Iterable[str] | None = None) -> float | None:
    """The mean of a metric over hook points (all by default); None where one lacks it."""
    values = [evaluation.get(hook, {}).get(metric) for hook in (evaluation if hooks is None else hooks)]
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
