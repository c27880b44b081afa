"""One device's worker: which study, how many trials together, and where they are trained."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from saeopt.config.run import RunConfig
from saeopt.config.settings import settings
from saeopt.config.study import CPU_PACK, StudySpec
from saeopt.console import log
from saeopt.errors import UserError, WorkerFault
from saeopt.search.rounds import n_proposed
from saeopt.search.space import Space
from saeopt.training.plan import Observer, TrialPlan, TrialResult
from saeopt.training.progress import Bar, PackObserver
from saeopt.trials import claims
from saeopt.trials.storage import Store, persistently
from saeopt.workers.devices import is_child
from saeopt.workers.local import LocalTraining
from saeopt.workers.loop import Options, Worker
from saeopt.workers.training import CACHE_VARIABLE, ChildTraining


class DeviceTraining:
    """Trains in a child process (started through `context` of multiprocessing), with --sequential in this one."""

    def __init__(self, options: Options, context: Any = None) -> None:
        self.device = options.device
        self.child = None if options.sequential else ChildTraining(options.device, context)
        self.local = LocalTraining(options.device)
        if self.child is not None:
            self.child.start()  # it imports for some seconds, while the store is opened

    def fitting(self, space: Space) -> int:
        """How many of the study's trials fit together."""
        if self.device == "cpu":
            return max(1, CPU_PACK // space.spec.n_seeds)
        return (self.child or self.local).fitting(space.largest().config)

    def probe(self, runs: Path, config: RunConfig, architecture: bool, observer: Observer) -> None:
        """Raise what would keep a trial like this one from being trained here."""
        if self.child is None:
            self.local.probe(config, architecture, runs)
        else:
            self.child.probe(config, architecture, runs, observer)

    def train(self, plans: Sequence[TrialPlan], observer: Observer) -> dict[str, TrialResult]:
        """Train a pack, with a bar."""
        with Bar(every=60.0, alone=not is_child()) as bar:
            return (self.child or self.local)(plans, cast("Observer", PackObserver(observer, bar)))

    def close(self) -> None:
        """End the child."""
        if self.child is not None:
            self.child.close()


def work(
    storage: str | None,
    study: str,
    options: Options,
    pack: int | str | None,
    interrupted: threading.Event,
    context: Any = None,
) -> int:
    """One device's worker in this process; returns how many trials it has ended."""
    training = DeviceTraining(options, context)
    try:
        store = Store.open(storage, create=False, patience=60)
        # a name that is not there is a usage error
        persistently(lambda: store.study_id(study), "reading the study")
        try:
            spec = persistently(lambda: store.spec(study), "reading the study")
        except UserError as error:
            raise WorkerFault(str(error)) from None
        wanted = spec.pack if pack is None else pack
        options = replace(options, auto=wanted == "auto")

        def limit(space: Space) -> int:
            size = wanted if isinstance(wanted, int) else training.fitting(space)
            known = persistently(lambda: claims.counts(store, store.study_id(study)), "counting trials")
            share_activations(spec, size, sum(known.values()))
            return size

        def probe(config: RunConfig, architecture: bool, observer: Observer) -> None:
            training.probe(spec.runs, config, architecture, observer)

        if training.child is not None:
            training.child.stall = spec.stall
        log.info("worker on %s: study %s in %s", options.device, study, store.shown)
        try:
            return Worker(store, study, options, training.train, limit, interrupted, probe).run()
        finally:
            store.close()
    finally:
        training.close()


def share_activations(spec: StudySpec, pack: int, trials: int) -> None:
    """A study of several packs harvests its activations once (`activations.cache: auto`); a single one has no cache."""
    more = n_proposed(spec) > 0 or bool(Space(spec).refined)
    if max(trials, spec.max_trials or 0) > pack or more:
        kept = settings().cache_dir
        root = spec.runs if kept is None else Path(kept).expanduser()
        os.environ.setdefault(CACHE_VARIABLE, str(root / "activations"))
