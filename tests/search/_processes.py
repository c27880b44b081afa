"""What the test processes run. No torch in here: they start fast."""

from __future__ import annotations

import time
from pathlib import Path

from saeopt.config.study import StudySpec
from saeopt.trials import claims, endings
from saeopt.trials.create import create_study
from saeopt.trials.storage import Store, persistently


def _filled(store: Store, name: str) -> bool:
    return name in store.study_names() and any(claims.counts(store, store.study_id(name)).values())


def create_and_claim(url: str, spec_file: Path, out: Path, at: float, limit: int, creates: bool) -> None:
    """At the instant `at`: open, create, and claim and finish trials until the queue is empty."""
    spec = StudySpec.from_json(spec_file.read_text())
    time.sleep(max(0.0, at - time.time()))
    store = Store.open(url, patience=60)
    if creates:
        create_study(store, spec)
    while not _filled(store, spec.name):
        time.sleep(0.05)
    study_id = store.study_id(spec.name)
    numbers = []
    while True:
        taken = persistently(lambda: claims.claim(store, study_id, limit, {"worker": str(out)}), "claiming", 60)
        if not taken:
            break
        for claim in taken:
            if persistently(lambda c=claim: endings.finish(store, c, "COMPLETE", [1.0, 0.5]), "telling", 60):
                numbers.append(claim.number)
    out.write_text(" ".join(map(str, numbers)))
