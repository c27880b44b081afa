"""When a trial of a study is given up, or paused."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from saeopt.config.base import Float, Int, StrictModel

Count = Annotated[Int, Field(ge=0, le=10**9)]
Positive = Annotated[Int, Field(gt=0, le=10**9)]
Factor = Annotated[Float, Field(ge=0, le=1e9)]
Share = Annotated[Float, Field(gt=0, lt=1)]
RUNGS = (0.1, 0.3)
"""Of `halving`, where a study says nothing."""
_HALVING = {"rungs", "min_share", "keep", "rung_eval_samples", "keep_paused"}
_NOT_HALVING = {"warmup": "rungs", "n_startup_trials": "rungs", "margin": "keep"}
"""What `halving` does not read, and what it has instead."""


class Collapse(StrictModel):
    """When an SAE counts as collapsed, for workers, sampler, status, best and every front. A trial has collapsed when
    all its SAEs have; with several seeds an SAE has as soon as one seed of it has."""

    min_l0: Factor = 0.5
    """Collapsed below this L0."""
    max_fvu: Annotated[Float, Field(gt=0, le=1e9)] = 1.0
    """Collapsed at or above this fraction of variance unexplained."""
    patience: Positive = 2
    """Number of reports in a row that must agree before the trial is stopped."""
    constraint: bool = True
    """Tell the sampler that collapsed trials are infeasible.
    They are pruned trials in any case: no front holds them."""


class EarlyStopping(StrictModel):
    """When a trial is given up, or paused. One objective: `median`, `asha`, `hyperband`; several: `pareto`; either:
    `halving`. Each compares a trial with all others that have come as far, those of its own pack included."""

    type: Literal["none", "median", "asha", "hyperband", "pareto", "halving"] = "none"
    """`median`: worse at its best than the median of the others. `asha`: not in the best 1 / `reduction_factor` at a
    rung (at the end of the warm-up, and `reduction_factor` times later each). `hyperband`: the same, some trials skip
    the first rungs. `pareto`: another is better in every objective by `margin`; whom no other beats goes on. `halving`:
    at each rung whoever nobody dominates goes on, and of the others the best; the rest are paused, keep their
    checkpoints and may be promoted."""
    warmup: Annotated[Float, Field(ge=0, lt=1)] = 0.2
    """Share of a trial's samples before which nothing is stopped (the learning rate's warm-up is added); `halving` has
    `rungs` instead."""
    n_startup_trials: Count = 5
    """Other trials that must have come as far before a trial is compared with them (median, pareto)."""
    reduction_factor: Annotated[Int, Field(ge=2)] = 3
    """asha and hyperband: at every rung one trial of this number goes on. halving: see `min_share`."""
    rungs: Annotated[list[Share], Field(min_length=1, max_length=20)] | None = None
    """halving: where all are compared, as shares of a trial's samples; null: [0.1, 0.3] (docs/which-search.md), or with
    `min_share` its multiples by `reduction_factor`."""
    min_share: Share | None = None
    """halving: the first rung; the others are `reduction_factor` times later each. Instead of `rungs`."""
    keep: Annotated[Float, Field(gt=0, le=1)] = 0.33
    """halving: at least this share of all that came to a rung goes on."""
    rung_eval_samples: Positive | None = None
    """halving: held-out samples that are evaluated at a rung where training does not measure an objective; null: 64."""
    keep_paused: bool = True
    """halving: what is still paused at the study's end keeps its checkpoint, and may be promoted later."""
    margin: Factor = 0.1
    """pareto: relative distance by which a trial must be worse in every objective. Of what is 1 at best (explained
    variance, cosine, CE recovered, living latents) the distance of what is missing to 1."""
    collapse: Collapse | None = Field(default_factory=Collapse)
    """null: collapsed trials train to the end (what counts as collapsed then is the default)."""

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        if self.type != "halving":  # older versions know no such fields, and go on reading what does not need them
            for name in _HALVING:
                dumped.pop(name, None)
        return dumped

    @model_validator(mode="after")
    def _rungs_once(self) -> Self:
        if self.type != "halving":
            if given := sorted(self.model_fields_set & _HALVING):
                raise ValueError(f"'{given[0]}' belongs to 'type: halving' (this is '{self.type}')")
        elif unread := next((n for n in _NOT_HALVING if getattr(self, n) != type(self).model_fields[n].default), None):
            raise ValueError(f"'{unread}' does not belong to 'type: halving', which has '{_NOT_HALVING[unread]}'")
        elif self.min_share is None and self.reduction_factor != type(self).model_fields["reduction_factor"].default:
            raise ValueError("'reduction_factor' needs 'min_share' under 'type: halving'")
        elif self.rungs is not None and self.min_share is not None:
            raise ValueError("give 'rungs' or 'min_share', not both")
        elif self.rungs is not None and sorted(set(self.rungs)) != self.rungs:
            raise ValueError("'rungs' must rise, as in [0.1, 0.3]")
        elif self.min_share is None and self.rungs is None:
            self.__dict__["rungs"] = list(RUNGS)  # stored with the study, which another default must not change
        return self

    @property
    def rung_samples(self) -> int:
        """Held-out samples of a rung: a comparison needs fewer than a result."""
        return self.rung_eval_samples or 64

    @property
    def shares(self) -> list[float]:
        """The rungs of `halving`."""
        if self.min_share is None:
            return list(self.rungs or RUNGS)
        found = [self.min_share]
        while found[-1] * self.reduction_factor < 1:
            found.append(found[-1] * self.reduction_factor)
        return found

    @model_validator(mode="before")
    @classmethod
    def _type_alone(cls, value: object) -> object:
        return {"type": value} if isinstance(value, str) else value
