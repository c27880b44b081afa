"""`stop_when`: a study ends by itself when its front no longer grows, once, whoever of its workers sees it first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from saeopt.config.study import StudySpec
from saeopt.console import log
from saeopt.search import ranking
from saeopt.search.objectives import expanded
from saeopt.trials import internals as db
from saeopt.trials.budget import ENDED, FROM
from saeopt.trials.storage import Store, check_identity

Row = Sequence[float] | None
"""A trial's objective values; None: it is on no front (stopped, collapsed, or violates a constraint)."""
_BEYOND = 0.1
"""Of the front's length, where the reference point lies."""


def gains(spec: StudySpec, rows: Sequence[Row], over: int) -> dict[str, float] | None:
    """Front → by what share the last `over` trials have made its hypervolume larger; `rows` in the order of their ends.

    None: there was no front before them. Fronts are called `mean over hook points` or by their hook points.
    """
    fronts: dict[str, list[int]] = {}
    objectives = [objective for _, objective in expanded(spec)]
    for i, objective in enumerate(objectives):
        name = "mean over hook points" if objective.hook_points == "mean" else str(objective.hook_points)
        fronts.setdefault(name, []).append(i)
    if not any(row is not None for row in rows[: len(rows) - over]):
        return None
    found = {}
    for name, columns in fronts.items():
        logarithmic = {i for i in columns if objectives[i].metric == "l0" and all(r is None or r[i] > 0 for r in rows)}
        costs = [
            None
            if row is None
            else [
                math.log(row[i]) if i in logarithmic else -row[i] if objectives[i].maximised else row[i]
                for i in columns
            ]
            for row in rows
        ]
        found[name] = _gain([c for c in costs[: len(costs) - over] if c is not None], [c for c in costs if c])
    return found


def _gain(before: list[list[float]], now: list[list[float]]) -> float:
    front = [now[i] for i in ranking.non_dominated(now)]
    reference = []
    for column, everyone in zip(zip(*front, strict=True), zip(*now, strict=True), strict=True):
        worst, length = max(column), max(column) - min(column)
        apart = [
            worst + _BEYOND * length,
            median(everyone),
            max(everyone),
            worst + 1.0,
        ]  # the last: all are equal in it
        reference.append(next(limit for limit in apart if limit > worst))
    old, new = ranking.hypervolume(before, reference), ranking.hypervolume(now, reference)
    if old > 0:
        return new / old - 1
    return math.inf if new > 0 else 0.0


class Growth:
    """The end of a study whose front no longer grows, as one worker sees it."""

    def __init__(self, store: Store, study_id: int, spec: StudySpec, identity: str | None) -> None:
        self.store, self.study_id, self.spec, self.identity = store, study_id, spec, identity
        self._seen = -1

    def step(self) -> bool:
        """Where trials have ended since the last step, end the study if its front has not grown; whether it was us."""
        rule = self.spec.stop_when
        if rule is None:
            return False
        with self.store.read() as connection:
            counts = db.counts(connection, self.study_id)
        ended = counts["COMPLETE"] + counts["PRUNED"]
        if ended == self._seen:
            return False
        reason = self._under_lock() if ended >= rule.over else None
        self._seen = ended
        if reason is not None:
            log.info("study %s has ended: %s", self.spec.name, reason)
        return reason is not None

    def _under_lock(self) -> str | None:
        rule = self.spec.stop_when
        assert rule is not None
        with self.store.write() as connection:
            check_identity(connection, self.study_id, self.identity)
            db.lock_study(connection, self.study_id)
            known = db.get_attrs(connection, db.study_attrs, self.study_id, ENDED)
            rows = ended_rows(connection, self.study_id)
            if ENDED in known or len(rows) - int(known.get(FROM, 0)) < rule.over:
                return None
            found = gains(self.spec, rows, rule.over)
            if found is None or max(found.values()) >= rule.hypervolume_gain:
                return None
            name, most = max(found.items(), key=lambda item: item[1])
            reason = (
                f"its front{'s have' if len(found) > 1 else ' has'} not grown by {rule.hypervolume_gain:.3g} over the"
                f" last {rule.over} trials (hypervolume +{most:.2g}{f' at {name}' if len(found) > 1 else ''})"
            )
            db.set_attrs(connection, db.study_attrs, self.study_id, {ENDED: {"reason": reason, "trials": len(rows)}})
            return reason


def ended_rows(connection: db.Connection, study_id: int) -> list[Row]:
    """The complete and pruned trials in the order of their ends."""
    values, out = db.values_of(connection, study_id), db.infeasible(connection, study_id)
    return [
        values.get(trial_id) if state == "COMPLETE" and trial_id not in out else None
        for trial_id, state in db.in_order_of_end(connection, study_id)
    ]
