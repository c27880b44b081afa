"""The activation cache, read ahead: while a micro-batch is trained on, a thread reads and verifies the next ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from saeopt.activations.cache import ActivationCache

AHEAD_BYTES = 32 * 2**20
"""Read ahead per hook point: two shards, so that opening one is never waited for."""


class ReadAhead:
    """Micro-batches of a cache in their order. Close it at the end.

    The thread only reads. What it finds missing or damaged is left to the caller's thread, which alone may use the
    language model; and the caller waits for the thread before it turns to the cache: two threads never share it.
    Memory is new each time; torch keeps pinned memory until the copies from it are done, and uses it again.

    Args:
        pin: read into pinned memory, for copies to a GPU that nobody waits for.
    """

    def __init__(self, cache: ActivationCache, *, pin: bool) -> None:
        self.cache, self._pin = cache, pin
        per_slot = cache.T * max(cache.widths.values()) * cache.dtype.itemsize
        self.depth = max(2, AHEAD_BYTES // (per_slot * cache.batch))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="saeopt-cache")
        self._ahead: deque[tuple[int, Future[dict[str, Tensor] | None]]] = deque()

    def take(self, slot: int, hooks: Sequence[str]) -> dict[str, Tensor]:
        """x_Nd per hook point of the micro-batch of this rank that begins at `slot`.

        Hook points may leave from one call to the next, none may come. An error of the thread is raised here.
        """
        cache = self.cache
        x = self._ready(slot)
        if x is None:
            x = cache.read(hooks, slot, cache.batch, pin=self._pin)
        while len(self._ahead) < self.depth:
            following = (self._ahead[-1][0] if self._ahead else slot) + cache.batch * cache.world
            if not cache.covers(following // cache.group_slots * cache.group_slots):
                break
            reading = self._pool.submit(cache.peek, list(hooks), following, cache.batch, pin=self._pin)
            self._ahead.append((following, reading))
        return {hook: x[hook] for hook in hooks}

    def _ready(self, slot: int) -> dict[str, Tensor] | None:
        """What was read ahead; None if it is not there, and then the thread is idle and nothing is ahead."""
        while self._ahead:
            ahead, reading = self._ahead.popleft()
            x = reading.result()
            if ahead == slot and x is not None:
                return x
        return None

    def close(self) -> None:
        """Stop the thread after what it is reading; safe to call again."""
        self._pool.shutdown(cancel_futures=True)
