"""The best SAEs of a study: the front per hook point, the best per range of L0, and where they lie."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from saeopt.console import log, unbroken
from saeopt.errors import UserError
from saeopt.files import atomic_write
from saeopt.metrics import Shown, shown_in
from saeopt.runs.names import CONFIG, EVALUATION
from saeopt.runs.weights import list_checkpoints
from saeopt.search.pareto import L0_RANGES, Point, best_in_ranges
from saeopt.trials.attributes import RUN_DIR, not_found
from saeopt.trials.internals import queries
from saeopt.trials.refine import Recommendation
from saeopt.trials.storage import Store
from saeopt.views.points import candidates, fronts, points_of, was_evaluated


@dataclass(frozen=True)
class Trained:
    """A trial behind a point."""

    params: dict[str, Any]
    run_dir: Path

    @property
    def weights(self) -> Path | None:
        """Its newest weights; None where its run folder is not on this host."""
        return next((path.absolute() for _, path in list_checkpoints(self.run_dir)), None)

    @property
    def text(self) -> str:
        """Its parameters in one line."""
        return ", ".join(f"{_short(k)}={_value(v)}" for k, v in self.params.items())


@dataclass(frozen=True)
class HookBest:
    """What is best at one hook point."""

    hook_point: str
    n: int
    usable: int
    front: list[Point]
    ranges: list[tuple[tuple[float, float], Point]]


def load_points(store: Store, name: str) -> tuple[list[Point], dict[str, Trained]]:
    """All evaluated SAEs of a study, and the trials by label (`#7`)."""
    spec, study_id = store.spec(name), store.study_id(name)
    rows = list(filter(was_evaluated, queries.trial_rows(store.engine, study_id)))
    queries.add_params(store.engine, rows, study_id)
    found: list[Point] = []
    trials = {}
    for row in rows:
        found += points_of(spec, row)
        here = spec.run_dir(row.number)  # as seen from here, else as its worker saw it
        trials[f"#{row.number}"] = Trained(
            row.params, here if here.is_dir() else Path(row.attributes.get(RUN_DIR, here))
        )
    return found, trials


def chosen(points: list[Point], hook: str | None) -> list[Point]:
    """The points of one hook point. :class:`UserError` lists those that there are."""
    if hook is None:
        return points
    here = [p for p in points if p.hook_point == hook]
    if not here and points:
        raise not_found("hook point", hook, dict.fromkeys(p.hook_point for p in points))
    return here


def find_best(points: list[Point], by: str = "fvu") -> list[HookBest]:
    """The front and the best per range of L0, for each hook point.

    Raises:
        UserError: no trial has an evaluation, or none has the metric.
    """
    if not points:
        raise UserError("no trial has been evaluated yet")
    if not any(math.isfinite(p[by]) for p in points):
        raise not_found("metric", by, dict.fromkeys(m for p in points for m in p.metrics))
    usable, best, found = candidates(points), fronts(points, y=by), []
    limits = [*L0_RANGES, (L0_RANGES[-1][1], math.inf)]
    for hook in dict.fromkeys(p.hook_point for p in points):
        here = [p for p in usable if p.hook_point == hook]
        ranges = [(span, p) for span, p, _ in best_in_ranges(here, limits, by) if p is not None]
        n = sum(p.hook_point == hook for p in points)
        found.append(HookBest(hook, n, len(here), best.get(hook, []), ranges))
    return found


def labels(found: Iterable[HookBest]) -> list[str]:
    """The trials that are best somewhere, in order of their numbers."""
    every = {p.label for b in found for p in [*b.front, *(p for _, p in b.ranges)]}
    return sorted(every, key=lambda label: int(label[1:]))


def best_tables(found: Sequence[HookBest], trials: Mapping[str, Trained], by: str = "fvu") -> RenderableType:
    """Two tables per hook point, then the parameters and the weights of every trial in them."""
    parts: list[RenderableType] = []
    for best in found:
        title = f"{best.hook_point}: Pareto front of {best.n} SAEs ({best.n - best.usable} collapsed)"
        parts.append(_table(title, ["trial"], [[p.label, *_cells(p)] for p in best.front]))
        rows = [[_span(span), p.label, *_cells(p)] for span, p in best.ranges]
        parts.append(_table(f"{best.hook_point}: best {by} per range of L0", ["L0 range", "trial"], rows))
    parts.append(Text("parameters and weights"))
    for label in labels(found):
        trial = trials[label]
        weights = trial.weights or f"not on this host: {trial.run_dir}"
        parts += [Text(f"{label:>5}  {trial.text}"), unbroken(f"       {weights}")]
    return Group(*parts)


def as_json(
    found: Iterable[HookBest], trials: Mapping[str, Trained], advice: Sequence[Recommendation] = ()
) -> dict[str, Any]:
    """The same for programs: hook point → front and ranges, and the recommended L0s of a study that looks for them."""

    def sae(point: Point) -> dict[str, Any]:
        trial = trials[point.label]
        where = {"run_dir": str(trial.run_dir), "weights": None if trial.weights is None else str(trial.weights)}
        return {"trial": int(point.label[1:]), **where, "params": trial.params, "metrics": dict(point.metrics)}

    return {
        best.hook_point: {
            "saes": best.n,
            "collapsed": best.n - best.usable,
            "front": [sae(p) for p in best.front],
            "ranges": [
                {"l0": [low, high if math.isfinite(high) else None], **sae(p)} for (low, high), p in best.ranges
            ],
            **({"recommended_l0": [r.as_json() for r in advice if r.hook_point == best.hook_point]} if advice else {}),
        }
        for best in found
    }


def copy_best(found: Sequence[HookBest], trials: Mapping[str, Trained], folder: Path, study: str) -> list[Path]:
    """Copy weights, config and evaluation of every trial in `found` to `folder/<study>-<trial>/`; gives these folders.

    Raises:
        UserError: none of them has weights on this host.
    """
    made = []
    for label in labels(found):
        weights = trials[label].weights
        if weights is None:
            log.warning("trial %s is not copied: %s holds no weights on this host", label[1:], trials[label].run_dir)
            continue
        target = folder / f"{study}-{label[1:]}"
        for source in (weights, *(weights.with_name(name) for name in (CONFIG, EVALUATION))):
            if source.exists():
                with atomic_write(target / source.name) as temporary:
                    shutil.copyfile(source, temporary)
        made.append(target)
    if not made:
        raise UserError(f"study '{study}': no weights of its best SAEs are on this host")
    return made


def _table(title: str, first: Iterable[str], rows: Iterable[Sequence[str]]) -> RenderableType:
    table = Table()
    for name in first:
        table.add_column(name)
    for metric in shown_in(Shown.TABLE):
        table.add_column(metric.title, justify="right")
    for row in rows:
        table.add_row(*row)
    return Group(unbroken(title), table)


def _cells(point: Point) -> list[str]:
    return [metric.text(point[metric.name]) for metric in shown_in(Shown.TABLE)]


def _span(span: tuple[float, float]) -> str:
    low, high = span
    return f"{low:g} to {high:g}" if math.isfinite(high) else f"from {low:g}"


def _short(field: str) -> str:
    return field.removeprefix("saes.").removeprefix("data.")


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
