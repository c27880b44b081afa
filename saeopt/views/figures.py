"""Figures that optuna-dashboard draws beside its own: the front in colours, and the curves under their name.

Small: the dashboard reads them with every look at a study, in pieces of 2,045 characters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import optuna
from sqlalchemy import Engine

from saeopt.search.pareto import Point
from saeopt.spread import STD
from saeopt.trials.internals import queries
from saeopt.views.importance import HookImportances, explained
from saeopt.views.plots import COLOURS
from saeopt.views.points import candidates, fronts

if TYPE_CHECKING:
    import plotly.graph_objects as go

_SAES, _CURVES, _STEPS = 200, 20, 25
"""Newest SAEs of the front figure, newest trials of the curves, and points of each."""
_SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "star")


def front_figure(points: Sequence[Point]) -> go.Figure:
    """L0 against explained variance: a colour per architecture, a symbol and a line (its front) per hook point."""
    import plotly.graph_objects as go

    plot = go.Figure()
    shown = [p for p in candidates(points) if math.isfinite(p["fvu"])]
    hooks = list(dict.fromkeys(p.hook_point for p in shown))
    groups = list(dict.fromkeys(p.group for p in shown))

    def name(*parts: str) -> str:
        return " · ".join(part for part in parts if part and (part != parts[-1] or len(hooks) > 1 or len(parts) == 1))

    for i, group in enumerate(groups):
        for j, hook in enumerate(hooks):
            here = [p for p in shown[-_SAES:] if p.group == group and p.hook_point == hook]
            if here:
                plot.add_scatter(
                    x=[p["l0"] for p in here], y=[1 - p["fvu"] for p in here], text=[p.label for p in here],
                    mode="markers", name=name(group, hook),
                    marker={"color": COLOURS[i % len(COLOURS)], "symbol": _SYMBOLS[j % len(_SYMBOLS)]},
                    error_y=_spread(here),
                )  # fmt: skip
    for hook, front in fronts(points).items():
        x, y = [p["l0"] for p in front], [1 - p["fvu"] for p in front]
        line = {"color": "#666666", "width": 1, "shape": "hv"}
        plot.add_scatter(x=x, y=y, mode="lines", line=line, name=name("front", hook))
    plot.update_layout(title="Sparsity against fidelity", xaxis={"type": "log", "title": "L0"})
    plot.update_layout(yaxis={"title": "explained variance"}, template=None)  # the template alone has 7,000 characters
    return plot


def _spread(points: Sequence[Point]) -> dict[str, object] | None:
    """The standard deviation over seeds, where there are several."""
    found = [p["fvu" + STD] for p in points]
    return {"array": [float(f"{std:.2g}") for std in found]} if all(map(math.isfinite, found)) else None


def curves_figure(engine: Engine, study_id: int, name: str) -> go.Figure:
    """What trials reported while they trained, of the newest ones. (The dashboard calls it "Objective Value".)"""
    import plotly.graph_objects as go

    plot = go.Figure()
    for number, curve in queries.curves(engine, study_id, _CURVES).items():
        wanted = curve[:: -(-len(curve) // _STEPS)]
        wanted += curve[-1:] if wanted[-1] != curve[-1] else []
        x, y = [step for step, _ in wanted], [float(f"{value:.4g}") for _, value in wanted]
        plot.add_scatter(x=x, y=y, mode="lines", name=f"#{number}")
    plot.update_layout(title=f"{name} while training", xaxis={"title": "samples"}, yaxis={"title": name}, template=None)
    return plot


def importance_figure(found: Sequence[HookImportances]) -> go.Figure:
    """Share of the variance that each parameter explains: a group of bars per parameter, a bar per objective and hook
    point."""
    import plotly.graph_objects as go

    plot = go.Figure()
    for i, (hook, objective, shares) in enumerate(explained(found)):
        name = " · ".join([objective, *([hook] if len(found) > 1 else [])])
        heights = [float(f"{share:.3g}") for share in shares.values()]
        plot.add_bar(x=list(shares), y=heights, name=name, marker={"color": COLOURS[i % len(COLOURS)]})
    plot.update_layout(title="What mattered: share of the variance (fANOVA)", barmode="group", template=None)
    plot.update_layout(yaxis={"title": "share of the variance", "range": [0, 1]})
    return plot


def save(study: optuna.Study, figure: go.Figure, key: str) -> None:
    """Store a figure, in place of the one that had this key."""
    from optuna_dashboard import save_plotly_graph_object

    save_plotly_graph_object(study, figure, graph_object_id=key)
