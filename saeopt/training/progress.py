"""A run or a pack on a terminal: a progress bar, signals, and where they lead."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from saeopt.console import error_console, log
from saeopt.files import remove_empty
from saeopt.host.launcher import launched
from saeopt.metrics import Shown, shown_in
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
        self.unused: list[Path] = []
        """A run folder in which nothing lies yet, and those above it that were made for it: an end before training
        leaves none behind."""

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
        """Remove the run folder, and those above it that were made for it, where nothing lies in them."""
        remove_empty(self.unused)


def leave(code: int) -> None:
    """End the process now; threads and services that hang are left behind."""
    with suppress(Exception):  # a signal may have come in the middle of a write
        error_console.show_cursor(True)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


class Bar:
    """How far a pack is: a bar on a terminal, a line now and then where there is none.

    Args:
        every: seconds between two lines.
        shown: whether there is anything to see at all (of several ranks only the first shows something).
        alone: whether no other process draws on this terminal; else there are lines.
    """

    def __init__(self, every: float = LINE_SECONDS, *, shown: bool = True, alone: bool = True) -> None:
        rest, note = Column(ratio=1, min_width=8), Column(ratio=4, no_wrap=True, overflow="ellipsis")
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=None, table_column=rest),
            TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", table_column=note),
        )  # fmt: skip
        # Expanded, the two columns of a ratio share what the others leave: no number of theirs is ever cut.
        self._drawn = Progress(*columns, console=error_console, expand=True)
        self._shown, self._every = shown, every
        self._on_terminal = error_console.is_terminal and alone
        self._task = self._drawn.add_task("loading", total=None, note="model and data")
        self._said = time.monotonic()
        self._newest: dict[str, tuple[float, float, float]] = {}

    def __enter__(self) -> Bar:
        if self._shown and self._on_terminal:
            self._drawn.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown and self._on_terminal:
            self._drawn.stop()

    def begin(self, samples: int, total: int) -> None:
        """Training starts."""
        self._drawn.reset(self._task, total=total, completed=samples, description="training", note="")

    def measured(self, name: str, metrics: Metrics) -> None:
        """The newest numbers of a trial: means over its hook points."""

        def mean(key: str) -> float:
            values = [row[key] for row in metrics.values() if key in row]
            return sum(values) / len(values) if values else float("nan")

        self._newest[name] = (mean("l0"), mean("fvu"), mean("loss"))

    def update(self, samples: int, total: int, tokens_per_s: float) -> None:
        """The stream has come so far. What matters most comes first: a narrow window cuts the end."""
        if not self._shown:
            return
        done, note = samples >= total, self._note(f"{tokens_per_s:,.0f} tok/s")
        self._drawn.update(self._task, completed=samples, note=note, description="evaluating" if done else "training")
        if not self._on_terminal and (done or time.monotonic() - self._said > self._every):
            self._said = time.monotonic()
            log.info("%s of %s samples  %s", f"{samples:,}", f"{total:,}", note)

    def _note(self, speed: str) -> str:
        if not self._newest:
            return speed
        l0, fvu, loss = zip(*self._newest.values(), strict=True)
        if len(l0) == 1:
            return f"L0 {l0[0]:.1f}  FVU {fvu[0]:.3f}  {speed}  loss {loss[0]:.3g}"
        return f"{len(l0)} trials  L0 {min(l0):.0f}–{max(l0):.0f}  FVU {min(fvu):.2f}–{max(fvu):.2f}  {speed}"


class RunObserver(Observer):
    """Shows how far a run is. `pictures` draws what people look at when it has ended."""

    def __init__(self, interrupt: Interrupt, bar: Bar, pictures: Callable[[Path], object]) -> None:
        self.interrupt, self.bar, self.pictures = interrupt, bar, pictures

    def draw(self, name: str, folder: Path) -> None:
        self.pictures(folder)

    def on_start(self, name: str, samples: int, total: int) -> None:
        self.interrupt.training = True
        if samples:
            log.info("resuming at sample %s of %s", f"{samples:,}", f"{total:,}")
        self.bar.begin(samples, total)

    def on_log(self, name: str, samples: int, metrics: Metrics) -> str | None:
        self.bar.measured(name, metrics)
        return None

    def progress(self, samples: int, total: int, tokens_per_s: float) -> None:
        self.bar.update(samples, total, tokens_per_s)

    def on_eval(self, name: str, samples: int, metrics: Metrics) -> str | None:
        for hook, row in metrics.items():
            shown = "  ".join(
                f"{metric.title} {metric.text(row.get(metric.name))}" for metric in shown_in(Shown.HEADLINE)
            )
            log.info("sample %s  %s  %s", f"{samples:,}", hook, shown)
        return None

    def should_interrupt(self) -> bool:
        return self.interrupt.signum is not None


@contextmanager
def run_observer(interrupt: Interrupt, pictures: Callable[[Path], object]) -> Iterator[RunObserver]:
    """An observer whose bar is drawn on stderr while the context lasts."""
    with Bar(shown=launched().rank == 0) as bar:
        yield RunObserver(interrupt, bar, pictures)


class PackObserver:
    """Another observer of a pack, and a bar that shows what it is told."""

    def __init__(self, inner: Observer, bar: Bar) -> None:
        self._inner, self._bar = inner, bar

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def on_start(self, name: str, samples: int, total: int) -> None:
        """Passed on."""
        self._bar.begin(samples, total)
        self._inner.on_start(name, samples, total)

    def on_log(self, name: str, samples: int, metrics: Metrics) -> str | None:
        """Passed on."""
        self._bar.measured(name, metrics)
        return self._inner.on_log(name, samples, metrics)

    def progress(self, samples: int, total: int, tokens_per_s: float) -> None:
        """Passed on."""
        self._bar.update(samples, total, tokens_per_s)
        self._inner.progress(samples, total, tokens_per_s)
