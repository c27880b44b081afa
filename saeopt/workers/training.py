"""The worker's end of the process in which its trials are trained (`workers.child`)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from saeopt.config.run import RunConfig
from saeopt.console import log
from saeopt.errors import HostError
from saeopt.host.pulse import pulse
from saeopt.training.plan import Observer, TrialPlan, TrialResult
from saeopt.workers import child as worker_child
from saeopt.workers.faults import TrainingDied, TrainingFailed, TrainingLeft, TrainingStalled

CACHE_VARIABLE = "SAEOPT_ACTIVATION_CACHE"
STALL_SECONDS, STALL_WINDOWS = 1800.0, 50.0
"""Without a limit in the study: this number of seconds, or this many times the longest pause seen, whichever is more;
four times that while loading."""
_POLL_SECONDS = 0.2


class ChildTraining:
    """Trains packs in a child process, one after another in the same; a fresh one takes the place of one that died.

    `stall` is how many seconds without progress end the child (None: by what it has shown so far).

    Args:
        context: how processes are started; not by a fork, which CUDA does not survive.
    """

    def __init__(self, device: str, context: Any = None) -> None:
        self.device = device
        self.stall: float | None = None
        self._context = context or multiprocessing.get_context("spawn")
        self._process: Any = None
        self._pipe: Connection | None = None
        self._ready = False
        self._longest = 0.0

    def start(self) -> None:
        """Have a child; it imports for some seconds while the caller does other things."""
        if self._process is not None and self._process.exitcode is None:
            return
        self._drop()
        self._pipe, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=worker_child.main, args=(theirs, self.device), name="saeopt-training"
        )
        self._process.start()
        theirs.close()
        self._ready, self._longest = False, 0.0

    @property
    def pid(self) -> int | None:
        """The child's process number."""
        return None if self._process is None else self._process.pid

    def __call__(self, plans: Sequence[TrialPlan], observer: Observer) -> dict[str, TrialResult]:
        """Train plans together.

        Raises:
            TrainingFailed: as an error in the child.
            TrainingDied: the child ended by itself.
            TrainingStalled: the child made no progress and was ended.
            TrainingLeft: the observer interrupted before the training had begun.
            HostError: no child can be started here.
        """
        environment = {k: os.environ[k] for k in (CACHE_VARIABLE,) if k in os.environ}
        content = ([worker_child.packed(plan) for plan in plans], environment)
        results: dict[str, TrialResult] = self._ask("train", content, observer, [plan.name for plan in plans])
        return results

    def fitting(self, config: RunConfig) -> int:
        """How many trials like this one fit on the device."""
        return int(self._ask("fit", config.model_dump(mode="json"), Observer(), []))

    def probe(self, config: RunConfig, architecture: bool, runs: Path, observer: Observer) -> None:
        """Raise what would keep a trial like this one from being trained here, with its run folder in `runs`."""
        self._ask("probe", (config.model_dump(mode="json"), architecture, runs), observer, [])

    def close(self, seconds: float = 2.0) -> None:
        """End the child."""
        if self._process is not None:
            with suppress(_Gone):
                self._send("end")
            self._process.join(seconds if self._ready else 0.0)
        self._drop()

    # ---- talking
    def _ask(self, request: str, content: Any, observer: Observer, names: Sequence[str]) -> Any:
        """One request, and what the child says until it has been answered."""
        self.start()
        talk = _Talk(observer, names)
        try:
            self._send(request, content)
            while True:
                if not self._wait(talk):
                    continue
                kind, *said = self._receive()
                pulse()
                if kind == "done":
                    return said[0]
                if kind == "failed":
                    if said[0].kind == "fatal":
                        raise self._died(said[0].reason)
                    raise TrainingFailed(said[0])
                self._hear(kind, said, talk)
        except _Gone:
            raise self._died() from None

    def _wait(self, talk: _Talk) -> bool:
        """A little, for the child to say something; meanwhile it hears what has changed, or is ended."""
        said = self._heard(_POLL_SECONDS)
        self._pass_on(talk)
        for name in [n for n in talk.names if talk.observer.lost(n)]:
            talk.names.remove(name)
            self._send("lost", name)
        if said:
            talk.heard = time.monotonic()
        elif self._process.exitcode is not None and not self._heard():
            raise _Gone
        elif time.monotonic() - talk.heard > (limit := self._limit(talk.begun)):
            self._drop()
            raise TrainingStalled(f"no progress for {limit:.0f} s: its training process was ended")
        return said

    def _pass_on(self, talk: _Talk) -> None:
        """An interrupt, once."""
        if talk.observer.should_interrupt() and not talk.interrupted:
            if not talk.begun:  # it may be loading for minutes: nothing is lost
                self._drop()
                raise TrainingLeft
            talk.interrupted = True
            self._send("interrupt")

    def _limit(self, begun: bool) -> float:
        limit = max(STALL_SECONDS, STALL_WINDOWS * self._longest) if self.stall is None else self.stall
        return limit * (1 if begun else 4)

    def _hear(self, kind: str, said: list[Any], talk: _Talk) -> None:
        observer = talk.observer
        asked: dict[str, Callable[..., Any]] = {
            "log": observer.on_log, "eval": observer.on_eval, "evaluated": observer.on_evaluated,
            "rungs": observer.rungs, "rung": observer.on_rung,
        }  # fmt: skip
        if kind in asked:
            answer = asked[kind](*said)
            if kind == "rung":  # who is wanted elsewhere leaves at the rung itself
                self._pass_on(talk)
            self._send("answer", answer)
        elif kind == "ready":
            self._ready = True
        elif kind == "tick":
            self._longest = float(said[0])
        elif kind == "say":
            log.log(*said)
        else:
            talk.begun |= kind == "start"
            hears: dict[str, Callable[..., None]] = {
                "start": observer.on_start, "checkpoint": observer.on_checkpoint, "end": observer.on_end,
                "progress": observer.progress, "evaluation": observer.evaluation_takes,
            }  # fmt: skip
            hears[kind](*said)

    def _send(self, kind: str, content: Any = None) -> None:
        assert self._pipe is not None
        with _gone():
            self._pipe.send((kind, content))

    def _heard(self, seconds: float = 0.0) -> bool:
        assert self._pipe is not None
        with _gone():
            return self._pipe.poll(seconds)

    def _receive(self) -> tuple[Any, ...]:
        assert self._pipe is not None
        with _gone():
            said: tuple[Any, ...] = self._pipe.recv()
        return said

    # ---- the child's end
    def _died(self, reason: str = "") -> Exception:
        self._process.join(10)
        code, was_ready = self._process.exitcode, self._ready
        self._drop()
        if not was_ready:
            return HostError(f"the training process cannot start here: {ended(code)}")
        return TrainingDied(reason or f"its training process {ended(code)}")

    def _drop(self) -> None:
        if self._process is not None:
            if self._process.exitcode is None:
                self._process.kill()
                self._process.join(5)
            self._process = None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None


class _Gone(Exception):
    """The other end of the pipe is closed."""


@contextmanager
def _gone() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError):
        raise _Gone from None


class _Talk:
    """One request while it is being answered."""

    def __init__(self, observer: Observer, names: Sequence[str]) -> None:
        self.observer, self.names = observer, list(names)
        self.begun = self.interrupted = False
        self.heard = time.monotonic()


def ended(code: int | None) -> str:
    """What an exit code means."""
    if code is None:
        return "does not end"
    if code >= 0:
        return f"ended by itself with exit code {code}"
    name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else f"signal {-code}"
    return f"was ended by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")
