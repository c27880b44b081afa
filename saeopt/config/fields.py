"""The type of any config field, so that a value of a search space passes through it before anything else."""

from __future__ import annotations

import json
from functools import cache
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from saeopt.config.base import got
from saeopt.config.names import field_suggestion
from saeopt.config.run import DataConfig, RunConfig
from saeopt.config.saes import SAEConfig
from saeopt.errors import UserError


def _sections(sae_type: str) -> dict[str, type[RunConfig] | type[DataConfig] | type[SAEConfig]]:
    from saeopt.saes.registry import sae_config_class

    return {"": RunConfig, "data": DataConfig, "saes": sae_config_class(sae_type)}


@cache
def field_names(sae_type: str) -> list[str]:
    """Every dotted field of a run config with this architecture (`lr`, `data.seed`, `saes.sparsity_coeff`, …)."""
    names = []
    for section, model in _sections(sae_type).items():
        prefix = section + "." if section else ""
        names += [prefix + name for name in model.model_fields if prefix + name not in ("data", "saes")]
    return names


def has_field(field: str, sae_type: str) -> bool:
    """Whether a run config with this architecture has the dotted field."""
    return field in field_names(sae_type)


@cache
def _adapter(field: str, sae_type: str) -> TypeAdapter[Any]:
    section, _, name = field.rpartition(".")
    info: FieldInfo = _sections(sae_type)[section].model_fields[name]
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
    if field in ("saes.sae_positions", "saes.pretrained_sae_paths") and isinstance(value, str):
        value = [value]
    adapter = _adapter(field, sae_type)
    try:
        return json.loads(adapter.dump_json(adapter.validate_python(value)))
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"{source}: '{field}': {message[:1].lower() + message[1:]}{got(value)}") from None
