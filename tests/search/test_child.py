"""Real workers and their training processes, stopped, frozen and killed from within."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from _chaos import PRELOAD, run_alone, run_worker

from saeopt.config.study import StudySpec
from saeopt.config.study_file import study_spec
from saeopt.trials import endings
from saeopt.trials.create import create_study
from saeopt.trials.storage import Store

HOOK = "blocks.1.hook_resid_pre"
forks = multiprocessing.get_context("forkserver")


@pytest.fixture
def spec(tiny_model_dir: Path, tiny_text: Path, tmp_path: Path) -> Callable[..., StudySpec]:
    forks.set_forkserver_preload(PRELOAD)

    def make(space: dict[str, Any], **fields: Any) -> StudySpec:
        base = {
            "tlens_model_path": str(tiny_model_dir), "threads": 1, "lr_schedule": "constant",
            "save_every_n_samples": 64, "log_every_n_grad_steps": 4,
            "data": {
                "dataset_name": str(tiny_text), "is_tokenized": False, "streaming": False, "column_name": "text",
                "context_length": 16, "n_train_samples": 256, "train_batch_size": 4, "n_eval_samples": 16,
            },
            "saes": {"sae_type": "relu", "sae_positions": [HOOK], "dict_size_to_input_ratio": 4},
        }  # fmt: skip
        raw = {"name": "s", "base": base, "space": space, "output_dir": str(tmp_path / "out"), "pack": 1}
        return study_spec(raw | {"heartbeat": 0.5, "grace": 3.0} | fields, "s.yaml")

    return make


@pytest.fixture
def work(tmp_path: Path, store_address: str) -> Iterator[Callable[[], Any]]:
    started: list[Any] = []

    def go() -> Any:
        process = forks.Process(target=run_worker, args=(store_address, "s", tmp_path / f"worker{len(started)}.log"))
        process.start()
        started.append(process)
        return process

    yield go
    for process in started:
        process.kill()


def until(condition: Callable[[], Any], worker: Any, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert worker.exitcode is None
        assert time.monotonic() < end
        time.sleep(0.05)


def states(store: Store) -> list[str]:
    return [t.state.name for t in store.study("s").trials]


def family(pid: int) -> set[int]:
    """A worker and its training process."""
    return {pid} | {p.pid for p in psutil.Process(pid).children()}


def freeze(store: Store, pids: set[int]) -> set[int]:
    """Stop processes, but not with SQLite's one lock in their hands: nobody can take that from them."""
    while True:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        if not store.is_sqlite:
            return pids
        with sqlite3.connect(str(store.url.database), timeout=0.2, isolation_level=None) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
                return pids
            except sqlite3.OperationalError:
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
                time.sleep(0.05)


def content(folder: Path) -> dict[str, Any]:
    """Every file of a run folder but its log and its config, which names the folder; of metrics all but the speed."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith(("trial.log", "final_config")):
            found[str(path.relative_to(folder))] = path.read_bytes()
    rows = [json.loads(line) for line in found["metrics.jsonl"].splitlines()]
    found["metrics.jsonl"] = [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]
    return found


@pytest.mark.slow  # two real workers
@pytest.mark.timeout(500)
def test_a_worker_that_wakes_up_leaves_its_heirs_runs_as_they_are(
    store_address: str, spec: Callable[..., StudySpec], work: Callable[[], Any], tmp_path: Path
) -> None:
    store, study = Store.open(store_address), spec({"lr": [1e-3, 2e-3]})
    create_study(store, study)
    zombie = work()
    until(lambda: store.study("s").trials[0].intermediate_values, zombie)
    asleep = freeze(store, family(zombie.pid))
    heir = work()
    heir.join(300)
    assert states(store) == ["COMPLETE", "COMPLETE"]
    for pid in asleep:
        os.kill(pid, signal.SIGCONT)
    for process in (zombie, heir):
        process.join(120)
        assert process.exitcode == 0
    text = study.to_json().replace(str(tmp_path / "out"), str(tmp_path / "alone"))
    alone = forks.Process(target=run_alone, args=(text, [0, 1], tmp_path / "alone", tmp_path / "alone.log"))
    alone.start()
    alone.join(200)
    for number in range(2):
        assert content(study.run_dir(number)) == content(tmp_path / "alone" / str(number))
        assert not list(study.run_dir(number).glob(".owner*"))
    assert states(store) == ["COMPLETE", "COMPLETE"]


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    ("poison", "said", "store_address"),
    [("Killing", "SIGKILL", "sqlite"), ("Leaving", "exit code 5", "postgresql")],
    indirect=["store_address"],
)
def test_a_trial_that_ends_its_process_takes_nothing_with_it(
    poison: str, said: str, tmp_path: Path, spec: Callable[..., StudySpec], work: Callable[[], Any], store_address: str
) -> None:
    store = Store.open(store_address)
    create_study(store, spec({"saes.sae_type": [f"poison:{poison}", "relu"], "lr": [1e-3, 2e-3]}, pack=2))
    worker = work()
    worker.join(400)
    assert worker.exitcode == 0, (tmp_path / "worker0.log").read_text()[-3000:]
    assert states(store) == ["FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    trial = store.study("s").trials[0]
    assert said in trial.user_attrs["reason"]
    assert trial.system_attrs[endings.DEATHS] == endings.MAX_DEATHS


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("store_address", ["sqlite"], indirect=True)
def test_a_frozen_training_is_ended_and_its_trial_trained_again(
    tmp_path: Path, spec: Callable[..., StudySpec], work: Callable[[], Any], store_address: str
) -> None:
    store = Store.open(store_address)
    create_study(store, spec({"lr": [1e-3]}, stall=15.0))
    worker = work()
    until(lambda: store.study("s").trials[0].intermediate_values, worker)
    (training,) = family(worker.pid) - {worker.pid}
    os.kill(training, signal.SIGSTOP)
    worker.join(300)
    assert worker.exitcode == 0
    assert states(store) == ["COMPLETE"]
    assert "no progress for 15 s" in (tmp_path / "worker0.log").read_text()
    assert store.study("s").trials[0].system_attrs[endings.LOSSES] == 1
