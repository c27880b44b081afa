"""One run on a terminal: a progress bar, signals, and where they lead."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from saeopt.console import error_console, log
from saeopt.training.plan import Metrics, Observer

GRACE_SECONDS = 9.0
"""A scheduler kills ten seconds after its signal."""
LINE_SECONDS = 15.0
"""Where no terminal is, progress is a line so often."""


class Interrupt:
    """SIGTERM and SIGINT: a checkpoint and an orderly end while training, an immediate end before it.

    Whatever hangs, the process ends with 128 + signal after `GRACE_SECONDS`; files are never half written.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.training = False
        self.unused: Path | None = None
        """A run folder in which nothing lies yet: an end before training leaves none behind."""

    def install(self) -> None:
        """Listen from now on. Python gives signals to the main thread alone: elsewhere a run goes without them."""
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        again, self.signum = self.signum is not None, signum
        if again or not self.training:
            self.remove_unused()
            leave(128 + signum)
        watchdog = threading.Timer(GRACE_SECONDS, leave, [128 + signum])
        watchdog.daemon = True
        watchdog.start()

    def remove_unused(self) -> None:
        """Remove the run folder if nothing lies in it."""
        with suppress(OSError):
            if self.unused is not None:
                self.unused.rmdir()


def leave(code: int) -> None:
    """End the process now; threads and services that hang are left behind."""
    with suppress(Exception):  # a signal may have come in the middle of a write
        error_console.show_cursor(True)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


class RunObserver(Observer):
    """Shows how far a run is; only rank 0 has a `bar`."""

    def __init__(self, interrupt: Interrupt, bar: Progress | None) -> None:
        self.interrupt, self.bar = interrupt, bar
        self.task = None if bar is None else bar.add_task("loading model and data", total=None, note="")
        self._said = time.monotonic()
        self._note = ""

    def on_start(self, name: str, samples: int, total: int) -> None:
        self.interrupt.training = True
        if samples:
            log.info("resuming at sample %s of %s", f"{samples:,}", f"{total:,}")
        if self.bar is not None and self.task is not None:
            self.bar.reset(self.task, total=total, completed=samples, description="training")

    def on_log(self, name: str, samples: int, metrics: Metrics) -> str | None:
        def mean(key: str) -> float:
            values = [row[key] for row in metrics.values() if key in row]
            return sum(values) / len(values) if values else float("nan")

        self._note = f"loss {mean('loss'):.3g}  L0 {mean('l0'):.1f}  FVU {mean('fvu'):.3f}"
        return None

    def progress(self, samples: int, total: int, tokens_per_s: float) -> None:
        if self.bar is None or self.task is None:
            return
        note = f"{tokens_per_s:,.0f} tokens/s  {self._note}"
        done = samples >= total
        self.bar.update(self.task, completed=samples, note=note, description="evaluating" if done else "training")
        if not error_console.is_terminal and (done or time.monotonic() - self._said > LINE_SECONDS):
            self._said = time.monotonic()
            log.info("%s of %s samples  %s", f"{samples:,}", f"{total:,}", note)

    def on_eval(self, name: str, samples: int, metrics: Metrics) -> str | None:
        for hook, row in metrics.items():
            log.info(
                "sample %s  %s  L0 %.1f  FVU %.4f  CE recovered %.3f",
                f"{samples:,}", hook, row["l0"], row["fvu"], row.get("ce_recovered", float("nan")),
            )  # fmt: skip
        return None

    def should_interrupt(self) -> bool:
        return self.interrupt.signum is not None


@contextmanager
def run_observer(interrupt: Interrupt) -> Iterator[RunObserver]:
    """An observer whose bar is drawn on stderr while the context lasts."""
    if int(os.environ.get("RANK") or 0) > 0:
        yield RunObserver(interrupt, None)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=error_console, disable=not error_console.is_terminal) as bar:
        yield RunObserver(interrupt, bar)
