"""All studies of a store. Imports no torch."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from saeopt.config.study import StudySpec
from saeopt.console import unbroken
from saeopt.trials import claims, presence
from saeopt.trials.internals import queries
from saeopt.trials.refine import REFINED, rows_of
from saeopt.trials.storage import SPEC_KEY, Store
from saeopt.views import recommended as auto
from saeopt.views.spending import spending
from saeopt.views.status import NAMES, STATES


def list_rows(store: Store) -> list[dict[str, Any]]:
    """All studies of a store: name, trials by state, workers alive, and whether it is open, stopped, ended or done."""
    counts, now = queries.state_counts(store.engine), store.now().replace(tzinfo=dt.UTC).timestamp()
    rows = []
    for name, study_id in queries.study_ids(store.engine).items():
        known = queries.attributes(store.engine, study_id, "saeopt:")
        trials = {NAMES[state]: counts.get(study_id, {}).get(state, 0) for state in STATES}
        open_now = "open" if trials["waiting"] + trials["running"] or _refines(store, study_id, known) else "done"
        if open_now == "open" and _has_ended(store, study_id, known):
            open_now = "ended"
        state = "stopped" if known.get(claims.STOPPED) else open_now
        alive = sum(worker.alive for worker in presence.workers(known, now))
        rows.append({"study": name, **trials, "workers": alive, "state": state})
    return rows


def _has_ended(store: Store, study_id: int, known: Mapping[str, Any]) -> bool:
    """Whether what waits in a study is not begun any more."""
    return (text := known.get(SPEC_KEY)) is not None and bool(spending(store, study_id, StudySpec.from_json(text)).over)


def _refines(store: Store, study_id: int, known: Mapping[str, Any]) -> bool:
    """Whether a worker will add trials to a study whose trials have all ended."""
    spec = StudySpec.from_json(text) if '"refine": true' in (text := known.get(SPEC_KEY) or "") else None
    return spec is not None and auto.awaited(spec, rows_of(store, study_id), known.get(REFINED) or [])


def list_table(store: Store) -> RenderableType:
    """All studies of a store."""
    rows = list_rows(store)
    hidden = [] if any(row["paused"] for row in rows) else ["paused"]
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold cyan")
    table.add_column("study", overflow="fold")
    for name in (*NAMES.values(), "workers", "state"):
        if name not in hidden:
            table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(str(value) for name, value in row.items() if name not in hidden))
    return Group(unbroken(f"studies in {store.shown}"), table)
