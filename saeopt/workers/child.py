"""The process in which a worker's trials are trained: what breaks it breaks nothing else.

It talks with the worker through one pipe. The worker says `train`, `fit`, `probe` (answered by `done` or `failed`),
`interrupt`, `lost` and `answer`; the child says what an observer hears. When the worker is gone, so is the child.
"""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from saeopt.config.io import validate_run
from saeopt.console import log
from saeopt.errors import redact_tracebacks
from saeopt.host.pulse import Rhythm, listen
from saeopt.runs.owner import Owner
from saeopt.training.plan import Metrics, Observer, Rungs, TrialPlan, TrialResult
from saeopt.workers.faults import failure_of, free_memory
from saeopt.workers.local import LocalTraining

BROKEN = 70
"""Exit code after an assertion on the device."""
_PR_SET_PDEATHSIG = 1
_TICK_SECONDS = 1.0

PackedPlan = tuple[str, dict[str, Any], str, bool, Owner | None]
"""A plan as it crosses the pipe: classes of one's own are imported by who uses them."""


def packed(plan: TrialPlan) -> PackedPlan:
    """A plan for the pipe."""
    return plan.name, plan.config.model_dump(mode="json"), str(plan.run_dir), plan.resume, plan.owner


def unpacked(plan: PackedPlan) -> TrialPlan:
    """The inverse of :func:`packed`."""
    name, raw, run_dir, resume, owner = plan
    return TrialPlan(name, validate_run(raw, f"trial {name}"), Path(run_dir), resume, owner)


def main(pipe: Connection, device: str) -> None:
    """Serve the worker until it is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for signum in (signal.SIGTERM, signal.SIGINT):  # these go to the worker, which passes them on when it is their time
        signal.signal(signum, signal.SIG_IGN)
    redact_tracebacks()
    try:
        _Child(pipe, device).serve()
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


class _Child:
    def __init__(self, pipe: Connection, device: str) -> None:
        self.pipe, self.training = pipe, LocalTraining(device)
        self.requests: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.interrupted = threading.Event()
        self.lost: set[str] = set()
        self._sending = threading.Lock()
        self.rhythm = Rhythm()
        self._told = 0.0

    def serve(self) -> None:
        """One request after the other."""
        log.handlers[:] = [_ToWorker(self.say)]
        log.setLevel(logging.INFO)
        log.propagate = False
        listen(self._tick)
        threading.Thread(target=self._listen, name="saeopt-worker", daemon=True).start()
        import saeopt.training.loop  # noqa: F401  (seconds: while the worker claims its first trials)

        self.say("ready")
        handlers: dict[str, Callable[[Any], Any]] = {"train": self._train, "fit": self._fit, "probe": self._probe}
        while True:
            kind, content = self.requests.get()
            if kind == "end":
                return
            try:
                self.say("done", handlers[kind](content))
            except Exception as error:
                failure = failure_of(error)
                error.__traceback__ = None  # its frames hold the pack's tensors
                self.say("failed", failure)
                if failure.kind == "fatal":
                    os._exit(BROKEN)
            free_memory()

    def say(self, kind: str, *content: Any) -> None:
        """Tell the worker something; without a worker there is nothing to do."""
        try:
            with self._sending:
                self.pipe.send((kind, *content))
        except OSError:
            os._exit(1)

    def ask(self, kind: str, *content: Any) -> Any:
        """Tell the worker something and wait for what it makes of it."""
        self.say(kind, *content)
        return self.answers.get()

    def _listen(self) -> None:
        while True:
            try:
                kind, content = self.pipe.recv()
            except (EOFError, OSError):
                os._exit(1)
            if kind == "interrupt":
                self.interrupted.set()
            elif kind == "lost":
                self.lost.add(content)
            elif kind == "answer":
                self.answers.put(content)
            else:
                self.requests.put((kind, content))

    def _tick(self) -> None:
        self.rhythm()
        if self.rhythm.last - self._told > _TICK_SECONDS:
            self._told = self.rhythm.last
            self.say("tick", self.rhythm.longest)

    # ---- requests
    def _train(self, content: tuple[Sequence[PackedPlan], dict[str, str]]) -> dict[str, TrialResult]:
        plans, environment = content
        os.environ.update(environment)
        self.interrupted.clear()
        self.lost.clear()
        mine = [unpacked(plan) for plan in plans]
        for plan in mine:
            if plan.owner is not None:
                plan.owner.adopt(plan.run_dir)
        self.rhythm = Rhythm()
        return self.training(mine, _Remote(self))

    def _fit(self, raw: dict[str, Any]) -> int:
        return self.training.fitting(validate_run(raw, "study"))

    def _probe(self, content: tuple[dict[str, Any], bool, Path]) -> None:
        raw, architecture, runs = content
        self.training.probe(validate_run(raw, "study"), architecture, runs)


class _Remote(Observer):
    """Passes everything on to the worker; only log steps, evaluations and rungs wait for its word."""

    def __init__(self, child: _Child) -> None:
        self.child = child

    def on_start(self, name: str, samples: int, total: int) -> None:
        self.child.say("start", name, samples, total)

    def on_log(self, name: str, samples: int, metrics: Metrics) -> str | None:
        return cast("str | None", self.child.ask("log", name, samples, metrics))

    def on_eval(self, name: str, samples: int, metrics: Metrics) -> str | None:
        return cast("str | None", self.child.ask("eval", name, samples, metrics))

    def on_evaluated(self, samples: int) -> dict[str, str]:
        return dict(self.child.ask("evaluated", samples))

    def rungs(self, total: int, window: int) -> Rungs:
        return cast("Rungs", self.child.ask("rungs", total, window))

    def on_rung(self, samples: int, metrics: Mapping[str, Metrics]) -> dict[str, str]:
        return dict(self.child.ask("rung", samples, metrics))

    def on_checkpoint(self, name: str, samples: int, path: Path) -> None:
        self.child.say("checkpoint", name, samples, path)

    def draw(self, name: str, folder: Path) -> None:
        from saeopt.views.plots import plot_run

        plot_run(folder)

    def on_end(self, name: str, result: TrialResult) -> None:
        self.child.say("end", name, result)

    def progress(self, samples: int, total: int, tokens_per_s: float) -> None:
        self.child.say("progress", samples, total, tokens_per_s)

    def evaluation_takes(self, samples: float) -> None:
        self.child.say("evaluation", samples)

    def lost(self, name: str) -> bool:
        return name in self.child.lost

    def should_interrupt(self) -> bool:
        return self.child.interrupted.is_set()


class _ToWorker(logging.Handler):
    """The worker writes the log: on the terminal, and beside each run."""

    def __init__(self, say: Callable[..., None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        self._say("say", record.levelno, text)
