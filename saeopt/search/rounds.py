"""Packs for samplers that learn from results: what is proposed together has seen the same results.

A pack as large as the whole study would make such a sampler a random search.
"""

from __future__ import annotations

from saeopt.config.study import StudySpec
from saeopt.search.samplers import n_known

ADAPTIVE = frozenset(["tpe", "gp", "nsga2", "cmaes"])
"""Samplers whose proposals depend on the results so far."""
ROUNDS = 10
"""Rounds of proposals that `pack: auto` leaves."""


def n_proposed(spec: StudySpec) -> int:
    """Trials that a sampler proposes from results; the others are known from the beginning, or left to chance."""
    return (spec.max_trials or 0) - n_known(spec) if spec.sampler.type in ADAPTIVE else 0


def round_size(spec: StudySpec, workers: int = 1) -> int:
    """Most proposals in a pack of `pack: auto`, such that `workers` together leave ten rounds."""
    return max(1, n_proposed(spec) // (ROUNDS * max(workers, 1)))


def proposals_text(spec: StudySpec) -> str | None:
    """What `create` says about trials whose values depend on results; None where there are none."""
    if any(d.refine for alternatives in spec.space.values() for d in alternatives):
        return "up to three trials more will come for each combination, around the L0 that the decoders favour"
    proposed, first = n_proposed(spec), n_known(spec)
    if proposed <= 0:
        return None
    size = min(spec.pack if isinstance(spec.pack, int) else round_size(spec), proposed)
    blind = 0 if first else size
    n_rounds = -(-proposed // size)
    rounds = "1 round" if n_rounds == 1 else f"{n_rounds} rounds"
    return (
        f"{spec.sampler.type} proposes {proposed} of {spec.max_trials} trials in {rounds} of up to {size}"
        f" (one worker): {proposed - blind} will have seen a result, {proposed - size} the result of another proposal"
    )
