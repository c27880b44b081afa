"""Kills and a lost database in the middle of rungs: no trial is lost or doubled, and no bit of a checkpoint differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from _chaos import run_worker_slow_at_rungs
from optuna.trial import TrialState
from test_chaos import CELLS, SAMPLES, Chaos, make_spec, material, place, trained_alone, weights  # noqa: F401  (fixtures)

from saeopt.config.study import StudySpec
from saeopt.config.study_file import study_spec
from saeopt.trials import internals as db
from saeopt.trials.create import create_study
from saeopt.trials.rungs import RUNGS
from saeopt.trials.storage import Store
from saeopt.trials.waiting import CHECKPOINT

KILLS, PACK, FIRST, SECOND = 6, 3, 256, 512


def halving(model: Path, text: Path, output: Path) -> StudySpec:
    raw = make_spec(model, text, output).model_dump(mode="json", by_alias=True)
    raw["base"]["keep_checkpoints"] = None
    rule = {"type": "halving", "rungs": [FIRST / SAMPLES, SECOND / SAMPLES], "keep": 0.4, "collapse": None}
    return study_spec(raw | {"early_stopping": rule, "objectives": ["fvu"], "pack": PACK, "format": 1}, "chaos.yaml")


@pytest.fixture(scope="module")
def alone(material: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """What both stores' results are compared with."""
    folder = tmp_path_factory.mktemp("alone")
    return trained_alone(halving(*material, folder), folder)


class AtRungs(Chaos):
    """Strikes at workers whose trials stand at a rung: stored and not judged, judged and not paused."""

    work = staticmethod(run_worker_slow_at_rungs)

    def victims(self) -> list[tuple[int, int, int]]:
        """Process, trial number and samples."""
        pids = {p.pid for p in self.alive}
        with self.store.read() as connection:
            running = db.numbers_in_state(connection, self.study_id, TrialState.RUNNING)
            keys = [RUNGS, CHECKPOINT, "saeopt:claim"]
            told = db.attrs_of(connection, db.trial_attrs, running, keys)
        found = []
        for trial_id, number in running.items():
            rungs, checkpoint, owner = (told.get((trial_id, key)) for key in keys)
            last = max(map(int, rungs or {}), default=0)
            if owner and last >= (checkpoint or 0) and last:
                found.append((int(owner["pid"]), number, last))
        return [v for v in found if v[0] in pids]

    def due(self, now: dict[str, int]) -> bool:
        """At any time: whoever stands at a rung is struck."""
        return True

    def may_vanish(self) -> bool:
        """In the middle of a rung."""
        return bool(self.victims())


@pytest.mark.slow  # real training in four processes under fire
@pytest.mark.timeout(400)
def test_kills_and_a_lost_database_within_rungs_change_nothing(
    place: tuple[str, Any],  # noqa: F811
    material: tuple[Path, Path],  # noqa: F811
    alone: Path,
    tmp_path: Path,
) -> None:
    address, vanish = place
    spec = halving(*material, tmp_path / "out")
    store = Store.open(address)
    study_id = create_study(store, spec).study_id
    AtRungs(address, store, study_id, tmp_path).run(KILLS, vanish, (0.5, 1.5))
    trials = store.study("chaos").trials
    assert [t.number for t in trials] == list(range(CELLS))
    states = [t.state.name for t in trials]
    assert set(states) == {"COMPLETE", "PRUNED"}
    text = "".join(p.read_text(errors="replace") for p in tmp_path.glob("worker*.log"))
    assert sum(text.count(f"trial {n}: complete") for n in range(CELLS)) == states.count("COMPLETE")
    for trial in trials:
        if trial.state.name == "COMPLETE":
            assert weights(spec.run_dir(trial.number)) == weights(alone / str(trial.number)), trial.number
        else:
            assert trial.user_attrs["reason"].startswith("paused by halving at "), trial.user_attrs
            rung = trial.user_attrs["paused_at"]
            assert rung in (FIRST, SECOND)
            assert weights(spec.run_dir(trial.number), rung) == weights(alone / str(trial.number), rung), trial.number
            assert max(int(p.stem.split("_")[1]) for p in spec.run_dir(trial.number).glob("samples_*")) == rung
    store.close()
