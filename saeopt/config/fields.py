"""The type of any config field, so that a value of a search space passes through it before anything else."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from saeopt.config.base import got
from saeopt.config.marks import Slow, role
from saeopt.config.names import field_suggestion
from saeopt.config.roles import MEMBER_FIELDS, Place, places
from saeopt.config.sites import as_list
from saeopt.errors import UserError


def _places(sae_type: str) -> dict[str, Place]:
    from saeopt.saes.registry import sae_config_class

    return places(sae_config_class(sae_type))


def field_names(sae_type: str) -> list[str]:
    """Every dotted field of a run config with this architecture (`lr`, `data.seed`, `saes.sparsity_coeff`, …)."""
    return list(_places(sae_type))


def has_field(field: str, sae_type: str) -> bool:
    """Whether a run config with this architecture has the dotted field."""
    return field in _places(sae_type)


def changes_results(field: str, sae_types: Iterable[str]) -> bool:
    """Whether a study may vary a field: over one that changes no result it would train the same run again and again."""
    found = (_places(sae_type).get(field) for sae_type in sae_types)
    return all(role(place.info).result for place in found if place is not None)


def slowness(field: str, sae_types: Iterable[str]) -> tuple[int, int]:
    """Where a parameter stands in the order of a grid: what fixes the stream first, then shapes, then the rest."""
    if field.partition(".")[0] not in MEMBER_FIELDS:
        return (0, 0)
    known = places()
    if field not in known:  # a field that only some architecture has
        for sae_type in sae_types:
            with suppress(UserError):  # what this host cannot import has a place all the same
                known = known | _places(sae_type)
    marks = known[field].info.metadata if field in known else ()
    rank = next((mark.rank for mark in marks if isinstance(mark, Slow)), 0)
    return (1, rank) if rank else (2, 0)


@cache
def _adapter(field: str, sae_type: str) -> TypeAdapter[Any]:
    info = _places(sae_type)[field].info
    kind: Any = info.annotation
    for constraint in info.metadata:
        kind = Annotated[kind, constraint]
    return TypeAdapter(kind)


def field_value(field: str, value: object, sae_type: str, source: str) -> Any:
    """`value` as the field's own type, in JSON's terms: "1e-3" and 0.001 become one."""
    if not has_field(field, sae_type):
        raise UserError(
            f"{source}: unknown config field '{field}'{field_suggestion(field, field_names(sae_type), sae_type)}"
        )
    if field in ("saes.sae_positions", "saes.pretrained_sae_paths"):
        value = as_list(value)
    adapter = _adapter(field, sae_type)
    try:
        return json.loads(adapter.dump_json(adapter.validate_python(value)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "list_type" and not first["loc"]:
            message = "each value is a list itself, as in [[a, b], [c, d]]"
        raise UserError(f"{source}: '{field}': {message[:1].lower() + message[1:]}{got(value)}") from None
