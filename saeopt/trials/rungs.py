"""What trials came to at their rungs, kept in the store that all workers share, and who is paused there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from saeopt.config.study import StudySpec
from saeopt.search.collapse import is_hopeless, why_all_collapsed
from saeopt.search.halving import Ranking, Standing, ranked_by
from saeopt.search.objectives import Evaluation, objective_values
from saeopt.trials import claims, waiting
from saeopt.trials import internals as db
from saeopt.trials.attributes import REASON
from saeopt.trials.packing import merging
from saeopt.trials.states import Claim, still_ours
from saeopt.trials.storage import Store
from saeopt.trials.waiting import ALONE

RUNGS = "saeopt:rungs"
"""Trial: samples → objective values there; null: its SAEs had collapsed."""


class Rung:
    """The rungs of one study, as one worker sees them."""

    def __init__(self, store: Store, study_id: int, spec: StudySpec) -> None:
        self.store, self.study_id, self.spec, self.rule = store, study_id, spec, spec.early_stopping
        self.ranking, self.ranked_by = Ranking(spec), ranked_by(spec)

    def values(self, metrics: Evaluation) -> list[float] | None:
        """What is compared; None for a trial that has collapsed, or lacks a finite value of an objective."""
        rule = self.rule.collapse
        if rule is not None and why_all_collapsed(rule, metrics):
            return None
        return objective_values(self.ranked_by, metrics)

    def arrive(self, pack: Mapping[Claim, Evaluation], samples: int, total: int) -> dict[int, str]:
        """Store what the trials of a pack came to; number → reason of those that are paused, and the others may go on.

        All of them are stored before one is judged, so that no order within a pack matters.
        """
        with self.store.write() as connection:
            ours = still_ours(connection, pack)
            known = db.attrs_of(connection, db.trial_attrs, ours, [RUNGS])
            for claim, metrics in pack.items():
                if claim.trial_id in ours:
                    before = known.get((claim.trial_id, RUNGS), {})
                    told = {**before, str(samples): self.values(metrics)}
                    db.set_attrs(connection, db.trial_attrs, claim.trial_id, {RUNGS: told})
        return self.judge([claim for claim in pack if claim.trial_id in ours], samples, total)

    def judge(self, asked: Sequence[Claim], samples: int, total: int) -> dict[int, str]:
        """Number → why it is paused, of trials that have come to a rung; the store notes who goes on."""
        there = {s.number: s for s in self.standings(samples)}
        judged = [claim for claim in asked if claim.number in there]
        found = self.ranking.verdicts(list(there.values()), [c.number for c in judged if not c.promoted])
        claims.stood(self.store, [claim for claim in judged if claim.number not in found], samples)
        return {n: f"paused by halving at {samples} of {total} samples: {why}" for n, why in found.items()}

    def standings(self, samples: int) -> list[Standing]:
        """Everybody who has come to a rung, without those that failed, diverged or collapsed later."""
        with self.store.read() as connection:
            rows = db.told_in_study(connection, self.study_id, RUNGS)
            ended = [trial_id for trial_id, (_, state, _) in rows.items() if state == "PRUNED"]
            reasons = db.attrs_of(connection, db.trial_user_attrs, ended, [REASON])
        return [
            Standing(number, told[str(samples)])
            for trial_id, (number, state, told) in rows.items()
            if str(samples) in told and state != "FAIL" and not is_hopeless(str(reasons.get((trial_id, REASON), "")))
        ]

    def others_come(self, mine: Sequence[Claim], stream: str, samples: int, most: int) -> bool:
        """Whether survivors of a rung are better given back: others wait at it, or begin before anything else is done.

        A full pack gains nothing, and a trial that is trained alone joins nobody.
        """
        how = merging(self.spec, most)
        if how is None or not mine or len(mine) >= how.most:
            return False
        with self.store.read() as connection:
            if db.attrs_of(connection, db.trial_attrs, [claim.trial_id for claim in mine], [ALONE]):
                return False
            ready = waiting.everyone(connection, self.study_id)
            asked = [w.trial_id for w in ready] if how.results_first else []
            known = db.with_params(connection, asked) if how.results_first else {w.trial_id for w in ready}
        return any(
            w.checkpoint < samples or (w.at_rung and w.checkpoint == samples)
            for w in ready
            if w.trial_id in known and w.stream in (stream, None) and not w.alone and not w.behind
        )
