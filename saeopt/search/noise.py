"""Which differences between trials are more than noise, where each was trained with several seeds.

    s      the pooled standard deviation over seeds, √(Σ (n_i − 1) s_i² / Σ (n_i − 1)), of the SAEs that lie in the same
           range of L0 at a hook point: noise differs with L0, and one SAE's few seeds know little of it
    real   |mean_a − mean_b| > t · s · √(1/n_a + 1/n_b), t the 97.5 % quantile of Student's t with Σ (n_i − 1) degrees
           of freedom

Of pairs of equally good SAEs one in twenty is called different by chance. Imports nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from saeopt.metrics import more_is_better
from saeopt.search.pareto import Point
from saeopt.spread import N_SEEDS, STD

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Noise:
    """How far the seeds of SAEs lie apart in a metric: the pooled standard deviation and its degrees of freedom."""

    metric: str
    deviation: float
    freedom: int

    def margin(self, a: Point, b: Point) -> float:
        """Up to this a difference of two SAEs is noise."""
        from scipy.special import stdtrit

        t = float(stdtrit(self.freedom, (1 + CONFIDENCE) / 2))
        return t * self.deviation * math.sqrt(1 / a[N_SEEDS] + 1 / b[N_SEEDS])

    def really_better(self, a: Point, b: Point) -> bool:
        """Whether `a` is better than `b` by more than noise."""
        gain = a[self.metric] - b[self.metric]
        return (gain if more_is_better(self.metric) else -gain) > self.margin(a, b)


def pooled(points: Iterable[Point], metric: str) -> Noise | None:
    """The noise of a metric; None where no SAE has several seeds."""
    told = [(p[N_SEEDS], p[metric + STD]) for p in points]
    told = [(n, std) for n, std in told if n > 1 and math.isfinite(std)]
    freedom = sum(int(n) - 1 for n, _ in told)
    if freedom == 0:
        return None
    return Noise(metric, math.sqrt(sum((n - 1) * std**2 for n, std in told) / freedom), freedom)
