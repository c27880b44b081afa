"""The L0 that a study with `saes.target_l0: auto` recommends, as people see it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.columns import Columns
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from saeopt.config.study import StudySpec
from saeopt.console import titled
from saeopt.search.space import Space
from saeopt.trials.internals.queries import TrialRow
from saeopt.trials.refine import Recommendation, due, recommendations, rows_of
from saeopt.trials.storage import Store


def recommended(spec: StudySpec, rows: Sequence[TrialRow]) -> list[Recommendation]:
    """What the trials recommend so far; `rows` with their parameters."""
    space = Space(spec)
    return recommendations(space, rows) if space.refined else []


def read(store: Store, name: str, hook: str | None = None) -> list[Recommendation]:
    """What a study recommends so far, at one hook point or all."""
    found = recommended(store.spec(name), rows_of(store, store.study_id(name)))
    return [one for one in found if hook in (None, one.hook_point)]


def awaited(spec: StudySpec, rows: Sequence[TrialRow], done: Iterable[str]) -> bool:
    """Whether a worker will add trials around what the trials that have ended recommend."""
    space = Space(spec)
    return bool(space.refined and due(space, rows, set(done)))


def recommended_table(found: Sequence[Recommendation]) -> RenderableType | None:
    """A line per combination and hook point, and the curve that it was read from."""
    if not found:
        return None
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold cyan")
    for name in ("hook point", "L0", "curve"):
        table.add_column(name, overflow="fold")
    for one in found:
        params = ", ".join(v if isinstance(v, str) else f"{k.rpartition('.')[2]} {v}" for k, v in one.params.items())
        items = [Text(f"{s.l0:.3g} {s.c_dec:.4f} {s.s_dec:.3f}", no_wrap=True) for s in one.curve]
        place = f"{params}: {one.hook_point}" if params else one.hook_point
        table.add_row(place, _l0(one), Columns(items or ["–"]))
    title = "\nrecommended L0 (? the end of the curve, the right one may lie beyond); curve as L0 c_dec s_dec"
    return titled(title, table)


def _l0(one: Recommendation) -> str:
    if one.favoured is None:
        return "–"
    return f"{one.favoured.l0}{'?' if one.favoured.at_edge else ''} (#{one.favoured.trial})"


def as_json(found: Iterable[Recommendation]) -> list[dict[str, Any]]:
    """The same for programs."""
    return [one.as_json() for one in found]
