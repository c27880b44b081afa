"""What giving up on a trial rests on: curves, warm-ups, reports. The rules themselves: `search.stopping`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner

from saeopt.config.run import RunConfig
from saeopt.config.stopping import EarlyStopping

MAX_REPORTS = 50
Curve = dict[int, list[float]]
"""Samples → objective values."""


def warmup_samples(rule: EarlyStopping, config: RunConfig, total: int) -> int:
    """Samples before which nothing is stopped: a share of the trial after the warm-ups of learning rate and λ."""
    warmup = max(config.warmup_samples, config.sparsity_warmup(config.saes, total))
    return min(warmup + int(rule.warmup * total), max(total - 1, 0))


def make_pruner(rule: EarlyStopping, warmup: int, total: int) -> BasePruner:
    """Optuna's pruner, whose brackets a sampler looks at; steps are samples."""
    first = max(1, warmup)
    match rule.type:
        case "median":
            return MedianPruner(n_startup_trials=rule.n_startup_trials, n_warmup_steps=first)
        case "asha":
            return SuccessiveHalvingPruner(min_resource=first, reduction_factor=rule.reduction_factor)
        case "hyperband":
            return HyperbandPruner(
                min_resource=first, max_resource=max(total, first + 1), reduction_factor=rule.reduction_factor
            )
        case _:
            return NopPruner()


class Patience:
    """Counts reports of a collapse in a row; what stands at one number of samples (log step, evaluation) is one report.

    A trial that changes hands counts on: its earlier reports are given again.
    """

    def __init__(self) -> None:
        self.count, self._before, self._samples = 0, 0, -1

    def report(self, samples: int, collapsed: bool) -> int:
        """The count after another report: one is enough to say that the SAEs have not collapsed."""
        if samples != self._samples:
            self._samples, self._before = samples, self.count
            self.count = self._before + 1 if collapsed else 0
        elif not collapsed:
            self.count = 0
        return self.count


def is_due(before: int, samples: int, total: int) -> bool:
    """Whether a report falls between two numbers of samples, at most `MAX_REPORTS` over a trial."""
    return total > 0 and samples * MAX_REPORTS // total > before * MAX_REPORTS // total


def dominated(mine: Sequence[float], other: Sequence[float], maximised: Sequence[bool], margin: float) -> bool:
    """Whether `other` is better in every objective, each time by more than `margin` of the larger magnitude."""
    for a, b, up in zip(mine, other, maximised, strict=True):
        ahead = (b - a) if up else (a - b)
        if ahead <= margin * max(abs(a), abs(b)):
            return False
    return True


def parse_curve(stored: Mapping[str, Sequence[float]]) -> Curve:
    """A curve as JSON keeps it."""
    return {int(samples): [float(v) for v in values] for samples, values in stored.items()}


def at(curve: Curve, samples: int) -> list[float] | None:
    """The last values of a curve up to `samples`."""
    before = [s for s in curve if s <= samples]
    return curve[max(before)] if before else None
