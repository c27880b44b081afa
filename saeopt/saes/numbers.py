"""Numbers of a loss that change from window to window, and how far a run is when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Progress(NamedTuple):
    """How far a run is at the end of a window, in samples; the warm-ups are those of the learning rate and of λ."""

    samples: int
    total: int
    warmup: int = 0
    sparsity_warmup: int = 0

    @property
    def after_warmup(self) -> float:
        """The share of what follows the warm-up, 0 … 1."""
        return min(1.0, max(0.0, (self.samples - self.warmup) / max(1, self.total - self.warmup)))


class Number(NamedTuple):
    """A number that an architecture reads in its training forward, the same for all tokens of a window.

    `at` gives it from the architecture's config where no control moves it; `logged` says whether it is then told with
    the metrics.
    """

    at: Callable[[Any, Progress], float]
    logged: bool = True


def sparsity_coeff(config: Any, progress: Progress) -> float:
    """λ: `sparsity_coeff` after a linear warm-up (Anthropic, April 2024)."""
    given: float = config.sparsity_coeff
    warmup = progress.sparsity_warmup
    return given * (progress.samples / warmup if progress.samples < warmup else 1.0)


EVALUATED = "evaluated"
"""The tally of a code's non-zeros in its evaluation form, where training's are others."""
