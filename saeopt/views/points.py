"""The SAEs of a study as points: which are candidates, what they are called, and how much of the plane they cover."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy import Engine

from saeopt.config.limits import COSTS
from saeopt.config.study import StudySpec
from saeopt.search.collapse import COLLAPSED, rule_of, why_collapsed
from saeopt.search.constraints import why_infeasible
from saeopt.search.pareto import Point, pareto_front
from saeopt.trials.attributes import REASON, evaluation_of
from saeopt.trials.internals import queries
from saeopt.trials.internals.queries import TrialRow


def was_evaluated(row: TrialRow) -> bool:
    """Whether a trial was trained to its end: complete, or pruned because it had collapsed."""
    return row.state == "COMPLETE" or (
        row.state == "PRUNED" and str(row.attributes.get(REASON, "")).startswith(COLLAPSED)
    )


def points_of(spec: StudySpec, row: TrialRow) -> list[Point]:
    """A point per hook point of a trial, collapsed and infeasible SAEs too; the architecture is its group, where it is
    known."""
    rule, group = rule_of(spec), str(row.params.get("saes.sae_type", spec.base_sae_type))
    cost = {name: row.attributes[name] for name in COSTS if name in row.attributes}

    def out(metrics: Mapping[str, float]) -> tuple[bool, bool]:
        return why_collapsed(rule, metrics) is not None, why_infeasible(spec, metrics, cost) is not None

    return [
        Point(f"#{row.number}", metrics, hook, group, *out(metrics))
        for hook, metrics in evaluation_of(row.attributes).items()
    ]


def candidates(points: Iterable[Point]) -> list[Point]:
    """The points that are no collapsed SAEs and violate no constraint."""
    return [point for point in points if point.usable]


def fronts(points: Iterable[Point], x: str = "l0", y: str = "fvu") -> dict[str, list[Point]]:
    """Hook point → its front of candidates."""
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
    return [point for row in rows for point in points_of(spec, row)]
