"""A trial of a pack while it trains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from saeopt.config.sites import Site
from saeopt.files import write_json
from saeopt.runs.folder import RunFolder
from saeopt.runs.names import BEGUN_FROM
from saeopt.runs.owner import Owner
from saeopt.saes.base import SAE
from saeopt.spread import over_seeds
from saeopt.training.checkpoint import Restored
from saeopt.training.loggers import Sink
from saeopt.training.pack import Member
from saeopt.training.plan import Metrics, TrialPlan, TrialResult


@dataclass
class Trial:
    """Its plan, its members, and what is known of its end."""

    plan: TrialPlan
    folder: RunFolder
    members: list[Member]
    sinks: list[Sink] = field(default_factory=list)
    ended: TrialResult | None = None
    """How it had ended before, where it starts at its end: nothing is left to do and nothing is written."""
    written: set[tuple[str, bool]] = field(default_factory=set)
    """Rows that its metrics hold already at the samples at which it starts: hook point, whether an evaluation."""
    result: TrialResult | None = None
    owner: Owner | None = None
    """Whose the folder is where nobody had taken it before."""

    @property
    def active(self) -> list[Member]:
        return [m for m in self.members if m.reason is None]

    def describe(self) -> None:
        """Write what it is: its config, and what its SAEs were begun from where that is not new weights."""
        self.folder.write_config(self.plan.config)
        if begun := {m.key: m.begun_from for m in self.members if m.begun_from}:
            write_json(self.folder.path / BEGUN_FROM, begun)

    def finish_sinks(self, status: str) -> None:
        """No more rows come."""
        for sink in self.sinks:
            sink.finish(status)
        self.sinks = []

    def ended_before(self, found: Restored, total: int, evaluates: bool) -> TrialResult | None:
        """How a trial ended at this very checkpoint, all its files written; None where something is left to do."""
        status = self.folder.status()
        if found.ended is not None or found.samples < total or status.get("status") != "finished":
            return found.ended
        evaluation = self.folder.evaluation() if evaluates else {}
        if evaluation is None:
            return None
        return TrialResult("finished", found.samples, status.get("reason"), evaluation)


def by_hook_point(measured: Iterable[tuple[Member, dict[str, float]]]) -> Metrics:
    """What was measured of a trial's members as a row per hook point, over its seeds."""
    rows: dict[str, list[dict[str, float]]] = {}
    for member, row in measured:
        rows.setdefault(member.hook_point, []).append(row)
    return {hook: over_seeds(found) for hook, found in rows.items()}


def saes_of(trials: Iterable[Trial]) -> dict[tuple[str, str], tuple[Site, dict[int, SAE]]]:
    """(trial, hook point) → the site and the SAE of each seed."""
    found: dict[tuple[str, str], tuple[Site, dict[int, SAE]]] = {}
    for trial in trials:
        for member in trial.members:
            found.setdefault((trial.plan.name, member.hook_point), (member.site, {}))[1][member.seed] = member.sae
    return found


def named(metrics: Metrics) -> Metrics:
    """Held-out metrics under the names that they have beside those of training."""
    return {hook: {f"eval_{name}": value for name, value in row.items()} for hook, row in metrics.items()}


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row."""
    return {k: v for k, v in row.items() if isinstance(v, int | float)}
