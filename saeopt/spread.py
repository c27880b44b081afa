"""What several seeds of one SAE tell together: means under the metrics' own names, beside them how far the seeds lie
apart. Imports nothing heavy.

    <metric>                             the mean over n seeds; a histogram's counts likewise
    <metric>_std                         the standard deviation over them, with n − 1
    n_seeds                              n
    l0_min, fvu_max, fraction_dead_max   of the worst seed: what collapses in one seed has collapsed
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from saeopt.metrics import METRICS, Metric, value_of

N_SEEDS = "n_seeds"
STD = "_std"
WORST = {"l0": "l0_min", "fvu": "fvu_max", "fraction_dead": "fraction_dead_max"}
"""Metrics by which an SAE collapses, and what their worst value over the seeds is called."""


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics of one SAE from those of each of its seeds; of one seed they stay as they are.

    Numbers that only some seeds have are left out. NaN in one seed is NaN in all that follows from it.
    """
    if len(rows) == 1:
        return dict(rows[0])
    found: dict[str, Any] = {}
    spreads: dict[str, float] = {}
    for name in rows[0]:
        values = [row[name] for row in rows if name in row]
        if len(values) < len(rows):
            continue
        if all(isinstance(value, bool) for value in values):
            found[name] = all(values)
        elif all(isinstance(value, int | float) for value in values):
            found[name] = mean(values)
            if name not in METRICS or not METRICS[name].shared:
                spreads[name + STD] = deviation(values)
        elif all(isinstance(value, dict) and "counts" in value for value in values):
            counts = [mean(column) for column in zip(*(value["counts"] for value in values), strict=True)]
            found[name] = {**values[0], "counts": counts}
    for name, worst in WORST.items():
        values = [float(row[name]) for row in rows if name in row]
        if values:
            missing = any(math.isnan(value) for value in values)
            found[worst] = math.nan if missing else min(values) if worst.endswith("_min") else max(values)
    return {**found, N_SEEDS: len(rows), **spreads}


def worst(row: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of an SAE with those by which it collapses as its worst seed has them."""
    return {**row, **{name: row[at] for name, at in WORST.items() if at in row}}


def text_of(metric: Metric, row: Mapping[str, float]) -> str:
    """A metric for people; of several seeds with its standard deviation in a second line."""
    spread = row.get(metric.name + STD)
    text = metric.text(row[metric.name] if metric.name in row else value_of(row, metric.name))
    if spread is None or not math.isfinite(spread):
        return text
    return f"{text}\n" + (f"±{100 * spread:.2g}%" if metric.form.endswith("%") else f"±{spread:.2g}")


def mean(values: Sequence[float]) -> float:
    """The mean; of equal values exactly that one."""
    if all(value == values[0] for value in values):
        return values[0]
    return sum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """The standard deviation with n − 1; 0 for equal values."""
    if all(value == values[0] for value in values):
        return 0.0
    middle = mean(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1))
