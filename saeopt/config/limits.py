"""How much a study may spend, and when it ends by itself."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from saeopt.config.base import Amount, Float, Int, StrictModel, nearest
from saeopt.metrics import METRICS

UNITS = ("gpu_hours", "tokens", "trials", "disk_gb")
"""What a budget is counted in."""
_Size = Annotated[Float, Field(gt=0, le=1e9)]


class Budget(StrictModel):
    """What all workers of a study may spend together. When one of them is used up no trial is begun any more:
    `study status` says so, workers end, and `study resume NAME --budget UNIT=NUMBER` gives more. What was paused at the
    end is paused again then, and the best go on while the budget lasts, once nothing else waits."""

    gpu_hours: _Size | None = None
    """Hours that devices (GPUs, CPUs) were taken by packs, loading and evaluation included. When they are used up,
    packs write checkpoints and go back to the queue within seconds."""
    tokens: Amount | None = None
    """Training tokens of the trials: each trial counts its own (a pack of 8 counts 8 times, though the language model
    runs once; seeds and hook points count once), and so does what is done again. When they are used up, packs write
    checkpoints and go back to the queue within seconds."""
    trials: Annotated[Int, Field(gt=0, le=10**9)] | None = None
    """Ended trials. No more are begun than this number; what has begun is trained to its end."""
    disk_gb: _Size | None = None
    """10⁹ bytes that the run folders may hold. No trial is begun that would exceed it, by the largest run folder so
    far; what has begun is trained to its end. `study clean` makes room."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.limits:
            raise ValueError(f"needs a number for one of {', '.join(UNITS)}")
        return self

    @property
    def limits(self) -> dict[str, float]:
        """Unit → number, of those that are given."""
        return {unit: float(value) for unit in UNITS if (value := getattr(self, unit)) is not None}


def _trials(value: object) -> object:
    words = value.split() if isinstance(value, str) else []
    return words[0] if len(words) == 2 and words[1] in ("trial", "trials") else value


class StopWhen(StrictModel):
    """When a study ends by itself: its front no longer grows. No trial is begun then; what has begun is trained to its
    end, and `study resume NAME` goes on until another `over` trials have added nothing. A front is that of all
    objectives that are of one hook point, or means over hook points; the study ends when none of them grows."""

    hypervolume_gain: Annotated[Float, Field(gt=0, lt=1)] = 0.01
    """Share by which the last trials must have made the hypervolume of a front larger. Its reference point lies beyond
    the worst end of the front as it is now, in each objective by a tenth of the front's length, so that neither a bad
    trial nor the scale of an objective counts; where the front is one point, at the median of all trials. L0 counts by
    its logarithm."""
    over: Annotated[Int, BeforeValidator(_trials), Field(gt=0, le=10**6)] = 20
    """How many of the last ended trials (`20` or `20 trials`); failed and paused ones do not count."""


COSTS = ("parameters", "memory_gib")
"""What a constraint may be about besides metrics: of a trial as a whole."""
_BOUND = re.compile(r"\s*(<=|>=)\s*(\S+)\s*")


@dataclass(frozen=True)
class Bound:
    """A constraint."""

    name: str
    at_most: bool
    limit: float

    @classmethod
    def parse(cls, name: str, text: str) -> Bound:
        """From `<= 0.1` or `>= 0.5`.

        Raises:
            ValueError: it is something else, or about something that no evaluation measures.
        """
        known = [*(metric.name for metric in METRICS.values() if metric.evaluation), *COSTS]
        if name not in known:
            raise ValueError(f"unknown metric '{name}'{nearest(name, known)} (known: {', '.join(known)})")
        found = _BOUND.fullmatch(text)
        try:
            limit = float(found[2].replace("_", "")) if found else math.nan
        except ValueError:
            limit = math.nan
        if found is None or not math.isfinite(limit):
            raise ValueError(f"'{name}' must be '<= NUMBER' or '>= NUMBER' (got {text!r})")
        return cls(name, found[1] == "<=", limit)


def _parsed(constraints: dict[str, str]) -> dict[str, str]:
    for name, text in constraints.items():
        Bound.parse(name, text)
    return constraints


def _texts(value: object) -> object:
    return {k: v if isinstance(v, str) else str(v) for k, v in value.items()} if isinstance(value, dict) else value


Constraints = Annotated[dict[str, str], BeforeValidator(_texts), AfterValidator(_parsed)]
