"""One walk over the sections of a run config, and what follows from the marks on its fields.

Overrides, search spaces, the reference page, packs, resuming and paths all look here. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from saeopt.config.marks import Mark, Role, fields_with, role
from saeopt.config.run import RunConfig
from saeopt.config.saes import SAEConfig


class Place(NamedTuple):
    """A field and where it stands: `data` and `seed` for `data.seed`."""

    section: str
    name: str
    info: FieldInfo

    @property
    def path(self) -> str:
        """Its dotted name."""
        return f"{self.section}.{self.name}" if self.section else self.name


@cache
def sections(saes: type[SAEConfig] = SAEConfig) -> dict[str, type[BaseModel]]:
    """Section → its model, the run itself first (as ``); `saes` is that of an architecture."""
    found: dict[str, type[BaseModel]] = {"": RunConfig}
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found[name] = saes if name == "saes" else field.annotation
    return found


def walk(saes: type[SAEConfig] = SAEConfig) -> Iterator[Place]:
    """Every field of a run config, section by section."""
    found = sections(saes)
    for section, model in found.items():
        for name, info in model.model_fields.items():
            if section or name not in found:
                yield Place(section, name, info)


@cache
def places(saes: type[SAEConfig] = SAEConfig) -> dict[str, Place]:
    """Dotted name → field."""
    return {place.path: place for place in walk(saes)}


def _beside_the_stream() -> frozenset[str]:
    fixes = {section: {role(f).fixes for f in model.model_fields.values()} for section, model in sections().items()}
    return frozenset(
        name for name, info in RunConfig.model_fields.items() if "stream" not in fixes.get(name, {role(info).fixes})
    )


MEMBER_FIELDS = _beside_the_stream()
"""Fields and sections in which the trials of one pack may differ; all others fix the stream or are pack-wide."""
REPORTING = fields_with(RunConfig, Role("member", result=False))
"""Names, folders and services of a run."""
MAY_DIFFER = REPORTING | fields_with(RunConfig, Mark.RESUMABLE)
"""What a resumed run may change."""
MADE = tuple(place.path for place in walk() if Mark.MADE in place.info.metadata)
"""Folders that the system makes, from where a process works."""
PATHS = tuple(place.path for place in walk() if Mark.LOCATED in place.info.metadata) + MADE
DATA_AND_MODEL = tuple(path for path in PATHS if role(places()[path].info) == Role("stream"))
"""Where data and language model lie. A resumed run may find them elsewhere if they are the same ones."""
