"""Each worker of a host holds a GPU of its own, and a dead worker's is free at once."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from saeopt.host.gpu_lock import Gpu, GpuLock, _as_cuda_numbers, lock_folder, take_gpu, try_lock, visible_gpus

GPUS = [Gpu(0, "GPU-aaaa"), Gpu(1, "GPU-bbbb")]
HOLDER = """
import sys, time
from pathlib import Path
from saeopt.host.gpu_lock import Gpu, take_gpu
lock = take_gpu(Path(sys.argv[1]), [Gpu(0, "GPU-aaaa"), Gpu(1, "GPU-bbbb")], poll_seconds=0.05)
print(lock.device, flush=True)
time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_workers_take_different_gpus_and_a_third_waits_until_one_is_killed(tmp_path: Path) -> None:
    workers = [holder(tmp_path) for _ in range(2)]
    try:
        assert {first_line(worker) for worker in workers} == {"cuda:0", "cuda:1"}
        third = holder(tmp_path)
        workers.append(third)
        time.sleep(1)
        assert third.poll() is None
        got: list[str] = []
        reader = threading.Thread(target=lambda: got.append(first_line(third)), daemon=True)
        reader.start()
        reader.join(0.3)
        assert got == [], "the third worker must wait"
        os.kill(workers[0].pid, signal.SIGKILL)
        reader.join(10)
        assert got in (["cuda:0"], ["cuda:1"])
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def test_a_worker_that_waits_says_so_and_can_be_stopped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held = [try_lock(tmp_path, gpu) for gpu in GPUS]
    assert all(isinstance(lock, GpuLock) for lock in held)
    end = time.monotonic() + 0.3
    logging.getLogger("saeopt").propagate = True
    with caplog.at_level(logging.WARNING, logger="saeopt"):
        assert take_gpu(tmp_path, GPUS, stop=lambda: time.monotonic() > end, poll_seconds=0.05) is None
    # by identity: where both the library's and the root logger hand it on, one record is captured twice
    waits = {id(record) for record in caplog.records if "All 2 GPUs are taken" in record.getMessage()}
    assert len(waits) == 1


def test_a_released_gpu_is_free_again(tmp_path: Path) -> None:
    lock = take_gpu(tmp_path, GPUS)
    assert lock is not None
    assert lock.device == "cuda:0"
    assert try_lock(tmp_path, GPUS[0]) is None
    lock.release()
    lock.release()
    again = try_lock(tmp_path, GPUS[0])
    assert again is not None
    again.release()


def test_a_child_program_does_not_keep_its_dead_parents_gpu(tmp_path: Path) -> None:
    lock = take_gpu(tmp_path, GPUS[:1])
    assert lock is not None
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    try:
        lock.release()
        assert try_lock(tmp_path, GPUS[0]) is not None
    finally:
        child.kill()
        child.wait()


def test_without_gpus_a_worker_gets_none_and_does_not_wait(tmp_path: Path) -> None:
    assert take_gpu(tmp_path, []) is None


def test_lock_files_are_open_to_containers_of_other_users(tmp_path: Path) -> None:
    lock = take_gpu(tmp_path, GPUS)
    assert lock is not None
    assert (tmp_path / "GPU-aaaa.lock").stat().st_mode & 0o777 == 0o666
    lock.release()


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["GPU-aaaa", "GPU-bbbb"]),
        ("1,0", ["GPU-bbbb", "GPU-aaaa"]),
        ("GPU-bbbb", ["GPU-bbbb"]),
        ("", []),
        ("1,-1,0", ["GPU-bbbb"]),
    ],
)
def test_numbers_follow_cuda_visible_devices(visible: str | None, expected: list[str]) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    found = _as_cuda_numbers(GPUS, environment)
    assert [gpu.uuid for gpu in found] == expected
    assert [gpu.index for gpu in found] == list(range(len(expected)))


def test_gpus_come_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho '0, GPU-aaaa'\necho '1, GPU-bbbb'\n", encoding="utf-8")
    fake.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert visible_gpus() == GPUS


def test_the_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEOPT_GPU_LOCKS", "/data/locks")
    assert lock_folder() == Path("/data/locks")
    monkeypatch.setenv("SAEOPT_GPU_LOCKS", "")
    assert lock_folder() is None
