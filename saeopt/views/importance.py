"""Which parameters mattered, for each hook point and objective of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
            table.add_row("only together", *(_percent(value.together) for value in told.values()))
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
