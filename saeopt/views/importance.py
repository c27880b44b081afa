"""Which parameters mattered, for each hook point and objective of a study."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from saeopt.console import unbroken
from saeopt.errors import UserError
from saeopt.search.importance import Importances, Tried, importances
from saeopt.search.objectives import label, value_at
from saeopt.search.pareto import Point
from saeopt.search.space import Space
from saeopt.trials.storage import Store
from saeopt.views.best import Trained
from saeopt.views.points import candidates

TOGETHER = "only together"
"""What is said of the rest: what no parameter explains by itself."""


@dataclass(frozen=True)
class HookImportances:
    """What mattered at one hook point: objective → shares, or why there are none."""

    hook_point: str
    objectives: dict[str, Importances | str]


def find_importances(
    store: Store, name: str, points: Sequence[Point], trials: Mapping[str, Trained]
) -> list[HookImportances]:
    """For each hook point of the points, and each objective that looks at it; collapsed SAEs are left out."""
    spec, found = store.spec(name), []
    distributions = {p.name: p.distribution for p in Space(spec).parameters}
    for hook in dict.fromkeys(point.hook_point for point in points):
        here = [point for point in candidates(points) if point.hook_point == hook]
        told: dict[str, Importances | str] = {}
        for objective in spec.objectives:
            wanted = objective.hook_points
            if wanted not in ("mean", "all") and hook not in ([wanted] if isinstance(wanted, str) else wanted):
                continue
            values = [(point.label, value_at(spec, objective, point.metrics)) for point in here]
            tried = [Tried(trials[number].params, value) for number, value in values if value is not None]
            try:
                told[label(objective)] = importances(tried, distributions)
            except UserError as error:
                told[label(objective)] = str(error)
        found.append(HookImportances(hook, told))
    return found


def explained(found: Sequence[HookImportances]) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(hook point, objective, shares) where there are any; what no parameter explains by itself is the last share."""
    for here in found:
        for objective, value in here.objectives.items():
            if isinstance(value, Importances):
                yield here.hook_point, objective, {**value.shares, TOGETHER: value.together}


def importance_plot(found: Sequence[HookImportances], path: str | Path) -> Path:
    """A panel per hook point: a group of bars per parameter, a bar per objective."""
    from saeopt.views import plots

    rows: dict[str, dict[str, dict[str, float]]] = {}
    for hook, objective, shares in explained(found):
        rows.setdefault(hook, {})[objective] = shares
    n = max(len({name for shares in told.values() for name in shares}) for told in rows.values())
    figure, axes = plots.canvas(1, len(rows), width=6.4, height=1.0 + 0.4 * n)
    colours = dict(
        zip(dict.fromkeys(name for told in rows.values() for name in told), cycle(plots.COLOURS), strict=False)
    )
    for axis, (hook, told) in zip(axes, rows.items(), strict=True):
        names = list(dict.fromkeys(name for shares in told.values() for name in shares if name != TOGETHER))
        names.append(TOGETHER)
        thick = 0.8 / len(told)
        for i, (objective, shares) in enumerate(told.items()):
            places = [j - 0.4 + (i + 0.5) * thick for j in range(len(names))]
            widths = [shares.get(name, 0.0) for name in names]
            axis.barh(places, widths, thick, label=objective, color=colours[objective])
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.set_title(hook, fontsize=10)
        axis.legend(fontsize=7)
    axes[-1].set_xlabel("share of the variance that a parameter explains by itself (fANOVA)")
    return plots.save(figure, path)


def importance_tables(found: Sequence[HookImportances]) -> RenderableType:
    """A table per hook point: a row per parameter, a column per objective."""
    parts: list[RenderableType] = []
    for here in found:
        told = {name: value for name, value in here.objectives.items() if isinstance(value, Importances)}
        missing = {name: value for name, value in here.objectives.items() if isinstance(value, str)}
        if told:
            n = max(value.n_trials for value in told.values())
            parts.append(unbroken(f"{here.hook_point}: share of the variance of {n} SAEs that each parameter explains"))
            table = Table("parameter")
            for name in told:
                table.add_column(name, justify="right")
            names = dict.fromkeys(name for value in told.values() for name in value.shares)
            for name in names:
                table.add_row(name, *(_percent(value.shares.get(name)) for value in told.values()))
            table.add_row(TOGETHER, *(_percent(value.together) for value in told.values()))
            parts.append(table)
        parts += [unbroken(f"{here.hook_point}: importances for {name}: {reason}") for name, reason in missing.items()]
    return Group(*parts)


def as_json(found: Sequence[HookImportances]) -> dict[str, Any]:
    """Hook point → objective → shares; a reason where there are none."""
    return {
        here.hook_point: {
            name: {"reason": value} if isinstance(value, str)
            else {"trials": value.n_trials, "shares": value.shares, "together": value.together}
            for name, value in here.objectives.items()
        }
        for here in found
    }  # fmt: skip


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"
