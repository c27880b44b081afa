"""Sparsity against faithfulness: which SAEs no other SAE beats. Plain Python, imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from saeopt.metrics import more_is_better, value_of

L0_RANGES: tuple[tuple[float, float], ...] = ((0.5, 8), (8, 16), (16, 32), (32, 64), (64, 128), (128, 256))
"""Ranges of L0, lower end included; below 0.5 an SAE has collapsed."""


@dataclass(frozen=True)
class Point:
    """One SAE: where it lies and what it is called."""

    label: str
    metrics: Mapping[str, float]
    hook_point: str = ""
    group: str = ""
    """Points of one group share a colour (an architecture, a study)."""
    collapsed: bool = False
    """By its study's rule: no candidate for any front."""
    infeasible: bool = False
    """It violates a constraint of its study: no candidate either."""

    @property
    def usable(self) -> bool:
        """Whether it is a candidate for a front."""
        return not (self.collapsed or self.infeasible)

    def __getitem__(self, metric: str) -> float:
        value = value_of(self.metrics, metric)
        return math.nan if value is None else value


def _cost(point: Point, metric: str) -> float:
    return -point[metric] if more_is_better(metric) else point[metric]


def pareto_front(points: Iterable[Point], x: str = "l0", y: str = "fvu") -> list[Point]:
    """The points that no other point beats in both metrics, by ascending cost in x.

    Collapsed points, those that violate a constraint and those with a missing, NaN or infinite value are left out; of
    points equal in both, the first stays.
    """
    usable = [p for p in points if p.usable and math.isfinite(p[x]) and math.isfinite(p[y])]
    front: list[Point] = []
    for point in sorted(usable, key=lambda p: (_cost(p, x), _cost(p, y))):
        if not front or _cost(point, y) < _cost(front[-1], y):
            front.append(point)
    return front


def best_in_ranges(
    points: Iterable[Point], ranges: Sequence[tuple[float, float]] = L0_RANGES, by: str = "fvu"
) -> list[tuple[tuple[float, float], Point | None, int]]:
    """(range, best point by a metric or None, number of points) for each range of L0."""
    usable = [p for p in points if math.isfinite(p["l0"]) and math.isfinite(p[by])]
    found: list[tuple[tuple[float, float], Point | None, int]] = []
    for low, high in ranges:
        inside = [p for p in usable if low <= p["l0"] < high]
        found.append(((low, high), min(inside, key=lambda p: _cost(p, by), default=None), len(inside)))
    return found
