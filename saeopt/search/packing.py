"""Which trials are trained together: claims of one stream, with their parameters proposed and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from saeopt.config.run import RunConfig, stream_key
from saeopt.config.study import StudySpec
from saeopt.errors import UserError
from saeopt.search import claims, samplers
from saeopt.search import internals as db
from saeopt.search.claims import Claim
from saeopt.search.heart import Heart
from saeopt.search.pruning import make_pruner, warmup_samples
from saeopt.search.space import Space
from saeopt.search.storage import Store, persistently

_ATTEMPTS = 12


@dataclass(frozen=True)
class Assignment:
    """A claimed trial with its config, its folder and the samples that it starts from."""

    claim: Claim
    config: RunConfig
    run_dir: Path
    start: int

    @property
    def name(self) -> str:
        """Unique in a pack."""
        return str(self.claim.number)


def acquire(
    heart: Heart, space: Space, limit: int, owner: Mapping[str, Any], start_of: Callable[[Path, RunConfig], int]
) -> list[Assignment]:
    """Claim up to `limit` trials and return those that share a pack; the others go back to the queue at once.

    Parameters that nobody has proposed yet are proposed now. `start_of` tells the samples of the newest checkpoint in
    a run folder that is usable and of this config.
    """
    store = heart.store
    taken = persistently(lambda: claims.claim(store, heart.study_id, limit, owner), "claiming trials")
    heart.hold(taken)
    pack: list[Assignment] = []
    for claim in taken:
        found = _assignment(heart, space, claim, start_of)
        if found is None:
            heart.drop(claim)
        elif pack and (stream_key(found.config), found.start) != (stream_key(pack[0].config), pack[0].start):
            persistently(partial(claims.release, store, claim, found.start), "giving a trial back")
            heart.drop(claim)
        else:
            pack.append(found)
    return pack


def _assignment(
    heart: Heart, space: Space, claim: Claim, start_of: Callable[[Path, RunConfig], int]
) -> Assignment | None:
    """The trial's config and folder; None if it is not to be trained (an invalid config fails the trial for good)."""
    store, spec = heart.store, heart.spec
    try:
        params = claim.params
        if spec.sampler.type != "grid" and not space.is_complete(params):
            params = persistently(lambda: propose(store, spec, space, claim), "proposing parameters")
        config = space.config(params)
    except UserError as error:
        text = str(error)
        persistently(lambda: claims.fail(store, claim, text, retries=0), "telling a failure")
        return None
    run_dir = spec.run_dir(claim.number)
    start = start_of(run_dir, config)
    attrs = {claims.CHECKPOINT: start} if start != claim.checkpoint else {}
    key = stream_key(config)
    if attrs or key != claim.stream:
        persistently(lambda: claims.describe(store, claim, key, attrs), "describing a trial")
    return Assignment(claim, config, run_dir, start)


def propose(store: Store, spec: StudySpec, space: Space, claim: Claim) -> dict[str, Any]:
    """Ask the study's sampler; what it said before for this trial stays.

    A sampler may repeat itself. The same cell is not trained twice: it is asked again, and chance after that, unless
    the space seems to hold nothing new.
    """
    params: dict[str, Any] = {}
    for attempt in range(_ATTEMPTS):
        study = store.sampling_study(spec.name, sampler=samplers.make_sampler(spec, claim.number, attempt))
        if spec.early_stopping.type == "hyperband":  # its brackets have samplers' histories of their own
            config = space.middle().config
            total = config.data.n_train_samples or 0
            study.pruner = make_pruner(
                spec.early_stopping, warmup_samples(spec.early_stopping, config, total), max(total, 2)
            )
        params = space.suggest(db.live_trial(study, claim.trial_id))
        with store.write() as connection:
            if params not in db.other_params(connection, claim.study_id, claim.trial_id):
                break
            if attempt < _ATTEMPTS - 1:
                db.clear_params(connection, claim.trial_id)
    return params
