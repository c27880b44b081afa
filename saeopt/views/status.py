"""How a study is doing, from a few statements against its tables; the `status` table. Imports no torch."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from saeopt.config.study import TARGET, StudySpec
from saeopt.console import titled, unbroken, wrapped
from saeopt.metrics import METRICS
from saeopt.search.collapse import rule_of, why_all_collapsed
from saeopt.search.objectives import expanded, objective_values
from saeopt.search.pareto import Point
from saeopt.search.rounds import n_proposed, round_size
from saeopt.spread import STD
from saeopt.trials import claims, presence
from saeopt.trials.attributes import INFEASIBLE, PAUSED_AT, REASON, evaluation_of
from saeopt.trials.internals import queries
from saeopt.trials.internals.queries import TrialRow
from saeopt.trials.presence import Presence
from saeopt.trials.refine import REFINED, Recommendation
from saeopt.trials.storage import Store
from saeopt.views import recommended as auto
from saeopt.views.eta import seconds_left
from saeopt.views.points import fronts, points_of, was_evaluated
from saeopt.views.spending import Spending, spending
from saeopt.views.why import why

NAMES = {
    "WAITING": "waiting", "RUNNING": "running", "PAUSED": "paused", "COMPLETE": "complete", "PRUNED": "pruned",
    "FAIL": "failed",
}  # fmt: skip
STATES = tuple(NAMES)
_RECENT = 50
_ROWS = 12
_SILENT_BEATS = 2
"""After so many beats without a sign a worker's trials count as waiting: it was killed, most likely."""


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
    recommended: list[Recommendation] = field(default_factory=list)
    """With `saes.target_l0: auto`."""
    refines: bool = False
    """A worker will add trials around what is recommended."""
    spending: Spending = field(default_factory=Spending)

    def count(self, state: str) -> int:
        """Trials in a state."""
        return sum(row.state == state for row in self.rows)

    @property
    def remaining(self) -> int:
        """Trials that are still to end, as things stand: a study that has ended begins none."""
        return self.count("RUNNING") + (0 if self.spending.over else self.count("WAITING"))

    @property
    def pauses(self) -> bool:
        """Whether a trial of this study can be paused, or is."""
        return self.spec.early_stopping.type == "halving" or self.count("PAUSED") > 0

    @property
    def alive(self) -> list[Presence]:
        """The workers heard of lately."""
        return [worker for worker in self.workers if worker.alive]

    def latest(self, row: TrialRow) -> dict[str, Any]:
        """Samples, L0 and FVU of a running trial as its worker last knew them; None where it said nothing."""
        said = [w.latest[str(row.number)] for w in self.alive if str(row.number) in w.latest]
        known = said[0] if said else {}
        return {"samples": known.get("samples", row.step), "l0": known.get("l0"), "fvu": known.get("fvu")}

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
        """Seconds until the last trial ends: from what the workers know of their packs, else from the pace so far."""
        if not self.remaining:
            return 0.0
        heard = [worker for worker in self.alive if abs(worker.age) <= _SILENT_BEATS * self.spec.heartbeat]
        trained = {number for worker in heard for number in worker.trials}
        queue = [
            r
            for r in self.rows
            if (r.state == "WAITING" and not self.spending.over) or (r.state == "RUNNING" and r.number not in trained)
        ]
        total = max((w.total for w in heard), default=0)
        shares = [1.0 - min(1.0, (row.step or 0) / total) if total else 1.0 for row in queue]
        learns = self.spec.pack == "auto" and n_proposed(self.spec) > 0
        left = seconds_left(heard, shares, round_size(self.spec, len(heard)) if learns else None)
        pace = self.trials_per_hour
        return left if left is not None or not pace else 3600 * self.remaining / pace


def gather(store: Store, name: str) -> Status:
    """Read a study. :class:`UserError` if there is none of that name."""
    study_id, spec = store.study_id(name), store.spec(name)
    rows = queries.trial_rows(store.engine, study_id)
    begun = [row for row in rows if row.state == "RUNNING" or (row.state == "WAITING" and row.start is not None)]
    queries.add_steps(store.engine, begun)
    queries.add_params(store.engine, rows if TARGET in spec.space else [], study_id)
    known = queries.attributes(store.engine, study_id, "saeopt:")
    now = store.now()
    workers = presence.workers(known, now.replace(tzinfo=dt.UTC).timestamp())
    spent = spending(store, study_id, spec)
    found, refines = auto.recommended(spec, rows), auto.awaited(spec, rows, known.get(REFINED) or [])
    return Status(spec, rows, workers, bool(known.get(claims.STOPPED)), now, store.command, found, refines, spent)


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
    """The tables of `status`; they fit into 80 columns, and with a few trials into 24 lines."""
    parts = [_states(status), _pace(status), _workers(status), _running(status), _best(status)]
    parts += [auto.recommended_table(status.recommended), _reasons(status)]
    return Group(*(part for part in parts if part is not None))


def _table() -> Table:
    """Without lines: with `--watch` all of it is to fit into a window."""
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold cyan")


def _states(status: Status) -> RenderableType:
    table = _table()
    shown = [s for s in STATES if s != "PAUSED" or status.pauses]
    for state in shown:
        table.add_column(NAMES[state], justify="right")
    table.add_column("all", justify="right")
    table.add_row(*[str(status.count(state)) for state in shown], str(len(status.rows)))
    parts: list[RenderableType] = [unbroken(f"study {status.spec.name}: trials"), table]
    if status.stopped:
        go_on = status.command("study", "resume", status.spec.name)
        parts.append(unbroken(f"stopped; workers go on after: {go_on}"))
    parts += [unbroken(line) for line in status.spending.lines(status.command, status.spec.name)]
    if status.refines:
        parts.append(unbroken("trials around the recommended L0 will come: a worker adds them"))
    return Group(*parts)


def _pace(status: Status) -> RenderableType:
    table = _table()
    for name in ("workers alive", "trials/h", "tokens/s", "trial-tokens/s", "time left"):
        table.add_column(name, justify="right")
    pace, left = status.trials_per_hour, status.eta_s
    speeds = [(w.tokens_per_s, len(w.trials)) for w in status.alive]
    table.add_row(
        str(len(status.alive)),
        f"{pace:.1f}" if pace else "–",
        f"{sum(s for s, _ in speeds):,.0f}" if speeds else "–",
        f"{sum(s * n for s, n in speeds):,.0f}" if speeds else "–",
        "soon" if status.remaining and left is not None and left < 1 else duration(left),
    )
    return table


def _best(status: Status) -> RenderableType | None:
    done = list(filter(was_evaluated, status.rows))
    points = [p for row in done for p in points_of(status.spec, row)]
    if not points:
        return None
    table = _table()
    table.add_column("hook point", overflow="fold")
    limited = bool(status.spec.constraints)
    for name in ("SAEs", "collapsed", *(["infeasible"] if limited else [])):
        table.add_column(name, justify="right")
    table.add_column("front")
    best = fronts(points)
    for hook in dict.fromkeys(p.hook_point for p in points):
        here = [p for p in points if p.hook_point == hook]
        front = best.get(hook, [])
        shown = front if len(front) <= 6 else [front[round(i * (len(front) - 1) / 5)] for i in range(6)]
        items = [Text(f"{p.label} {p['l0']:.3g} → {_fvu(p)}", no_wrap=True) for p in shown]
        numbers = [len(here), sum(p.collapsed for p in here)]
        numbers += [sum(p.infeasible and not p.collapsed for p in here)] if limited else []
        table.add_row(hook, *map(str, numbers), Columns(items or ["–"]))
    seeds = f" ± over {status.spec.n_seeds} seeds" if status.spec.n_seeds > 1 else ""
    parts: list[RenderableType] = [titled(f"\nbest so far: front as trial, L0 → FVU{seeds}", table)]
    if found := best_value(status.spec, done):
        parts.append(unbroken(f"best {found[0]}: {found[1]:.4g} (trial {found[2]})"))
    return Group(*parts)


def _spreads(point: Point) -> dict[str, float]:
    return {name + STD: point[name + STD] for name in ("l0", "fvu") if name + STD in point.metrics}


def _fvu(point: Point) -> str:
    spread = point["fvu" + STD]
    return f"{point['fvu']:.3f}" + (f" ± {spread:.1g}" if math.isfinite(spread) else "")


def best_value(spec: StudySpec, done: list[TrialRow]) -> tuple[str, float, int] | None:
    """(objective, value, trial) of the best feasible trial of a study with one objective; collapsed ones are not."""
    (name, objective), *others = expanded(spec)
    found = [
        (values[0], row.number)
        for row in done
        if (evaluation := evaluation_of(row.attributes))
        and INFEASIBLE not in row.attributes
        and why_all_collapsed(rule_of(spec), evaluation) is None
        and (values := objective_values(spec, evaluation)) is not None
    ]
    return None if others or not found else (name, *(max if objective.maximised else min)(found))


def _workers(status: Status) -> RenderableType | None:
    if not status.alive:
        return None
    table = _table()
    table.add_column("worker", overflow="fold")
    table.add_column("trials")
    for name in ("progress", "tokens/s", "ended", "sign", "moved"):  # seconds since its last sign, its last progress
        table.add_column(name, justify="right")
    for w in status.alive[:_ROWS]:
        share = f"{w.samples / w.total:.0%}" if w.total else "–"
        ages = [_age(w.age), _age(w.progress_age)]
        table.add_row(w.worker, _numbers(w.trials), share, f"{w.tokens_per_s:,.0f}", str(w.finished), *ages)
    return titled("\nworkers (host/process/device; how long ago: last sign, last progress)", table)


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{max(seconds, 0):.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _numbers(trials: list[int]) -> str:
    """`3–9 12 14–17`, and how many where there are more than a few such runs."""
    runs: list[list[int]] = []
    for number in sorted(trials):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = " ".join(str(r[0]) if len(r) == 1 else f"{r[0]}–{r[-1]}" for r in runs[:4])
    return (shown + f" … ({len(trials)})" if len(runs) > 4 else shown) or "idle"


def _running(status: Status) -> RenderableType | None:
    rows = [row for row in status.rows if row.state == "RUNNING"]
    if not rows:
        return None
    table = _table()
    for name in ("trial", "since", "samples", "L0", "FVU"):
        table.add_column(name, justify="right")
    for row in rows[:_ROWS]:
        since, now = duration(_since(status, row)), status.latest(row)
        step = "–" if now["samples"] is None else f"{now['samples']:,}"
        if now["samples"] is not None and isinstance(total := _total(status), int):
            step += f" of {total:,}"
        numbers = [METRICS[key].text(now[key]) for key in ("l0", "fvu")]
        table.add_row(str(row.number), since, step, *numbers)
    more = [unbroken(f"and {len(rows) - _ROWS} more")] if len(rows) > _ROWS else []
    return Group(titled("\nrunning trials (means over hook points)", table), *more)


def _since(status: Status, row: TrialRow) -> float | None:
    return (status.now - row.start).total_seconds() if row.start else None


def _total(status: Status) -> Any:
    return (status.spec.base.get("data") or {}).get("n_train_samples")


def _reasons(status: Status) -> RenderableType | None:
    name, lines = status.spec.name, []
    stopped = [row for row in status.rows if row.state == "PRUNED"]
    if stopped:
        lines += ["\ntrials that ended early (the newest)", *_why(stopped[-5:])]
        lines += [f"  all:   {status.command('study', 'why', name)}"]
        if was_paused := [row.number for row in stopped if PAUSED_AT in row.attributes]:
            lines += [f"  go on: {status.command('study', 'promote', name, was_paused[-1])}"]
    paused = [row for row in status.rows if row.state == "PAUSED"]
    if paused:
        lines += ["\npaused trials (the newest); they keep their checkpoints", *_why(paused[-5:])]
        lines += [f"  go on: {status.command('study', 'promote', name, paused[-1].number)}"]
    rows = [row for row in status.rows if row.state == "COMPLETE" and INFEASIBLE in row.attributes]
    if rows:
        lines += ["\ntrials that violate a constraint (the newest)"]
        lines += [f"  trial {row.number}: {row.attributes[INFEASIBLE][:200]}" for row in rows[-5:]]
    rows = [row for row in status.rows if row.state == "FAIL"]
    if rows:
        lines += ["\nfailed trials", *_why(rows[:5])]
        lines += [f"  why:   {status.command('study', 'logs', name, rows[0].number)}"]
        lines += [f"  again: {status.command('study', 'retry', name)}"]
    return Group(*(unbroken(line) for line in lines)) if lines else None


def _why(rows: list[TrialRow]) -> list[str]:
    said = [(row.number, str(row.attributes.get(REASON, "no reason stored"))[:200]) for row in rows]
    return [wrapped(f"  trial {number}: {reason}") for number, reason in said]


def as_json(status: Status) -> dict[str, Any]:
    """The same for programs: numbers as they are, null where there is none."""
    done = list(filter(was_evaluated, status.rows))
    points = [p for row in done for p in points_of(status.spec, row)]
    best, top = fronts(points), best_value(status.spec, done)
    return {
        "study": status.spec.name,
        "stopped": status.stopped,
        "seeds": status.spec.n_seeds,
        "ended": status.spending.over,
        "spent": status.spending.account.as_json(),
        "trials": {NAMES[state]: status.count(state) for state in STATES} | {"all": len(status.rows)},
        "trials_per_hour": status.trials_per_hour,
        "seconds_left": status.eta_s,
        "workers": [asdict(worker) for worker in status.alive],
        "running": [
            {"trial": row.number, "seconds": _since(status, row), **status.latest(row)}
            for row in status.rows
            if row.state == "RUNNING"
        ],
        "failed": [
            {"trial": row.number, "reason": row.attributes.get(REASON)} for row in status.rows if row.state == "FAIL"
        ],
        "paused": [why(row).as_json() for row in status.rows if row.state == "PAUSED"],
        "ended_early": [why(row).as_json() for row in status.rows if row.state == "PRUNED"],
        "infeasible": [
            {"trial": row.number, "reason": row.attributes[INFEASIBLE]}
            for row in status.rows
            if row.state == "COMPLETE" and INFEASIBLE in row.attributes
        ],
        "best": top and dict(zip(("objective", "value", "trial"), top, strict=True)),
        "front": {
            hook: [{"trial": int(p.label[1:]), "l0": p["l0"], "fvu": p["fvu"], **_spreads(p)} for p in front]
            for hook, front in best.items()
        },
        "recommended_l0": auto.as_json(status.recommended),
    }
