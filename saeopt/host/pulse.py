"""A sign that work goes on, from wherever it is done: a window, a pass of the language model, a message."""

from __future__ import annotations

import time
from collections.abc import Callable

_listeners: list[Callable[[], None]] = []


def pulse() -> None:
    """Something has been done."""
    for listener in _listeners:
        listener()


def listen(listener: Callable[[], None]) -> None:
    """Call `listener` at every pulse of this process."""
    _listeners.append(listener)


class Rhythm:
    """Remembers when the last pulse was, and the longest pause between two."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self.longest = 0.0

    def __call__(self) -> None:
        now = time.monotonic()
        self.longest = max(self.longest, now - self.last)
        self.last = now
