"""One GPU for each worker on a host, without configuration: an advisory lock per GPU in a folder that all workers see.

`docker compose up --scale workers=N` starts N equal containers, which all see all GPUs. Each takes the first GPU whose
lock file is free; the kernel releases a lock when its process ends, however it ends. The folder (`SAEOPT_GPU_LOCKS`)
must lie on a file system of the host itself: a volume that the containers of one host share. Files are named by the
GPU's UUID.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from saeopt.console import log

FOLDER_VARIABLE = "SAEOPT_GPU_LOCKS"


@dataclass(frozen=True)
class Gpu:
    """A GPU as this process sees it: `cuda:<index>`, and the name that every process gives it."""

    index: int
    uuid: str


@dataclass
class GpuLock:
    """A GPU that belongs to this process until `release` or the process's end."""

    gpu: Gpu
    descriptor: int

    @property
    def device(self) -> str:
        """`cuda:<index>`."""
        return f"cuda:{self.gpu.index}"

    def release(self) -> None:
        """Give the GPU back; safe to call again."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def lock_folder() -> Path | None:
    """The folder that `SAEOPT_GPU_LOCKS` names, or None: every GPU is then free for the taking."""
    value = os.environ.get(FOLDER_VARIABLE)
    return Path(value).expanduser() if value else None


def visible_gpus() -> list[Gpu]:
    """The GPUs as CUDA numbers them in this process; none where there is no driver. Creates no CUDA context."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # else CUDA counts the fastest first, nvidia-smi does not
    query = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    rows = [line.split(",") for line in done.stdout.splitlines() if line.count(",") == 1]
    return _as_cuda_numbers([Gpu(int(index), uuid.strip()) for index, uuid in rows], os.environ)


def _as_cuda_numbers(found: Sequence[Gpu], environment: os._Environ[str] | dict[str, str]) -> list[Gpu]:
    """Renumber nvidia-smi's list (all GPUs, by PCI bus) the way `CUDA_VISIBLE_DEVICES` has CUDA number them."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(found)
    chosen: list[str] = []
    for name in (part.strip() for part in visible.split(",")):
        match = [gpu.uuid for gpu in found if name == str(gpu.index) or (name and gpu.uuid.startswith(name))]
        if not match:  # CUDA itself stops reading at the first name that it does not know
            break
        chosen.append(match[0])
    return [Gpu(index, uuid) for index, uuid in enumerate(chosen)]


def try_lock(folder: Path, gpu: Gpu) -> GpuLock | None:
    """The GPU's lock, or None while another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{gpu.uuid}.lock"
    # Close-on-exec (the default) keeps the lock out of child programs; mode 666 admits containers of other users.
    mask = os.umask(0)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    finally:
        os.umask(mask)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.uname().nodename} {os.getpid()}\n".encode())  # for a person who looks
    return GpuLock(gpu, descriptor)


def take_gpu(
    folder: Path,
    gpus: Sequence[Gpu] | None = None,
    *,
    stop: Callable[[], bool] = lambda: False,
    poll_seconds: float = 2.0,
) -> GpuLock | None:
    """A GPU for this process alone.

    Waits, with one notice, while other workers hold every GPU. Returns None on a machine without GPUs, and when
    `stop()` became true while waiting.
    """
    found = visible_gpus() if gpus is None else list(gpus)
    if not found:
        return None
    told = False
    while not stop():
        for gpu in found:
            if (lock := try_lock(folder, gpu)) is not None:
                log.info("This worker has GPU %d (%s) of %d", gpu.index, gpu.uuid, len(found))
                return lock
        if not told:
            log.warning(
                "All %d GPUs are taken by other workers: this one waits for the first to be free "
                "(more workers than GPUs gain nothing)",
                len(found),
            )
            told = True
        time.sleep(poll_seconds)
    return None
