"""`saes.target_l0: auto`: what the tried L0s recommend, and the trials around it, which come once.

A combination is a choice of all other parameters. When its trials have all ended, whoever is at work adds up to three
more for it, in one transaction with the note that it did: many workers at once add them once, and what a worker that
was killed did not do the next one does.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from saeopt.config.study import StudySpec
from saeopt.console import log
from saeopt.errors import UserError
from saeopt.search.collapse import rule_of, why_collapsed
from saeopt.search.signs import Favoured, Sign, around, favoured, usable
from saeopt.search.space import Cell, Space
from saeopt.trials import internals as db
from saeopt.trials import states
from saeopt.trials.attributes import evaluation_of, number
from saeopt.trials.internals import queries
from saeopt.trials.internals.queries import TrialRow
from saeopt.trials.storage import Store, check_identity
from saeopt.trials.waiting import STREAM

REFINED = "saeopt:refined"
"""Study: the combinations that have got their refinement."""
RECOMMENDED = "recommended_l0"
"""Study (for the dashboard and other programs): what :func:`recommendations` says."""
_ENDED = ("COMPLETE", "PRUNED", "FAIL")


@dataclass(frozen=True)
class Recommendation:
    """The L0 for one combination at one hook point, with its curve."""

    params: dict[str, Any]
    hook_point: str
    favoured: Favoured | None
    curve: list[Sign]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        found = asdict(self.favoured) if self.favoured else {"l0": None, "trial": None, "at_edge": None}
        curve = [{name: number(value) for name, value in asdict(sign).items()} for sign in self.curve]
        return {"params": self.params, "hook_point": self.hook_point, **found, "curve": curve}


class Refinement:
    """The refinement of a study, as one worker does it."""

    def __init__(self, store: Store, study_id: int, space: Space, identity: str | None) -> None:
        self.store, self.study_id, self.space, self.identity = store, study_id, space, identity
        self._seen = -1

    def step(self) -> int:
        """Add what is due and tell what is recommended, where trials have ended since the last step."""
        if not self.space.refined:
            return 0
        with self.store.read() as connection:
            counts = db.counts(connection, self.study_id)
        ended = sum(counts[state] for state in _ENDED)
        if ended == self._seen:
            return 0
        added = self._under_lock()
        self._seen = ended
        return added

    def _under_lock(self) -> int:
        added, space = 0, self.space
        distributions = {p.name: p.distribution for p in space.parameters}
        with self.store.write() as connection:
            check_identity(connection, self.study_id, self.identity)
            first = db.next_number(connection, self.study_id)
            rows = rows_of(self.store, self.study_id)
            done = refined(db.get_attrs(connection, db.study_attrs, self.study_id, REFINED))
            found = due(space, rows, done)
            for group in found.values():
                new: list[db.TrialToCome] = [
                    ({name: (value, distributions[name]) for name, value in cell.params.items()}, {STREAM: cell.stream})
                    for cell in cells_around(space, group)
                ]
                states.create(connection, self.study_id, first + added, new)
                added += len(new)
            if found:
                db.set_attrs(connection, db.study_attrs, self.study_id, {REFINED: sorted(done | found.keys())})
            told = {RECOMMENDED: [one.as_json() for one in recommendations(space, rows)]}
            db.set_attrs(connection, db.study_user_attrs, self.study_id, told)
        if added:
            log.info("study %s: %d trials around the L0 that the decoders favour", space.spec.name, added)
        return added


def refined(attributes: Mapping[str, Any]) -> set[str]:
    """The combinations of :data:`REFINED`."""
    return set(attributes.get(REFINED) or [])


def rows_of(store: Store, study_id: int) -> list[TrialRow]:
    """All trials with parameters and evaluations."""
    rows = queries.trial_rows(store.engine, study_id)
    queries.add_params(store.engine, rows, study_id)
    return rows


def due(space: Space, rows: Iterable[TrialRow], done: Collection[str]) -> dict[str, list[TrialRow]]:
    """The combinations whose trials have all ended and that have got no refinement: a key each, and their trials."""
    groups = {key: group for key, group in _combinations(space, rows).items() if key not in done}
    return {key: group for key, group in groups.items() if all(row.state in _ENDED for row in group)}


def cells_around(space: Space, group: list[TrialRow]) -> list[Cell]:
    """Trials to come for a combination: around what is favoured at each of its hook points."""
    (name,) = _refined_in(space, group[0].params)
    tried = [int(row.params[name]) for row in group]
    wanted = {l0 for signs in _signs(space.spec, group).values() for l0 in around(signs, tried)}
    cells = []
    for l0 in sorted(wanted):
        try:
            cells.append(space.cell({**group[0].params, name: l0}))
        except UserError as error:
            log.warning("%s: left out", error)
    return cells


def recommendations(space: Space, rows: Iterable[TrialRow]) -> list[Recommendation]:
    """What is recommended so far, per combination and hook point."""
    found = []
    for group in _combinations(space, rows).values():
        names = _refined_in(space, group[0].params)
        params = {name: value for name, value in group[0].params.items() if name not in names}
        for hook, signs in _signs(space.spec, group).items():
            found.append(Recommendation(params, hook, favoured(signs), usable(signs)))
    return found


def _combinations(space: Space, rows: Iterable[TrialRow]) -> dict[str, list[TrialRow]]:
    groups: dict[str, list[TrialRow]] = {}
    for row in rows:
        names = _refined_in(space, row.params)
        if names:
            rest = {name: value for name, value in row.params.items() if name not in names}
            groups.setdefault(json.dumps(rest, sort_keys=True), []).append(row)
    return groups


def _refined_in(space: Space, params: Mapping[str, Any]) -> list[str]:
    return [p.name for p in space.refined if p.name in params]


def _signs(spec: StudySpec, group: Iterable[TrialRow]) -> dict[str, list[Sign]]:
    """Hook point → the signs of a combination's SAEs that have not collapsed."""
    rule, found = rule_of(spec), dict[str, list[Sign]]()
    for row in group:
        for hook, metrics in evaluation_of(row.attributes).items():
            if row.state in _ENDED and why_collapsed(rule, metrics) is None and "c_dec" in metrics:
                dead, s_dec = metrics.get("fraction_dead", 0.0), metrics.get("s_dec", float("nan"))
                found.setdefault(hook, []).append(Sign(row.number, metrics["l0"], metrics["c_dec"], s_dec, dead))
    return found
