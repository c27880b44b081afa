"""What the test processes run. No torch in here: they start fast."""

from __future__ import annotations

import math
import time
from pathlib import Path

from saeopt.config.study import StudySpec
from saeopt.search.space import Space
from saeopt.trials import claims, endings
from saeopt.trials.attributes import evaluation_attributes
from saeopt.trials.create import create_study
from saeopt.trials.refine import Refinement
from saeopt.trials.storage import Store, persistently

HOOK = "blocks.1.hook_resid_pre"


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


def work_and_refine(url: str, name: str, at: float, out: Path) -> None:
    """At the instant `at`: claim, finish and refine as a worker does, one trial after another, until none is left."""
    store = Store.open(url, patience=60)
    study_id = store.study_id(name)
    space = Space(store.spec(name))
    refinement = Refinement(store, study_id, space, store.identity(study_id))
    time.sleep(max(0.0, at - time.time()))
    added, counts = 0, {"WAITING": 1, "RUNNING": 0}
    while counts["WAITING"] + counts["RUNNING"]:
        added += persistently(refinement.step, "refining", 60)
        for claim in persistently(lambda: claims.claim(store, study_id, 1, {"worker": str(out)}), "claiming", 60):
            attrs = evaluation_attributes({HOOK: signs_at(float(claim.params["saes.target_l0"]))})
            persistently(lambda c=claim, a=attrs: endings.finish(store, c, "COMPLETE", [1.0, 0.5], attrs=a), "telling")
        added += persistently(refinement.step, "refining", 60)
        counts = persistently(lambda: claims.counts(store, study_id), "counting", 60)
    out.write_text(str(added))


def signs_at(l0: float, best: float = 20.0) -> dict[str, float]:
    """What an evaluation says where the right L0 is `best`."""
    off = abs(math.log(l0 / best))
    return {"l0": l0, "fvu": 1 / (1 + l0), "fraction_dead": 0.0, "c_dec": 0.1 + 0.01 * off, "s_dec": 1 + off}
