"""How much a study may spend, and when it ends by itself."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from saeopt.config.base import Amount, Float, Int, StrictModel

UNITS = ("gpu_hours", "tokens", "trials", "disk_gb")
"""What a budget is counted in."""
_Size = Annotated[Float, Field(gt=0, le=1e9)]


class Budget(StrictModel):
    """What all workers of a study may spend together. When one of them is used up no trial is begun any more:
    `study status` says so, workers end, and `study resume NAME --budget UNIT=NUMBER` gives more."""

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
