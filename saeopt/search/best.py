"""The best SAEs of a study as tables: the front per hook point, and the best per range of L0."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from saeopt.errors import UserError
from saeopt.evaluation.pareto import L0_RANGES, Point, best_in_ranges
from saeopt.search import queries
from saeopt.search.attributes import not_found
from saeopt.search.points import candidates, fronts, points_of
from saeopt.search.storage import Store

COLUMNS = (("l0", "L0", ".1f"), ("fvu", "FVU", ".4f"), ("ce_recovered", "CE recovered", ".3f"), ("kl", "KL", ".3f"),
           ("fraction_dead", "dead", ".1%"))  # fmt: skip


def load_points(store: Store, name: str) -> tuple[list[Point], dict[str, dict[str, Any]]]:
    """All evaluated SAEs of a study, and the parameters of each trial by label (`#7`)."""
    spec, study_id = store.spec(name), store.study_id(name)
    rows = [row for row in queries.trial_rows(store.engine, study_id) if row.state == "COMPLETE"]
    queries.add_params(store.engine, rows, study_id)
    found: list[Point] = []
    for row in rows:
        found += points_of(row.number, row.attributes, str(row.params.get("saes.sae_type", spec.base_sae_type)))
    return found, {f"#{row.number}": row.params for row in rows}


def chosen(points: list[Point], hook: str | None) -> list[Point]:
    """The points of one hook point. :class:`UserError` lists those that there are."""
    if hook is None:
        return points
    here = [p for p in points if p.hook_point == hook]
    if not here and points:
        raise not_found("hook point", hook, dict.fromkeys(p.hook_point for p in points))
    return here


def best_tables(points: list[Point], params: Mapping[str, Mapping[str, Any]], by: str = "fvu") -> RenderableType:
    """A front and a table of ranges per hook point. :class:`UserError` if no trial has an evaluation."""
    if not points:
        raise UserError("no trial has been evaluated yet")
    if not any(math.isfinite(p[by]) for p in points):
        raise not_found("metric", by, dict.fromkeys(m for p in points for m in p.metrics))
    usable, parts = candidates(points), []
    best = fronts(points, y=by)
    for hook in dict.fromkeys(p.hook_point for p in points):
        here = [p for p in usable if p.hook_point == hook]
        n = sum(p.hook_point == hook for p in points)
        parts.append(
            _front_table(f"{hook}: Pareto front of {n} SAEs ({n - len(here)} collapsed)", best.get(hook, []), params)
        )
        parts.append(_range_table(f"{hook}: best {by} per range of L0", here, params, by))
    return Group(*parts)


def _table(title: str, first: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in first:
        table.add_column(name)
    for _, name, _form in COLUMNS:
        table.add_column(name, justify="right")
    table.add_column("parameters", overflow="fold")
    return table


def _cells(point: Point, params: Mapping[str, Mapping[str, Any]]) -> list[str]:
    numbers = [format(point[key], form) if math.isfinite(point[key]) else "–" for key, _, form in COLUMNS]
    return [*numbers, ", ".join(f"{_short(k)}={_value(v)}" for k, v in params.get(point.label, {}).items())]


def _short(field: str) -> str:
    return field.removeprefix("saes.").removeprefix("data.")


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _front_table(title: str, front: list[Point], params: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table(title, ["trial"])
    for point in front:
        table.add_row(point.label, *_cells(point, params))
    return table


def _range_table(title: str, points: list[Point], params: Mapping[str, Mapping[str, Any]], by: str) -> Table:
    table = _table(title, ["L0 range", "trial"])
    ranges = [*L0_RANGES, (L0_RANGES[-1][1], math.inf)]
    for (low, high), point, n in best_in_ranges(points, ranges, by):
        if point is not None and n:
            span = f"{low:g} to {high:g}" if math.isfinite(high) else f"from {low:g}"
            table.add_row(span, point.label, *_cells(point, params))
    return table
