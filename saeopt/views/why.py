"""Why trials ended as they did: what their workers stored, one line each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from saeopt.trials.attributes import INFEASIBLE, REASON
from saeopt.trials.internals import queries
from saeopt.trials.internals.queries import TrialRow
from saeopt.trials.storage import Store
from saeopt.views.logs import find_trial

_WITHOUT = {
    "COMPLETE": "trained to its end",
    "WAITING": "it waits for a worker",
    "RUNNING": "it is being trained",
}
EARLY = ("PAUSED", "PRUNED", "FAIL")


@dataclass(frozen=True)
class Why:
    """A trial and its reason."""

    trial: int
    state: str
    reason: str | None
    samples: int | None
    """How far it came."""

    @property
    def text(self) -> str:
        """One line."""
        return (
            f"trial {self.trial} ({self.state.lower()}): {self.reason or _WITHOUT.get(self.state, 'no reason stored')}"
        )

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {"trial": self.trial, "state": self.state, "reason": self.reason, "samples": self.samples}


def why(row: TrialRow) -> Why:
    """What is known of a trial."""
    violated = row.attributes.get(INFEASIBLE)
    reasons = [row.attributes.get(REASON), f"violates a constraint: {violated}" if violated else None]
    reason = "; ".join(filter(None, reasons)) or None
    return Why(row.number, row.state, reason, row.attributes.get("samples"))


def explained(store: Store, name: str, trial: int | None = None) -> list[Why]:
    """One trial, or all that ended early. :class:`UserError` where there is no such trial."""
    if trial is not None:
        return [why(find_trial(store, name, str(trial))[0])]
    rows = queries.trial_rows(store.engine, store.study_id(name))
    return [why(row) for row in rows if row.state in EARLY]
