"""`python -m saeopt.worker` as a real process: errors, signals, several devices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from _stores import grid_spec

from saeopt import worker
from saeopt.config.settings import settings
from saeopt.config.study import StudySpec
from saeopt.config.study_file import study_spec
from saeopt.errors import WorkerFault
from saeopt.trials import claims, states
from saeopt.trials import internals as db
from saeopt.trials.create import create_study
from saeopt.trials.storage import SPEC_KEY, Store

REPOSITORY = Path(__file__).resolve().parents[2]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/store.db"


@pytest.fixture
def start(tmp_path: Path, address: str) -> Any:
    started = []

    def go(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        env = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "SAEOPT_STORAGE": address}
        process = subprocess.Popen(
            [sys.executable, "-m", "saeopt.worker", *arguments],
            cwd=tmp_path, env=env | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        return process

    yield go
    for process in started:
        process.kill()
        process.communicate()


def real_spec(model: Path, text: Path, folder: Path, samples: int, cells: int) -> StudySpec:
    base: dict[str, Any] = {
        "tlens_model_path": str(model), "threads": 1, "lr_schedule": "constant", "save_every_n_samples": 512,
        "log_every_n_grad_steps": 8,
        "data": {
            "dataset_name": str(text), "is_tokenized": False, "streaming": False, "column_name": "text",
            "context_length": 16, "n_train_samples": samples, "train_batch_size": 4, "n_eval_samples": 16,
        },
        "saes": {"sae_type": "relu", "sae_positions": ["blocks.1.hook_resid_pre"], "dict_size_to_input_ratio": 4},
    }  # fmt: skip
    space = {"saes.sparsity_coeff": [0.01 * (i + 1) for i in range(cells)]}
    raw = {"name": "s", "base": base, "space": space, "output_dir": str(folder / "out"), "heartbeat": 1, "grace": 10}
    return study_spec(raw, "s.yaml")


def until(condition: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "STUDY is missing"),
        (["x", "--study", "y"], "give one of them"),
        (["--study", "x"], "no such store"),
        (["--study", "x", "--pack", "many"], "--pack many"),
        (["--study", "x", "--devices", "tpu"], "'tpu' is no device"),
        (["--study", "x", "--devices", "cpu,cpu", "--sequential"], "with --sequential there is one device"),
        (["--study", "x", "--storage", "mysql://u:secret-word@h/d"], "is needed"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(start: Start, arguments: list[str], line: str) -> None:
    process = start(*arguments)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert line in errors
    assert len(errors.strip().splitlines()) == 1
    assert "secret-word" not in errors


def test_an_unknown_study_is_named_with_its_neighbours(start: Start, address: str, tmp_path: Path) -> None:
    create_study(Store.open(address), grid_spec(1, name="mine"))
    process = start("--study", "mime")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "did you mean 'mine'?" in errors


@pytest.mark.parametrize(("change", "line"), [({"format": 3}, "format is 3"), ({"new_option": 1}, "'new_option'")])
def test_a_study_of_a_newer_version_is_a_fault_of_the_worker_and_of_no_trial(
    start: Start, address: str, change: dict[str, Any], line: str
) -> None:
    store = Store.open(address)
    study_id = create_study(store, grid_spec(2)).study_id
    with store.write() as connection:
        text = json.dumps(json.loads(store.spec("s").to_json()) | change)
        db.set_attrs(connection, db.study_attrs, study_id, {SPEC_KEY: text})
    process = start("--study", "s", "--devices", "cpu")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 3, errors
    assert line in errors
    assert "Traceback" not in errors
    assert claims.counts(store, study_id)["WAITING"] == 2


def test_a_worker_that_can_train_nothing_ends_late_where_a_supervisor_would_start_it_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Signals(threading.Event):
        waited: ClassVar[list[float | None]] = []

        def wait(self, timeout: float | None = None) -> bool:
            self.waited.append(timeout)
            return False

    def nothing(*_: object) -> int:
        raise WorkerFault("no model")

    monkeypatch.setattr(worker, "stop_on_signals", Signals)
    monkeypatch.setattr("saeopt.workers.on_device.work", nothing)
    monkeypatch.setattr("saeopt.console.set_up_logging", lambda: None)
    for pause, waited in (("60", [60.0]), ("0", [60.0])):
        monkeypatch.setenv("SAEOPT_FAULT_PAUSE", pause)
        settings.cache_clear()
        with pytest.raises(WorkerFault):
            worker.worker("s", devices="cpu")
        assert Signals.waited == waited
    settings.cache_clear()


def test_devices_are_listed(start: Start) -> None:
    output, _ = start("--show-devices").communicate(timeout=60)
    assert "cpu" in output
    assert "cores" in output


@pytest.mark.slow  # starts a real worker
def test_sigterm_checkpoints_and_gives_the_trials_back_within_ten_seconds(
    start: Start, address: str, tmp_path: Path, tiny_model_dir: Path, tiny_text: Path
) -> None:
    store = Store.open(address)
    study_id = create_study(store, real_spec(tiny_model_dir, tiny_text, tmp_path, 400_000, 2)).study_id
    process = start("--study", "s", "--devices", "cpu")
    until(lambda: all(t.intermediate_values for t in store.study("s").trials), process)
    before = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=15) == 0
    assert time.monotonic() - before < 10
    assert claims.counts(store, study_id)["WAITING"] == 2
    starts = [t.system_attrs["saeopt:checkpoint"] for t in store.study("s").trials]
    assert starts[0] == starts[1] > 0
    assert (tmp_path / f"out/s/0/samples_{starts[0]}.safetensors").exists()
    assert (tmp_path / "out/s/0/trial.log").exists()


def test_a_second_signal_ends_the_process_at_once_and_a_doubled_one_does_not() -> None:
    script = (
        "import time; from saeopt.worker import stop_on_signals; stop = stop_on_signals(); print(1, flush=True)\n"
        "while True: time.sleep(0.05)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.terminate()
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=10) == 128 + signal.SIGTERM
    process.stdout.close()


@pytest.mark.slow  # starts three real processes
def test_each_device_has_a_process_and_they_die_with_their_parent(
    start: Start, address: str, tmp_path: Path, tiny_model_dir: Path, tiny_text: Path
) -> None:
    store = Store.open(address)
    study_id = create_study(store, real_spec(tiny_model_dir, tiny_text, tmp_path, 400_000, 2)).study_id
    process = start("--study", "s", "--devices", "cpu,cpu", "--pack", "1")
    until(lambda: claims.counts(store, study_id)["RUNNING"] == 2, process)
    pids = {t.system_attrs[states.CLAIM]["pid"] for t in store.study("s").trials}
    assert len(pids | {process.pid}) == 3
    until(lambda: all(t.intermediate_values for t in store.study("s").trials), process)
    process.kill()
    end = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert claims.counts(store, study_id)["WAITING"] == 2
