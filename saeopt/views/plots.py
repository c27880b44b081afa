"""Pictures of runs and studies as PNG files, drawn without a display and written atomically."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeopt.console import log
from saeopt.errors import UserError
from saeopt.files import atomic_write, read_metrics, read_sections
from saeopt.metrics import METRICS, axis_title, measured_in_training
from saeopt.runs.names import CURVES, DENSITY, EVALUATION, METRICS_FILE
from saeopt.search.pareto import Point, pareto_front
from saeopt.spread import STD

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis
    from matplotlib.figure import Figure

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # told apart by the colour-blind


def canvas(columns: int, rows: int, width: float = 4.6, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """A figure without a display, and its panels row by row; sizes in inches each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure atomically, in the format that the path's ending names (PNG where it names none)."""
    ending = Path(path).suffix.lower()[1:]
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=ending if ending in ("pdf", "svg") else "png", dpi=120)
    return Path(path)


def _series(rows: Iterable[Mapping[str, Any]], hook: str, metric: str) -> tuple[list[float], list[float]]:
    found = [(r["samples"], r[metric]) for r in rows if r["hook_point"] == hook and _drawable(r.get(metric))]
    return [float(s) for s, _ in found], [float(v) for _, v in found]


def _band(axis: Axes, rows: Iterable[Mapping[str, Any]], hook: str, metric: str, colour: str) -> None:
    """The mean ± its standard deviation, where several seeds were trained; never below 0 (scales are logarithmic)."""
    spread = metric + STD
    here = [r for r in rows if r["hook_point"] == hook and _drawable(r.get(metric)) and _drawable(r.get(spread))]
    x, low = [float(r["samples"]) for r in here], [max(r[metric] - r[spread], r[metric] / 10) for r in here]
    if here:
        axis.fill_between(x, low, [r[metric] + r[spread] for r in here], color=colour, alpha=0.2, linewidth=0)


def _drawable(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _plain_ticks(axis: XAxis | YAxis) -> None:
    """Ticks at 1, 2 and 5 of each decade, written as 20 and not 2·10¹."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _log_scale(axis: Axes) -> None:
    """Logarithmic where everything drawn is positive."""
    import numpy as np

    values = [v for line in axis.get_lines() for v in np.asarray(line.get_ydata(), dtype=float)]
    if values and min(values) > 0:
        axis.set_yscale("log")
        _plain_ticks(axis.yaxis)


def training_curves(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """A panel per metric, a line per hook point; held-out values (`eval_…`) are marked points on a dashed line.

    Of several seeds the line is their mean, with a band of one standard deviation.
    """
    present = {key for row in rows for key, value in row.items() if _drawable(value)}
    panels = [m for m in METRICS.values() if m.panel and {m.name, f"eval_{m.name}"} & present] or [METRICS["loss"]]
    hooks = list(dict.fromkeys(str(row["hook_point"]) for row in rows))
    columns = min(3, len(panels))
    figure, axes = canvas(columns, -(-len(panels) // columns))
    for axis, metric in zip(axes, panels, strict=False):
        for i, hook in enumerate(hooks):
            colour = COLOURS[i % len(COLOURS)]
            held_out = _series(rows, hook, f"eval_{metric.name}")
            axis.plot(*_series(rows, hook, metric.name), color=colour, label=hook, linewidth=1.3)
            _band(axis, rows, hook, metric.name, colour)
            axis.plot(*held_out, color=colour, marker="o", markersize=4, linestyle="--")
        axis.set_title(metric.axis + ("" if measured_in_training(metric.name) else " (held out)"), fontsize=10)
        axis.set_xlabel("samples")
        if metric.logarithmic:
            _log_scale(axis)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    if hooks:
        axes[0].legend(fontsize=7)
    if any(key.startswith("eval_") for key in present):
        figure.supxlabel("lines: training; points: held-out samples", fontsize=8)
    return save(figure, path)


def feature_density(evaluation: Mapping[str, Mapping[str, Any]], path: str | Path) -> Path:
    """Histogram per hook point of log10(share of held-out tokens on which a latent fired)."""
    drawn = {hook: row for hook, row in evaluation.items() if row.get("log10_density")}
    if not drawn:
        raise UserError(f"{path}: the evaluation holds no feature densities")
    figure, axes = canvas(1, len(drawn), width=6.0, height=2.8)
    for axis, (hook, row) in zip(axes, drawn.items(), strict=True):
        density = row["log10_density"]
        axis.stairs(density["counts"], density["edges"], fill=True, color=COLOURS[0])
        dead = row.get("fraction_dead")
        note = f"; never fired: {METRICS['fraction_dead'].text(dead)}" if _drawable(dead) else ""
        axis.set_title(f"{hook} ({row.get('n_tokens', '?')} tokens{note})", fontsize=9)
        axis.set_ylabel("latents")
    axes[-1].set_xlabel("log10 of the share of tokens on which a latent fires")
    return save(figure, path)


def pareto_plot(
    points: Sequence[Point], path: str | Path, *, x: str = "l0", y: Sequence[str] = ("fvu", "ce_recovered")
) -> Path:
    """One panel per metric in `y` against `x`: every point, and the front as a line with labels.

    With points of several hook points there is a row of panels for each.
    """
    hooks = list(dict.fromkeys(p.hook_point for p in points)) or [""]
    groups = list(dict.fromkeys(p.group for p in points))
    shown = [m for m in y if any(math.isfinite(p[m]) for p in points)] or list(y[:1])
    figure, axes = canvas(len(shown), len(hooks), width=5.4, height=4.0)
    for i, axis in enumerate(axes):
        hook, metric = hooks[i // len(shown)], shown[i % len(shown)]
        here = [p for p in points if p.hook_point == hook and math.isfinite(p[x]) and math.isfinite(p[metric])]
        for j, group in enumerate(groups):
            members = [p for p in here if p.group == group]
            colour = COLOURS[j % len(COLOURS)]
            axis.scatter([p[x] for p in members], [p[metric] for p in members], s=22, color=colour, label=group or None)
            for p in members:
                if math.isfinite(p[metric + STD]):
                    axis.errorbar(p[x], p[metric], p[metric + STD], color=colour, linewidth=1)
        front = pareto_front(here, x, metric)
        axis.plot([p[x] for p in front], [p[metric] for p in front], color="#666666", linewidth=1, zorder=0)
        for point in front:
            axis.annotate(point.label, (point[x], point[metric]), fontsize=6, xytext=(4, 4), textcoords="offset points")
        if here and min(p[x] for p in here) > 0:
            axis.set_xscale("log")
            _plain_ticks(axis.xaxis)
        axis.set_xlabel(axis_title(x))
        axis.set_ylabel(axis_title(metric))
        axis.set_title(hook, fontsize=10)
    if any(groups):
        axes[0].legend(fontsize=7)
    return save(figure, path)


def plot_run(run_dir: str | Path) -> list[Path]:
    """Draw what a run folder holds. A picture that cannot be drawn is a warning: it never costs a run."""
    folder = Path(run_dir)
    drawn: list[Path] = []
    try:
        rows = read_metrics(folder / METRICS_FILE)
        if rows:
            drawn.append(training_curves(rows, folder / CURVES))
        if (folder / EVALUATION).exists():
            evaluation = read_sections(folder / EVALUATION)
            if any(row.get("log10_density") for row in evaluation.values()):
                drawn.append(feature_density(evaluation, folder / DENSITY))
    except (UserError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s: cannot be plotted: %s", folder, error)
    return drawn
