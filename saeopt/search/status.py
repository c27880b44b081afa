"""How a study is doing, from a few statements against its tables; the `status` table. Imports no torch."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from saeopt.config.study import StudySpec
from saeopt.search import claims, presence, queries
from saeopt.search.attributes import REASON, mean_metric
from saeopt.search.objectives import expanded
from saeopt.search.points import collapsed, fronts, points_of
from saeopt.search.presence import Presence
from saeopt.search.queries import TrialRow
from saeopt.search.storage import Store

STATES = ("WAITING", "RUNNING", "COMPLETE", "PRUNED", "FAIL")
_NAMES = {"WAITING": "waiting", "RUNNING": "running", "COMPLETE": "complete", "PRUNED": "stopped", "FAIL": "failed"}
_RECENT = 50
_ROWS = 12


@dataclass
class Status:
    """A snapshot of a study."""

    spec: StudySpec
    rows: list[TrialRow]
    workers: list[Presence]
    stopped: bool
    now: dt.datetime
    command: Callable[..., str]
    """How a person types a command for this store."""

    def count(self, state: str) -> int:
        """Trials in a state."""
        return sum(row.state == state for row in self.rows)

    @property
    def remaining(self) -> int:
        """Trials that are still to end."""
        return self.count("WAITING") + self.count("RUNNING")

    @property
    def alive(self) -> list[Presence]:
        """The workers heard of lately."""
        return [worker for worker in self.workers if worker.alive]

    @property
    def trials_per_hour(self) -> float | None:
        """Pace of the last trials that ended, counted from when the first of them started."""
        ended = [
            (r.complete, r.start) for r in self.rows if r.complete and r.start and r.state in ("COMPLETE", "PRUNED")
        ]
        recent = sorted(ended)[-_RECENT:]
        if not recent:
            return None
        last = self.now if self.remaining and self.alive else recent[-1][0]
        seconds = (last - min(start for _, start in recent)).total_seconds()
        return 3600 * len(recent) / max(seconds, 1e-3)

    @property
    def eta_s(self) -> float | None:
        """Seconds until the last trial ends at the present pace; before the first end, from the workers' progress."""
        pace = self.trials_per_hour
        if not self.remaining:
            return 0.0
        if pace:
            return 3600 * self.remaining / pace
        shares = [
            (w.samples / w.total, time.time() - w.started, len(w.trials)) for w in self.alive if w.total and w.samples
        ]
        rate = sum(share * trials / max(seconds, 1.0) for share, seconds, trials in shares)
        return self.remaining / rate if rate else None


def gather(store: Store, name: str) -> Status:
    """Read a study. :class:`UserError` if there is none of that name."""
    study_id, spec = store.study_id(name), store.spec(name)
    rows = queries.trial_rows(store.engine, study_id)
    queries.add_steps(store.engine, [row for row in rows if row.state == "RUNNING"])
    known = queries.attributes(store.engine, study_id, "saeopt:")
    now = store.now()
    workers = presence.workers(known, now.replace(tzinfo=dt.UTC).timestamp())
    return Status(spec, rows, workers, bool(known.get(claims.STOPPED)), now, store.command)


def duration(seconds: float | None) -> str:
    """`2 d 3 h`, `3 h 12 min`, `4 min 5 s`; a dash for None."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    parts = []
    for unit, size in units:
        if whole >= size:
            parts.append(f"{whole // size} {unit}")
            whole %= size
    return " ".join(parts[:2]) or "0 s"


def render(status: Status) -> RenderableType:
    """The tables of `status`."""
    parts: list[RenderableType] = [_states(status), _pace(status), _best(status)]
    for part in (_workers(status), _running(status), _reasons(status)):
        if part is not None:
            parts.append(part)
    return Group(*parts)


def _states(status: Status) -> RenderableType:
    table = Table(title=f"study {status.spec.name}: trials", title_justify="left")
    for state in STATES:
        table.add_column(_NAMES[state], justify="right")
    table.add_column("all", justify="right")
    table.add_row(*[str(status.count(state)) for state in STATES], str(len(status.rows)))
    if status.stopped:
        table.caption = f"stopped; workers go on after {status.command('study', 'resume', status.spec.name)}"
    return table


def _pace(status: Status) -> RenderableType:
    table = Table()
    for name in ("workers alive", "trials/h", "tokens/s", "trial-tokens/s", "time left"):
        table.add_column(name, justify="right")
    pace, speeds = status.trials_per_hour, [(w.tokens_per_s, len(w.trials)) for w in status.alive]
    table.add_row(
        str(len(status.alive)),
        f"{pace:.1f}" if pace else "–",
        f"{sum(s for s, _ in speeds):,.0f}" if speeds else "–",
        f"{sum(s * n for s, n in speeds):,.0f}" if speeds else "–",
        duration(status.eta_s),
    )
    return table


def _best(status: Status) -> RenderableType:
    done = [row for row in status.rows if row.state == "COMPLETE"]
    points = [p for row in done for p in points_of(row.number, row.attributes)]
    table = Table(title="best so far", title_justify="left")
    for name, justify in (
        ("hook point", "left"),
        ("SAEs", "right"),
        ("collapsed", "right"),
        ("front (L0 → FVU)", "left"),
    ):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    best = fronts(points)
    for hook in dict.fromkeys(p.hook_point for p in points):
        here = [p for p in points if p.hook_point == hook]
        front = best.get(hook, [])
        shown = front if len(front) <= 6 else [front[round(i * (len(front) - 1) / 5)] for i in range(6)]
        text = ", ".join(f"{p.label} {p['l0']:.3g} → {p['fvu']:.3f}" for p in shown)
        table.add_row(hook, str(len(here)), str(sum(collapsed(p.metrics) for p in here)), text or "–")
    for name, objective in expanded(status.spec) if len(status.spec.objectives) == 1 else []:
        found = [(v, row.number) for row in done if (v := mean_metric(_evaluation(row), objective.metric)) is not None]
        if found:
            value, number = (max if objective.maximised else min)(found)
            table.caption = f"best {name}: {value:.4g} (trial {number})"
    return table


def _evaluation(row: TrialRow) -> dict[str, dict[str, float]]:
    from saeopt.search.attributes import evaluation_of

    return evaluation_of(row.attributes)


def _workers(status: Status) -> RenderableType | None:
    if not status.alive:
        return None
    table = Table(title="workers", title_justify="left")
    for name in ("worker", "device", "trials", "progress", "tokens/s", "told", "last sign", "last progress"):
        table.add_column(name, overflow="fold")
    for w in status.alive[:_ROWS]:
        share = f"{w.samples / w.total:.0%}" if w.total else "–"
        ages = [duration(None if age is None else max(0.0, age)) for age in (w.age, w.progress_age)]
        speed, told = f"{w.tokens_per_s:,.0f}", str(w.finished)
        table.add_row(w.worker, w.device, _numbers(w.trials), share, speed, told, *ages)
    return table


def _numbers(trials: list[int]) -> str:
    shown = " ".join(map(str, trials[:8]))
    return shown + (f" … ({len(trials)})" if len(trials) > 8 else "") or "idle"


def _running(status: Status) -> RenderableType | None:
    rows = [row for row in status.rows if row.state == "RUNNING"]
    if not rows:
        return None
    total: Any = (status.spec.base.get("data") or {}).get("n_train_samples")
    table = Table(title="running trials", title_justify="left")
    for name in ("trial", "since", "samples"):
        table.add_column(name, justify="right")
    for row in rows[:_ROWS]:
        since = duration((status.now - row.start).total_seconds()) if row.start else "–"
        step = "–" if row.step is None else f"{row.step:,}" + (f" of {total:,}" if isinstance(total, int) else "")
        table.add_row(str(row.number), since, step)
    if len(rows) > _ROWS:
        table.caption = f"and {len(rows) - _ROWS} more"
    return table


def _reasons(status: Status) -> RenderableType | None:
    rows = [row for row in status.rows if row.state == "FAIL"]
    if not rows:
        return None
    name, first = status.spec.name, rows[0].number
    text = Text(f"failed trials (why: {status.command('study', 'logs', name, first)};")
    text.append(f" again: {status.command('study', 'retry', name)})\n")
    for row in rows[:5]:
        text.append(f"  trial {row.number}: {str(row.attributes.get(REASON, 'no reason stored'))[:200]}\n")
    return text


def list_table(store: Store) -> Table:
    """All studies of a store."""
    ids = queries.study_ids(store.engine)
    counts = queries.state_counts(store.engine)
    table = Table(title=f"studies in {store.shown}", title_justify="left")
    table.add_column("name", overflow="fold")
    for state in STATES:
        table.add_column(_NAMES[state], justify="right")
    for name in ("workers alive", "stopped"):
        table.add_column(name, justify="right")
    now = store.now().replace(tzinfo=dt.UTC).timestamp()
    for name, study_id in ids.items():
        known = queries.attributes(store.engine, study_id, "saeopt:")
        alive = sum(worker.alive for worker in presence.workers(known, now))
        states = [str(counts.get(study_id, {}).get(state, 0)) for state in STATES]
        table.add_row(name, *states, str(alive), "yes" if known.get(claims.STOPPED) else "no")
    return table
