"""An iterator that is read ahead by a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
_POLL_SECONDS = 0.1


class Prefetch(Generic[T]):
    """Items of an iterator in their order, up to `depth` of them read ahead; errors come out where they belong."""

    def __init__(self, items: Iterator[T], depth: int):
        self._items = items
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(max(1, depth))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, name="saeopt-tokens", daemon=True)
        self._failed: BaseException | None = None
        self._thread.start()

    def _read(self) -> None:
        try:
            for item in self._items:
                if not self._put((item, None)):
                    return
            self._put((None, StopIteration()))
        except BaseException as error:
            self._put((None, error))

    def _put(self, entry: tuple[T | None, BaseException | None]) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(entry, timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._failed is None:
            item, self._failed = self._ready.get()
        if self._failed is not None:
            raise self._failed
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Stop the thread; safe to call again."""
        self._stop.set()
        self._thread.join()
        self._failed = self._failed or StopIteration()
