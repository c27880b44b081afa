"""The peers' trainers, in processes of their own environments."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peers.comparison import Comparison, Job
from saeopt.console import log

TRAINER = Path(__file__).with_name("trainer.py")


def train_peers(comparison: Comparison, jobs: list[Job], started: float) -> list[threading.Thread]:
    """Processes that share the jobs of the peers; each keeps to one library, whose import takes long."""
    options = comparison.options
    waiting: dict[str, queue.SimpleQueue[Job]] = {}
    for job in jobs:
        if not job.path(options.out).exists():
            waiting.setdefault(job.system, queue.SimpleQueue()).put(job)
    if not waiting:
        return []
    threads = []
    for number, device in enumerate(_devices(options)):
        library = list(waiting)[number % len(waiting)]
        order = [library, *(other for other in waiting if other != library)]
        threads.append(threading.Thread(target=_work, args=(comparison, order, waiting, device, started)))
        threads[-1].start()
    return threads


def _devices(options: Any) -> Iterator[str]:
    for part in options.jobs.split(","):
        device, sign, count = part.rpartition("=")
        yield from [device if sign else options.device] * int(count)


def _work(
    comparison: Comparison,
    order: list[str],
    waiting: dict[str, queue.SimpleQueue[Job]],
    device: str,
    started: float,
) -> None:
    """One thread's processes: its library's jobs first, then those that another library has left."""
    options = comparison.options
    for library in order:
        process: subprocess.Popen[str] | None = None
        while options.deadline is None or time.perf_counter() - started < options.deadline:
            try:
                job = waiting[library].get_nowait()
            except queue.Empty:
                break
            if process is None:
                command = [options.env.format(library), str(TRAINER), library]
                command += [str(comparison.activations), device]
                errors = (options.out / f"{library}-{threading.get_ident()}.log").open("w")
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
                )
            assert process.stdin is not None
            assert process.stdout is not None
            asked = {"sae_type": job.sae_type, "sparsity": job.sparsity, "lr": job.lr, "seed": job.seed}
            asked |= {
                "d": comparison.d,
                "h": comparison.h,
                "batch": comparison.batch,
                "out": str(job.path(options.out)),
            }
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                log.error("%s: %s failed; see %s-*.log in %s", library, job, library, options.out)
                break
            log.info("%s %s %g lr %g seed %d on %s: %.0f s", *vars(job).values(), device, json.loads(answer)["seconds"])
        if process is not None and process.stdin is not None:
            process.stdin.close()
            process.wait()
