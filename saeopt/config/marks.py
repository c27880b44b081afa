"""What a config field fixes, said on the field itself: `lr: Member[Float] = 1e-3`.

Everything that has to know it (which trials share a pack or a stack, what a study may vary, what a resumed run may
change, which fields hold paths) is derived from these marks: `saeopt.config.roles`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel
from pydantic.fields import FieldInfo

T = TypeVar("T")


@dataclass(frozen=True)
class Role:
    """What a field fixes, and whether it can change a result beyond rounding."""

    fixes: Literal["stream", "shape", "stack", "member"]
    result: bool = True


class Mark(Enum):
    """What else is to be known of a field."""

    RESUMABLE = "a resumed run may change it"
    LOCATED = "a path that may have been typed relative to a folder"
    MADE = "a folder that the system makes"
    WHOLE_RUN = "the same at all hook points"


@dataclass(frozen=True)
class Slow:
    """Cells of a grid that agree in the field follow each other; the lower the rank, the longer."""

    rank: int


Stream = Annotated[T, Role("stream")]
"""Decides what the members of a pack see: trials of one pack are equal in it."""
PackWide = Annotated[T, Role("stream", result=False)]
"""Changes no result, and a pack has one: how often something is done, sizes that suit the device."""
Shape = Annotated[T, Role("shape")]
"""Decides which tensors a member has."""
Stack = Annotated[T, Role("stack")]
"""Decides how a member is computed: members of one stack are equal in it."""
Member = Annotated[T, Role("member")]
"""Each member of a stack has its own."""
Reporting = Annotated[T, Role("member", result=False)]
"""Names, folders and services; changes no result."""
Resumable = Annotated[T, Mark.RESUMABLE]
Located = Annotated[T, Mark.LOCATED]
Made = Annotated[T, Mark.MADE]
WholeRun = Annotated[T, Mark.WHOLE_RUN]


def role(field: FieldInfo) -> Role:
    """The field's role; a field of somebody's own architecture that names none is equal within a stack."""
    return next((mark for mark in field.metadata if isinstance(mark, Role)), Role("stack"))


def fields_with(model: type[BaseModel], what: Role | Mark | str) -> frozenset[str]:
    """The fields of a model that have a mark, a role, or fix what is named."""
    return frozenset(
        name
        for name, field in model.model_fields.items()
        if what in field.metadata or (isinstance(what, str) and role(field).fixes == what)
    )
