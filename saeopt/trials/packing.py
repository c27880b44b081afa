"""Which trials are trained together: claims of one stream, with their parameters proposed and checked."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saeopt.config.keys import stream_key
from saeopt.config.run import RunConfig
from saeopt.config.study import StudySpec
from saeopt.errors import HostError, UserError
from saeopt.files import LostRun
from saeopt.runs.owner import Owner
from saeopt.search import samplers
from saeopt.search.pruning import make_pruner, warmup_samples
from saeopt.search.rounds import n_proposed, round_size
from saeopt.search.space import Space
from saeopt.trials import claims, endings, presence
from saeopt.trials import internals as db
from saeopt.trials.heart import Heart
from saeopt.trials.internals import queries
from saeopt.trials.starts import check_weights
from saeopt.trials.states import Claim
from saeopt.trials.storage import Store, persistently
from saeopt.trials.waiting import CHECKPOINT, STOOD, Merging

_ATTEMPTS = 12


class Refused(UserError):
    """A config that this version does not take, though the study's maker did."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number


@dataclass(frozen=True)
class Assignment:
    """A claimed trial with its config, its folder and the samples that it starts from."""

    claim: Claim
    config: RunConfig
    run_dir: Path
    start: int
    owner: Owner
    """Who has taken the folder."""

    @property
    def name(self) -> str:
        """Unique in a pack."""
        return str(self.claim.number)


def merging(spec: StudySpec, most: int) -> Merging | None:
    """How a study's survivors of a rung are put together into packs of up to `most`; None where it has no rungs."""
    return Merging(most, results_first=n_proposed(spec) > 0) if spec.early_stopping.type == "halving" else None


def acquire(
    heart: Heart,
    space: Space,
    limit: int,
    who: Mapping[str, Any],
    start_of: Callable[[Path, RunConfig], int],
    most: int | None = None,
) -> list[Assignment]:
    """Claim up to `limit` trials and return those that share a pack; the others go back to the queue at once.

    Parameters that nobody has proposed yet are proposed now. `start_of` tells the samples of the newest checkpoint in
    a run folder that is usable and of this config. `most`: how many survivors of a rung fit together, where that is
    more than `limit` (None: as many).

    Raises:
        HostError: a run folder cannot be written.
        StudyGone: the study is not there any more.
        Refused: this version knows no such config (the trial was given back).
    """
    store, how = heart.store, merging(heart.spec, limit if most is None else most)
    where = (store, heart.study_id, limit, who, heart.identity, how, heart.spec)
    taken = persistently(lambda: claims.claim(*where), "claiming trials")
    heart.hold(taken)
    pack: list[Assignment] = []
    entered = _entered(heart, taken)
    for claim, owner in entered:
        run_dir = heart.spec.run_dir(claim.number)
        try:
            found = _assignment(heart, space, claim, owner, start_of)
        except BaseException:
            for other, theirs in entered:
                _give_back(heart, other, theirs)
            raise
        if found is None:
            heart.drop(claim)
            owner.leave(run_dir)
        elif pack and (stream_key(found.config), found.start) != (stream_key(pack[0].config), pack[0].start):
            _give_back(heart, claim, owner, found.start)
        else:
            pack.append(found)
    return pack


def owner_of(claim: Claim) -> Owner:
    """How a claim shows in the run folder."""
    return Owner((claim.identity or "study")[:12], claim.turn, claim.token[:12])


def _entered(heart: Heart, taken: Sequence[Claim]) -> list[tuple[Claim, Owner]]:
    """Take the run folders of claimed trials; those whose claim still holds after that."""
    store = heart.store
    owners = [(claim, owner_of(claim)) for claim in taken]
    entered = []
    try:
        for claim, owner in owners:
            try:
                owner.take(heart.spec.run_dir(claim.number))
                entered.append((claim, owner))
            except LostRun:
                heart.drop(claim)
    except HostError as error:
        for claim, owner in owners:
            _give_back(heart, claim, owner, reason=str(error))
        raise
    # Whoever slept between claiming and taking finds out here, before anything is written.
    ours = persistently(lambda: claims.beat(store, [claim for claim, _ in entered]), "claiming trials")
    for claim, owner in entered:
        if claim.trial_id not in ours:
            heart.drop(claim)
            owner.leave(heart.spec.run_dir(claim.number))
    return [(claim, owner) for claim, owner in entered if claim.trial_id in ours]


def _give_back(heart: Heart, claim: Claim, owner: Owner, start: int | None = None, reason: str | None = None) -> None:
    owner.leave(heart.spec.run_dir(claim.number))
    persistently(lambda: endings.release(heart.store, claim, start, reason=reason), "giving a trial back")
    heart.drop(claim)


def _assignment(
    heart: Heart, space: Space, claim: Claim, owner: Owner, start_of: Callable[[Path, RunConfig], int]
) -> Assignment | None:
    """The trial's config and folder; None if the sampler has proposed an invalid config, which fails for good.

    Raises:
        Refused: a config that was valid when the study was made is not valid for this version.
    """
    store, spec = heart.store, heart.spec
    try:
        params = claim.params
        if spec.sampler.type != "grid" and not space.is_complete(params):
            params = persistently(lambda: propose(store, spec, space, claim), "proposing parameters")
        config = space.config(params)
    except UserError as error:
        text = str(error)
        if spec.sampler.type == "grid":
            persistently(lambda: endings.release(store, claim, reason=text), "giving a trial back")
            raise Refused(text, claim.number) from None
        persistently(lambda: endings.fail(store, claim, text, retries=0), "storing a failure")
        return None
    run_dir = spec.run_dir(claim.number)
    start = start_of(run_dir, config)
    if start == 0 and (weights := space.weights(params)) is not None:
        try:
            check_weights(weights)
        except HostError:
            raise
        except UserError as error:
            changed = str(error)
            persistently(lambda: endings.fail(store, claim, changed, retries=0), "storing a failure")
            return None
    owner.take(run_dir)  # again: a folder of another config has been moved aside
    attrs = {CHECKPOINT: start} if start != claim.checkpoint else {}
    key = stream_key(config)
    if attrs or key != claim.stream:
        persistently(lambda: claims.describe(store, claim, key, attrs), "describing a trial")
    return Assignment(claim, config, run_dir, start, owner)


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


def room(store: Store, study_id: int, spec: StudySpec, limit: int, *, auto: bool) -> int:
    """How many trials a worker takes together, at most `limit`: proposals apart from those whose values are known."""
    if limit < 2 or n_proposed(spec) <= 0:
        return limit
    with store.read() as connection:
        known = db.n_waiting_with_params(connection, study_id, (db.PAUSED, STOOD))
    said, now = queries.attributes(store.engine, study_id, presence.WORKER), store.now().replace(tzinfo=dt.UTC)
    alive = sum(worker.alive for worker in presence.workers(said, now.timestamp()))
    if known:  # the first results are everybody's: several workers share the trials that begin a study
        return min(limit, -(-known // max(alive, 1)))
    return min(limit, round_size(spec, alive)) if auto else limit
