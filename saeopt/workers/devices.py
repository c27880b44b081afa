"""Which devices a worker uses, and one child process per device where there are several."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from saeopt.console import log
from saeopt.errors import UserError, WorkerFault
from saeopt.host.gpu_lock import visible_gpus

_PR_SET_PDEATHSIG = 1
_PARENT = "SAEOPT_WORKER_PARENT"
_RESTARTS = 10
_FAULT_PAUSE, _LONGEST_PAUSE = 30.0, 900.0
"""Seconds before a worker is started again whose host, store or version is at fault: doubled each time."""


def parse_devices(text: str) -> list[str]:
    """`auto` (every visible GPU, else the CPU), or a comma-separated list such as `cuda:0,cuda:1,cpu,cpu`."""
    if text == "auto":
        return [f"cuda:{gpu.index}" for gpu in visible_gpus()] or ["cpu"]
    found = [part.strip() for part in text.split(",") if part.strip()]
    for device in found:
        kind, _, index = device.partition(":")
        if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
            raise UserError(f"--devices {text}: '{device}' is no device (auto, cpu, cuda:0, …)")
    if not found:
        raise UserError("--devices: the list is empty")
    return found


def show_devices() -> list[tuple[str, str]]:
    """Every device with a word about it."""
    import torch

    rows = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    return [*rows, ("cpu", f"{os.cpu_count()} cores")]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def is_child() -> bool:
    """Whether this process is one of several workers of one command."""
    return _PARENT in os.environ


def watch_parent(interrupted: threading.Event) -> None:
    """In a child: end in the orderly way when the parent is gone (also where the kernel does not tell us)."""
    parent = os.environ.get(_PARENT)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1.0)
        interrupted.set()

    threading.Thread(target=watch, name="saeopt-parent", daemon=True).start()


def run_children(
    devices: Sequence[str], arguments: Sequence[str], shares: Sequence[int | None], stop: threading.Event
) -> int:
    """One worker per device until all have ended; a crashed one is started again. Returns the worst exit code.

    Signals to the parent are passed on; the storage URL goes by the environment, so that no process list shows it.
    """
    environment = os.environ | {_PARENT: str(os.getpid()), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}

    def start(index: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "saeopt.worker", *arguments, "--devices", devices[index]]
        if shares[index] is not None:
            command += ["--limit", str(shares[index])]
        preexec = _die_with_parent if sys.platform == "linux" else None
        # A session of its own: Ctrl-C reaches the parent alone, which passes it on once.
        return subprocess.Popen(command, env=environment, preexec_fn=preexec, start_new_session=True)

    alive = {i: start(i) for i in range(len(devices)) if shares[i] != 0}
    due: dict[int, float] = {}
    restarts, worst, told = 0, 0, False
    while alive or (due and not stop.is_set()):
        if stop.wait(0.2) and not told:
            told = True
            for process in alive.values():
                process.terminate()
        for index, process in list(alive.items()):
            code = process.poll()
            if code is None:
                continue
            del alive[index]
            if code in (0, 2) or stop.is_set() or restarts >= _RESTARTS:
                worst = max(worst, code if code >= 0 else 128 - code)
                continue
            restarts += 1
            pause = min(_FAULT_PAUSE * 2 ** (restarts - 1), _LONGEST_PAUSE) if code == WorkerFault.exit_code else 2.0
            log.warning("the worker on %s ended with code %d; starting it again in %.0f s", devices[index], code, pause)
            due[index] = time.monotonic() + pause
        for index in [i for i, at in due.items() if time.monotonic() >= at and not stop.is_set()]:
            del due[index]
            alive[index] = start(index)
    return worst


def split(total: int | None, parts: int) -> list[int | None]:
    """A number of trials dealt out to the workers."""
    if total is None:
        return [None] * parts
    return [total // parts + (i < total % parts) for i in range(parts)]
