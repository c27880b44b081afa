"""Four workers, twenty-four cells, kills all along, a lost database: nothing is lost and no bit differs."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from _chaos import PRELOAD, run_alone, run_worker
from _stores import PASSWORD, Server, new_database
from optuna.trial import TrialState
from safetensors import safe_open

from saeopt.config.study import StudySpec
from saeopt.config.study_file import study_spec
from saeopt.trials import claims, states
from saeopt.trials import internals as db
from saeopt.trials.create import create_study
from saeopt.trials.storage import Store

SAMPLES, CELLS, KILLS, WORKERS = 1024, 24, 8, 4
HOOK = "blocks.1.hook_resid_pre"
forks = multiprocessing.get_context("forkserver")


def make_spec(model: Path, text: Path, output: Path) -> StudySpec:
    base: dict[str, Any] = {
        "tlens_model_path": str(model),
        "threads": 1,
        "lr_schedule": "constant",
        "save_every_n_samples": 128,
        "log_every_n_grad_steps": 4,
        "data": {
            "dataset_name": str(text), "is_tokenized": False, "streaming": False, "column_name": "text",
            "context_length": 16, "n_train_samples": SAMPLES, "train_batch_size": 4, "n_eval_samples": 16,
        },
        "saes": {"sae_type": "relu", "sae_positions": [HOOK], "dict_size_to_input_ratio": 4},
    }  # fmt: skip
    space = {"lr": [1e-3, 2e-3, 4e-3, 8e-3], "saes.sparsity_coeff": [0.03, 0.1, 0.2], "seed": [0, 1]}
    raw = {"name": "chaos", "base": base, "space": space, "pack": 1, "output_dir": str(output)}
    return study_spec(raw | {"heartbeat": 1.0, "grace": 5.0, "max_losses": 20}, "chaos.yaml")


@pytest.fixture(scope="module")
def material(tiny_model_dir: Path, tiny_text: Path) -> tuple[Path, Path]:
    forks.set_forkserver_preload(PRELOAD)
    return tiny_model_dir, tiny_text


def trained_alone(spec: StudySpec, folder: Path) -> Path:
    """The run folders of all cells, trained one by one to their ends without any disturbance."""
    halves = [list(range(i, CELLS, 2)) for i in range(2)]
    started = [
        forks.Process(target=run_alone, args=(spec.to_json(), half, folder, folder / f"log{i}"))
        for i, half in enumerate(halves)
    ]
    for process in started:
        process.start()
    for i, process in enumerate(started):
        process.join(timeout=240)
        assert process.exitcode == 0, (folder / f"log{i}").read_text()[-3000:]
    return folder


@pytest.fixture(scope="module")
def undisturbed(material: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both stores' results are compared with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return trained_alone(make_spec(*material, folder), folder)


class Chaos:
    """Keeps four workers going while it kills them."""

    work: Callable[[str, str, Path], None] = staticmethod(run_worker)

    def __init__(self, address: str, store: Store, study_id: int, folder: Path) -> None:
        self.address, self.store, self.study_id, self.folder = address, store, study_id, folder
        self.alive: list[Any] = []
        self.started = 0
        self.hits: list[tuple[int, int, int]] = []
        self.rng = random.Random(0)

    def keep_four(self) -> None:
        self.alive = [p for p in self.alive if p.is_alive()]
        while len(self.alive) < WORKERS:
            log = self.folder / f"worker{self.started}.log"
            process = forks.Process(target=self.work, args=(self.address, "chaos", log))  # it has a child of its own
            process.start()
            self.alive.append(process)
            self.started += 1

    def victims(self) -> list[tuple[int, int, int]]:
        """Process, trial number and number of reports of the trials that have reported something."""
        n_reports = sa.select(sa.func.count()).where(db.trial_reports.c.trial_id == db.trials.c.trial_id)
        with self.store.read() as connection:
            rows = connection.execute(
                sa.select(db.trials.c.trial_id, db.trials.c.number, n_reports.scalar_subquery().label("n")).where(
                    db.trials.c.study_id == self.study_id, db.trials.c.state == TrialState.RUNNING
                )
            ).all()
            found = []
            for row in rows:
                owner = db.get_attrs(connection, db.trial_attrs, row.trial_id, states.CLAIM).get(states.CLAIM)
                if owner and row.n:
                    found.append((int(owner["pid"]), int(row.number), int(row.n)))
        pids = {p.pid for p in self.alive}
        return [v for v in found if v[0] in pids]

    def strike(self) -> bool:
        """Kill a worker in the middle of a trial, now this way and now that."""
        victims = self.victims()
        if not victims:
            return False
        pid, number, n_reports = self.rng.choice(victims)
        how = (signal.SIGKILL, signal.SIGTERM)[len(self.hits) % 2]
        os.kill(pid, how)
        self.hits.append((number, n_reports, how))
        return True

    def due(self, now: dict[str, int]) -> bool:
        """Whether the next blow may fall: by progress, since machines differ in speed."""
        return 2 * len(self.hits) <= now["COMPLETE"]

    def may_vanish(self) -> bool:
        """Whether the store may vanish now, half of the blows having fallen."""
        return True

    def run(self, kills: int, vanish: Callable[[], None], pause: tuple[float, float] = (0.3, 1.5)) -> None:
        """Until nothing waits, runs or is paused: so many kills, and in the middle a store that is lost for a while."""
        vanished, next_strike, deadline = False, 0.0, time.monotonic() + 300
        try:
            while True:
                now = claims.counts(self.store, self.study_id)
                if now["WAITING"] + now["RUNNING"] + now["PAUSED"] == 0:
                    break
                assert time.monotonic() < deadline, f"{now}\n{self.logs()}"
                self.keep_four()
                if not vanished and len(self.hits) == kills // 2 and self.may_vanish():
                    vanished = True
                    vanish()
                elif len(self.hits) < kills and time.monotonic() > next_strike and self.due(now) and self.strike():
                    next_strike = time.monotonic() + self.rng.uniform(*pause)
                time.sleep(0.02)
            for process in self.alive:
                process.join(timeout=30)
        finally:
            for process in self.alive:
                process.kill()
        assert len(self.hits) == kills
        assert vanished

    def logs(self) -> str:
        return "\n".join(p.read_text(errors="replace")[-1500:] for p in sorted(self.folder.glob("worker*.log")))


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Any]]:
    """A store's address, and what makes the store vanish for some seconds."""
    if request.param == "sqlite":
        path = tmp_path / "store.db"

        def lock() -> None:
            with sqlite3.connect(path, timeout=60, isolation_level=None) as connection:
                connection.execute("BEGIN EXCLUSIVE")
                time.sleep(3)
                connection.execute("ROLLBACK")

        yield f"sqlite:///{path}", lock
        return
    server: Server = request.getfixturevalue("server")
    yield new_database(server, f"chaos_{uuid.uuid4().hex[:12]}"), lambda: server.restart(2.0)


def weights(folder: Path, samples: int = SAMPLES) -> dict[str, bytes]:
    """Every tensor of a checkpoint as bytes."""
    with safe_open(folder / f"samples_{samples}.safetensors", "pt") as file:
        return {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118


@pytest.mark.slow  # real training in four processes under fire
@pytest.mark.timeout(400)
def test_kills_and_a_lost_database_change_nothing(
    place: tuple[str, Any], material: tuple[Path, Path], undisturbed: Path, tmp_path: Path
) -> None:
    address, vanish = place
    spec = make_spec(*material, tmp_path / "out")
    store = Store.open(address)
    study_id = create_study(store, spec).study_id
    Chaos(address, store, study_id, tmp_path).run(KILLS, vanish)
    trials = store.study("chaos").trials
    assert [t.number for t in trials] == list(range(CELLS))
    assert {t.state.name for t in trials} == {"COMPLETE"}
    text = "".join(p.read_text(errors="replace") for p in tmp_path.glob("worker*.log"))
    assert sum(text.count(f"trial {n}: complete") for n in range(CELLS)) == CELLS
    assert PASSWORD not in text
    for number in range(CELLS):
        assert weights(spec.run_dir(number)) == weights(undisturbed / str(number)), f"trial {number}"
    store.close()
