"""The SAEs of a study as points: which are candidates, what they are called, and how much of the plane they cover."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Engine

from saeopt.config.study import StudySpec
from saeopt.search.objectives import COLLAPSED_FVU, COLLAPSED_L0
from saeopt.search.pareto import Point, pareto_front
from saeopt.trials import queries
from saeopt.trials.attributes import REASON, evaluation_of
from saeopt.trials.queries import TrialRow


def collapsed(metrics: Mapping[str, Any]) -> bool:
    """Whether the SAE reconstructs nothing (also when a value is missing or NaN)."""
    l0, fvu = metrics.get("l0", math.nan), metrics.get("fvu", math.nan)
    return not (l0 >= COLLAPSED_L0 and fvu < COLLAPSED_FVU)


def was_evaluated(row: TrialRow) -> bool:
    """Whether a trial was trained to its end: complete, or pruned because it had collapsed."""
    return row.state == "COMPLETE" or (
        row.state == "PRUNED" and str(row.attributes.get(REASON, "")).startswith("collapsed")
    )


def points_of(number: int, attributes: Mapping[str, Any], group: str = "") -> list[Point]:
    """A point per hook point of a trial, from its user attributes; collapsed SAEs too."""
    return [Point(f"#{number}", row, hook, group) for hook, row in evaluation_of(attributes).items()]


def candidates(points: Iterable[Point]) -> list[Point]:
    """The points that are no collapsed SAEs."""
    return [point for point in points if not collapsed(point.metrics)]


def fronts(points: Iterable[Point], x: str = "l0", y: str = "fvu") -> dict[str, list[Point]]:
    """Hook point → its front without collapsed SAEs."""
    groups: dict[str, list[Point]] = {}
    for point in candidates(points):
        groups.setdefault(point.hook_point, []).append(point)
    return {hook: pareto_front(group, x, y) for hook, group in groups.items()}


def hypervolume(points: Iterable[tuple[float, float]], reference: Sequence[float]) -> float:
    """Area that (x, y) points, both to be minimised, dominate up to a reference point."""
    area, lowest = 0.0, reference[1]
    for x, y in sorted((x, y) for x, y in points if x < reference[0] and y < reference[1]):
        if y < lowest:
            area += (reference[0] - x) * (lowest - y)
            lowest = y
    return area


def study_points(engine: Engine, study_id: int, spec: StudySpec) -> list[Point]:
    """The evaluated SAEs of a study, in order of their trials; the architecture is their group."""
    rows = list(filter(was_evaluated, queries.trial_rows(engine, study_id)))
    if "saes.sae_type" in spec.space:
        queries.add_params(engine, rows, study_id)
    found: list[Point] = []
    for row in rows:
        found += points_of(row.number, row.attributes, str(row.params.get("saes.sae_type", spec.base_sae_type)))
    return found
