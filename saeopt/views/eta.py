"""Time left of a whole study, from what its workers measure of their packs."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from saeopt.trials.clock import scaled
from saeopt.trials.presence import Presence


def seconds_left(workers: Sequence[Presence], waiting: Sequence[float], most: int | None = None) -> float | None:
    """Seconds until the last trial of a study ends; None where no worker knows how long its pack takes.

    Workers take packs from the queue as they become free. `waiting`: what is still to be done of each waiting trial,
    as a share of the whole; `most`: the largest pack of those to come, if it is known.
    """
    known = [w for w in workers if w.whole]
    if not known:
        return None
    usual = max(known, key=lambda w: w.pack)
    free = []
    for i, w in enumerate(workers):
        left = (w.whole or usual.whole or 0.0) if w.left is None else max(0.0, w.left - max(w.age, 0.0))
        free.append((left if w.trials else 0.0, i))
    last = max(t for t, _ in free)
    heapq.heapify(free)
    at = 0
    while at < len(waiting):
        begin, i = heapq.heappop(free)
        worker = workers[i] if workers[i].whole else usual
        size = max(1, min(worker.pack, most or worker.pack))
        shares, at = waiting[at : at + size], at + size
        end = begin + (worker.whole or 0.0) * scaled(len(shares), worker.pack) * max(shares)
        last = max(last, end)
        heapq.heappush(free, (end, i))
    return last
