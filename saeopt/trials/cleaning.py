"""`study clean`: which files of which trials go, and how many bytes that makes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from saeopt.config.study import StudySpec
from saeopt.files import remove
from saeopt.runs.folder import RunFolder, bytes_of
from saeopt.trials import internals as db
from saeopt.trials import paused
from saeopt.trials.budget import DISK
from saeopt.trials.states import TrialState
from saeopt.trials.storage import Store
from saeopt.trials.waiting import CHECKPOINT

ASKED = ("paused", "waiting", "failed")
"""Trials that can go on: their files stay unless they are named."""


@dataclass(frozen=True)
class Removal:
    """The files of one trial that go."""

    trial_id: int
    number: int
    kind: str
    files: list[Path]
    size: int
    """Bytes."""


def planned(
    store: Store, study_id: int, spec: StudySpec, also: Collection[str] = (), front: Collection[int] | None = None
) -> list[Removal]:
    """What would go: the states of trials that have ended, and with a `front` all weights of those not on it.

    Running trials lose nothing. Trials that can go on (`ASKED`) only where they are named in `also`: then all of their
    checkpoints, and they start anew if they do. Numbers in `front` keep their weights in any case.
    """
    found = []
    for trial_id, number, kind in kinds(store, study_id):
        if kind == "running" or (kind in ASKED and kind not in also):
            continue
        run = RunFolder(spec.run_dir(number))
        files = [run.state_path(samples) for samples in run.states()]
        unwanted = kind in ASKED or (front is not None and number not in front)
        if unwanted:
            for folder in (run, *map(run.seed, run.seeds())):
                files += [folder.weights_path(samples) for samples in folder.weights()]
        if files:
            found.append(Removal(trial_id, number, kind, files, sum(map(_size, files))))
    return found


def kinds(store: Store, study_id: int) -> list[tuple[int, int, str]]:
    """(trial, number, kind) of all trials: ended, running, or one of `ASKED`."""
    names = {"COMPLETE": "ended", "PRUNED": "ended", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
    with store.read() as connection:
        held = paused.numbers(connection, study_id)
        found = []
        for state, kind in names.items():
            rows = db.numbers_in_state(connection, study_id, TrialState[state]).items()
            found += [(trial_id, number, "paused" if number in held else kind) for trial_id, number in rows]
    return sorted(found, key=lambda row: row[1])


def clean(store: Store, study_id: int, spec: StudySpec, removals: Iterable[Removal]) -> int:
    """Delete those files; returns the bytes. A trial that goes on again meanwhile keeps what is left of its own."""
    freed = 0
    for removal in removals:
        with store.write() as connection:  # nobody claims, retries or promotes it meanwhile
            _lock(connection, removal)
            now = {trial_id: kind for trial_id, _, kind in kinds(store, study_id)}
            if now.get(removal.trial_id) != removal.kind:
                continue
            for file in removal.files:
                size = _size(file)
                remove(file)
                freed += size
            run_dir = spec.run_dir(removal.number)
            attrs = {DISK: bytes_of(run_dir)}
            if removal.kind in ASKED:
                attrs[CHECKPOINT] = 0
            db.set_attrs(connection, db.trial_attrs, removal.trial_id, attrs)
    return freed


def _lock(connection: db.Connection, removal: Removal) -> None:
    for state in TrialState:
        if db.in_state(connection, [removal.trial_id], state, lock=True):
            return


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
