"""Packs for samplers that learn from results: what is proposed together has seen the same results.

A pack as large as the whole study would make such a sampler a random search.
"""

from __future__ import annotations

import datetime as dt

from saeopt.config.study import StudySpec
from saeopt.search.samplers import n_designed
from saeopt.trials import internals as db
from saeopt.trials import presence
from saeopt.trials.internals import queries
from saeopt.trials.storage import Store

ADAPTIVE = frozenset(["tpe", "gp", "nsga2", "cmaes"])
"""Samplers whose proposals depend on the results so far."""
ROUNDS = 10
"""Rounds of proposals that `pack: auto` leaves."""


def n_proposed(spec: StudySpec) -> int:
    """Trials that a sampler proposes from results; the others are known from the beginning, or left to chance."""
    return (spec.max_trials or 0) - n_designed(spec) if spec.sampler.type in ADAPTIVE else 0


def round_size(spec: StudySpec, workers: int = 1) -> int:
    """Most proposals in a pack of `pack: auto`, such that `workers` together leave ten rounds."""
    return max(1, n_proposed(spec) // (ROUNDS * max(workers, 1)))


def room(store: Store, study_id: int, spec: StudySpec, limit: int, *, auto: bool) -> int:
    """How many trials a worker takes together, at most `limit`: proposals apart from those whose values are known."""
    if limit < 2 or n_proposed(spec) <= 0:
        return limit
    with store.read() as connection:
        known = db.n_waiting_with_params(connection, study_id)
    said, now = queries.attributes(store.engine, study_id, presence.WORKER), store.now().replace(tzinfo=dt.UTC)
    alive = sum(worker.alive for worker in presence.workers(said, now.timestamp()))
    if known:  # the first results are everybody's: several workers share the trials that begin a study
        return min(limit, -(-known // max(alive, 1)))
    return min(limit, round_size(spec, alive)) if auto else limit


def proposals_text(spec: StudySpec) -> str | None:
    """What `create` says about the proposals of an adaptive sampler; None for any other."""
    proposed, first = n_proposed(spec), n_designed(spec)
    if proposed <= 0:
        return None
    size = min(spec.pack if isinstance(spec.pack, int) else round_size(spec), proposed)
    blind = 0 if first else size
    n_rounds = -(-proposed // size)
    return (
        f"{spec.sampler.type} proposes {proposed} of {spec.max_trials} trials in {n_rounds} rounds of up to {size}"
        f" (one worker): {proposed - blind} will have seen a result, {proposed - size} the result of another proposal"
    )
