"""The best SAEs of a study: the front per hook point, the best per range of L0, and where they lie."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from saeopt.console import log, unbroken
from saeopt.errors import UserError
from saeopt.files import atomic_write
from saeopt.metrics import Shown, shown_in
from saeopt.runs.folder import RunFolder
from saeopt.runs.names import CONFIG, EVALUATION
from saeopt.runs.weights import list_checkpoints
from saeopt.search.noise import pooled
from saeopt.search.pareto import L0_RANGES, Point, best_in_ranges
from saeopt.spread import N_SEEDS, text_of
from saeopt.trials.attributes import RUN_DIR, not_found
from saeopt.trials.internals import queries
from saeopt.trials.refine import Recommendation
from saeopt.trials.storage import Store
from saeopt.views.points import candidates, fronts, points_of, was_evaluated

_CLOSE = 8
"""Trials that a line names."""
_RULE = "means ± standard deviation over seeds; trials not named are really worse (95 %)"


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
class Close:
    """SAEs of a range of L0 that are not really worse than the best there; the margin below which all is noise."""

    points: list[Point]
    margin: float


@dataclass(frozen=True)
class HookBest:
    """What is best at one hook point."""

    hook_point: str
    n: int
    usable: int
    front: list[Point]
    ranges: list[tuple[tuple[float, float], Point]]
    close: dict[tuple[float, float], Close] = field(default_factory=dict)
    """Where trials had several seeds: what the best of a range cannot be told apart from."""
    unbeaten: list[Point] = field(default_factory=list)
    """Likewise: not on the front, but no SAE of at most their L0 is really better."""
    collapsed: int = 0
    infeasible: int = 0
    """SAEs that have not collapsed and violate a constraint."""

    @property
    def left_out(self) -> str:
        """`2 collapsed, 1 infeasible`."""
        return f"{self.collapsed} collapsed" + (f", {self.infeasible} infeasible" if self.infeasible else "")


def load_points(store: Store, name: str, infeasible: bool = False) -> tuple[list[Point], dict[str, Trained]]:
    """All evaluated SAEs of a study, and the trials by label (`#7`). With `infeasible` no constraint counts."""
    spec, study_id = store.spec(name), store.study_id(name)
    rows = list(filter(was_evaluated, queries.trial_rows(store.engine, study_id)))
    queries.add_params(store.engine, rows, study_id)
    found: list[Point] = []
    trials = {}
    for row in rows:
        found += [replace(p, infeasible=False) if infeasible else p for p in points_of(spec, row)]
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
        everyone, front = [p for p in points if p.hook_point == hook], best.get(hook, [])
        collapsed = sum(p.collapsed for p in everyone)
        counts = (collapsed, len(everyone) - collapsed - len(here))
        found.append(
            HookBest(hook, len(everyone), len(here), front, ranges, *_unsure(here, front, ranges, by), *counts)
        )
    return found


def _unsure(
    here: list[Point], front: list[Point], ranges: Sequence[tuple[tuple[float, float], Point]], by: str
) -> tuple[dict[tuple[float, float], Close], list[Point]]:
    """What the noise over seeds leaves open: in each range, and beside the front."""
    close, unbeaten = {}, []
    for (low, high), best in ranges:
        inside = [p for p in here if low <= p["l0"] < high and math.isfinite(p[by])]
        if (noise := pooled(inside, by)) is None:
            continue
        alike = [p for p in inside if p is not best and not noise.really_better(best, p)]
        close[low, high] = Close(alike, noise.margin(best, best))
        for point in (p for p in inside if p not in front):
            if not any(p["l0"] <= point["l0"] and noise.really_better(p, point) for p in here if math.isfinite(p[by])):
                unbeaten.append(point)
    return close, unbeaten


def labels(found: Iterable[HookBest]) -> list[str]:
    """The trials that are best somewhere, in order of their numbers."""
    every = {p.label for b in found for p in [*b.front, *(p for _, p in b.ranges)]}
    return sorted(every, key=lambda label: int(label[1:]))


def best_tables(
    found: Sequence[HookBest], trials: Mapping[str, Trained], by: str = "fvu", command: str = ""
) -> RenderableType:
    """Two tables per hook point, then the parameters and the weights of every trial in them.

    `command`: this command, to name its option where a constraint leaves nothing.
    """
    parts: list[RenderableType] = []
    for best in found:
        title = f"{best.hook_point}: Pareto front of {best.n} SAEs ({best.left_out})"
        if not best.usable:
            parts.append(Text(f"{best.hook_point}: no front, none of {best.n} SAEs is usable ({best.left_out})"))
            if best.infeasible:
                parts.append(unbroken(f"also those that violate a constraint: {command} --infeasible"))
            continue
        parts.append(_table(title, ["trial"], [[p.label] for p in best.front], best.front))
        if best.unbeaten:
            parts.append(unbroken(f"beaten within the noise alone: {_labels(best.unbeaten)}"))
        rows, shown = [[_span(span), p.label] for span, p in best.ranges], [p for _, p in best.ranges]
        parts.append(_table(f"{best.hook_point}: best {by} per range of L0", ["L0 range", "trial"], rows, shown))
        parts += _noise_lines(best)
    if shown_trials := labels(found):
        parts.append(Text("parameters and weights"))
    for label in shown_trials:
        trial = trials[label]
        weights = trial.weights or f"not on this host: {trial.run_dir}"
        parts += [Text(f"{label:>5}  {trial.text}"), unbroken(f"       {weights}")]
    return Group(*parts)


def _noise_lines(best: HookBest) -> list[RenderableType]:
    """Of each range, whether its best is really the best."""
    lines: list[RenderableType] = []
    for span, point in best.ranges:
        if (near := best.close.get(span)) and near.points:
            few, more = near.points[:_CLOSE], len(near.points) - _CLOSE
            text = _labels(few) + (f" and {more} more" if more > 0 else "")
            lines.append(Text(f"{_span(span)}: {text} not really worse than {point.label} (noise: {near.margin:.2g})"))
    return lines + ([Text(_RULE)] if best.close else [])


def _labels(points: Iterable[Point]) -> str:
    return ", ".join(p.label for p in points)


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
            "collapsed": best.collapsed,
            "infeasible": best.infeasible,
            "front": [sae(p) for p in best.front],
            "ranges": [
                {"l0": [low, high if math.isfinite(high) else None], **sae(p), **_open(best.close.get((low, high)))}
                for (low, high), p in best.ranges
            ],
            **({"not_really_beaten": _numbers(best.unbeaten)} if best.close else {}),
            **({"recommended_l0": [r.as_json() for r in advice if r.hook_point == best.hook_point]} if advice else {}),
        }
        for best in found
    }


def _open(close: Close | None) -> dict[str, Any]:
    return {} if close is None else {"not_really_worse": _numbers(close.points), "noise": close.margin}


def _numbers(points: Iterable[Point]) -> list[int]:
    return [int(p.label[1:]) for p in points]


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
        folder_of_run = RunFolder(weights.parent)
        sources = [weights, *(weights.with_name(name) for name in (CONFIG, EVALUATION))]
        for other in map(folder_of_run.seed, folder_of_run.seeds()):
            sources += [other.path / weights.name, other.config_path]
        for source in sources:
            if source.exists():
                with atomic_write(target / source.relative_to(weights.parent)) as temporary:
                    shutil.copyfile(source, temporary)
        made.append(target)
    if not made:
        raise UserError(f"study '{study}': no weights of its best SAEs are on this host")
    return made


def _table(title: str, first: Iterable[str], rows: Iterable[Sequence[str]], points: list[Point]) -> RenderableType:
    table, shown = Table(), shown_in(Shown.TABLE, seeds=any(N_SEEDS in p.metrics for p in points))
    for name in first:
        table.add_column(name)
    for metric in shown:
        table.add_column(metric.title, justify="right")
    for row, point in zip(rows, points, strict=True):
        table.add_row(*row, *(text_of(metric, point.metrics) for metric in shown))
    return Group(unbroken(title), table)


def _span(span: tuple[float, float]) -> str:
    low, high = span
    return f"{low:g} to {high:g}" if math.isfinite(high) else f"from {low:g}"


def _short(field: str) -> str:
    return field.removeprefix("saes.").removeprefix("data.")


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
