"""What of a run's config is a matter of the machine: the cache of activations, and how the step is computed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from saeopt.config.base import Float, StrictModel, Text, word
from saeopt.config.marks import Made, PackWide, Stack


class ActivationsConfig(StrictModel):
    """The `activations:` section: a cache on disk, so that several runs harvest the same activations once."""

    cache: PackWide[Made[Text]] = "auto"
    """A folder; `off`; or `auto`: the workers of a study share one, single runs have none."""
    cache_max_gb: PackWide[Annotated[Float, Field(gt=0, le=1e9)]] = 50.0
    """Largest size of one stream's cache; what does not fit is harvested each time (never more than half of what is
    free on the disk)."""
    dtype: PackWide[Literal["auto", "bfloat16", "float32", "float16"]] = "auto"
    """Stored precision; auto: the language model's, which changes no result."""

    @field_validator("cache", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return word(value, None, "off")


class PerformanceConfig(StrictModel):
    """The `performance:` section. The defaults are right; results do not depend on it beyond rounding."""

    stack: Stack[Literal["auto", "fused", "reference"]] = "auto"
    """fused: hand-written step over all members at once; reference: autograd; auto: fused where there is one."""
    compile: Stack[Literal["auto", "on", "off"]] = "auto"
    """Fuse elementwise stages with torch.compile; auto: on a GPU."""
    graphs: Stack[Literal["auto", "on", "off"]] = "auto"
    """Replay the step as a CUDA graph; auto: on a GPU."""

    @field_validator("compile", "graphs", mode="before")
    @classmethod
    def _on_or_off(cls, value: object) -> object:
        return word(value, "on", "off")
