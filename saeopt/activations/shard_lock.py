"""Who harvests a shard: one of several processes, but nobody waits for one that has stopped."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from saeopt.console import log
from saeopt.host.pulse import pulse

PATIENCE_SECONDS = 20.0
"""Without progress by whoever holds a lock, for so long, the work is done twice."""
_POLL_SECONDS = 0.5


class Turn:
    """This process's turn at a shard."""

    def __init__(self, path: Path) -> None:
        self._sign = path.with_suffix(".progress")

    def progress(self) -> None:
        """Show those who wait that work goes on."""
        self._sign.touch()

    def seen(self) -> int:
        """What the holder has last shown."""
        try:
            return self._sign.stat().st_mtime_ns
        except OSError:
            return 0

    def over(self) -> None:
        """Nobody waits any more."""
        self._sign.unlink(missing_ok=True)


@contextmanager
def turn(path: Path) -> Iterator[Turn | None]:
    """Hold the lock file `path`; None where its holder makes no progress (stopped, or its disk hangs)."""
    mine, lock = Turn(path), FileLock(path)
    seen, since = mine.seen(), time.monotonic()
    while True:
        try:
            lock.acquire(timeout=_POLL_SECONDS)
            break
        except Timeout:
            now, before = mine.seen(), seen
            seen = now
            if now != before:
                since = time.monotonic()
                pulse()
            elif time.monotonic() - since > PATIENCE_SECONDS:
                log.warning("%s: its holder has made no progress for %.0f s: not waiting", path, PATIENCE_SECONDS)
                yield None
                return
    try:
        yield mine
    finally:
        mine.over()
        lock.release()
