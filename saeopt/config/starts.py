"""What a sampled study begins with: points that are given, or the best trials of another study."""

from __future__ import annotations

from typing import Annotated, Any, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, Field, model_validator

from saeopt.config.base import Int, StrictModel, printable


class Weights(StrictModel):
    """A weights file that a trial starts from."""

    file: str
    """Its absolute path."""
    sha256: str
    """Of its bytes, when the study was made."""


class Found(StrictModel):
    """A trial of the other study, as it is tried here."""

    trial: int
    """Its number there."""
    params: dict[str, Any]
    """Parameters as the new study stores them."""
    weights: Weights | None = None
    """What it starts from; null: from new weights."""


class StartFrom(StrictModel):
    """The best trials of another study, whose parameters are tried first. What is in both spaces is taken as it is;
    where this study varies `saes.target_l0`, the L0 that was reached. What lies outside this space is left out, and
    said."""

    study: Annotated[str, Field(min_length=1, max_length=100), AfterValidator(printable)]
    """The other study's name."""
    storage: Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(printable)] | None = None
    """The store that it lies in, without a password; null: the one in which this study is made."""
    top: Annotated[Int, Field(gt=0, le=10**5)] | None = None
    """So many trials, the best by the other study's objectives (of several: front by front, spread over each)."""
    front: bool = False
    """All trials on its fronts of L0 and FVU, one front for each hook point, as `study best` shows them."""
    from_weights: bool = False
    """Also start from their weights, where architecture, hook points and shapes are the same; `create` says where they
    are not, and those trials start from new ones. The files must stay where they are until the trials have begun."""
    found: list[Found] | None = None
    """Written by `create`, so that a worker needs only this study: the trials as they are tried here."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.storage is not None and _holds_password(self.storage):  # of the whole section: no value is shown then
            raise ValueError(
                "'storage' must hold no password: whoever reads the study would read it (PGPASSWORD or ~/.pgpass"
                " hold it)"
            )
        if self.front == (self.top is not None):
            raise ValueError("needs one of 'top: N' and 'front: true'")
        return self


def _holds_password(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.password is not None or any("password" in key.lower() for key, _ in parse_qsl(parts.query))
    except ValueError:
        return "@" in url
