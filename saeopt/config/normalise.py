"""Every value of a study through the type of its field, so that equal studies have equal texts."""

from __future__ import annotations

import json
import os
from typing import Any

from saeopt.config.base import nearest
from saeopt.config.fields import field_names, field_value, has_field
from saeopt.config.io import validate_run
from saeopt.config.names import field_suggestion
from saeopt.config.places import expanded
from saeopt.config.study import AUTO, TARGET, Dimension, StudySpec
from saeopt.errors import UserError
from saeopt.metrics import METRICS

FEWEST = 3
"""Values of `saes.target_l0` from which its curve can be read."""
_SAE_TYPE = "saes.sae_type"


def normalised(spec: StudySpec, source: str) -> StudySpec:
    """The spec with a complete base config and a space of typed, distinct values."""
    if not spec.base_sae_type:
        raise UserError(f"{source}: 'base': 'saes.sae_type' is missing")
    sae_types = _sae_types(spec, source)
    space = {}
    for name, alternatives in spec.space.items():
        space[name] = [_dimension(spec, name, d, sae_types, source) for d in alternatives]
    points = [_point(spec, point, f"{source}: 'enqueue.{i}'") for i, point in enumerate(spec.enqueue)]
    base = validate_run(spec.base, f"{source}: base").model_dump(mode="json")
    folder = spec.output_dir or base["save_dir"]
    varied = {name.partition("@")[0] for name in space}
    _check_seeds(spec, base["seeds"], varied, source)
    if "saes.target_l0" in varied and "k" not in spec.base["saes"]:
        base["saes"].pop("k", None)  # nobody chose it: the target sets it
    if _SAE_TYPE in varied:
        for field in _defaults_that_differ(sae_types) - spec.base["saes"].keys():
            base["saes"].pop(field, None)  # nobody chose it: each architecture has its own
    base["as_typed"] = {**base["as_typed"], os.path.abspath(_expanded(folder, source)): folder}
    return spec.model_copy(update={"base": base, "space": space, "enqueue": points})


def _point(spec: StudySpec, point: dict[str, Any], where: str) -> dict[str, Any]:
    """A point of `enqueue` with typed values."""
    typed = {}
    for name, value in point.items():
        if name not in spec.space:
            raise UserError(f"{where}: '{name}' is not in 'space'{nearest(name, list(spec.space))}")
        field = name.partition("@")[0]
        owner = next((t for t in spec.sae_types if has_field(field, t)), spec.base_sae_type)
        typed[name] = field_value(field, value, owner, where)
    return typed


def _check_seeds(spec: StudySpec, seeds: int, varied: set[str], source: str) -> None:
    if "seeds" in varied:
        raise UserError(f"{source}: 'space.seeds': the number of seeds is the same for all trials: 'seeds: N'")
    if seeds > 1 and "seed" in varied:
        raise UserError(
            f"{source}: 'space.seed' beside 'seeds: {seeds}': a trial trains the seeds that follow its own, so that"
            " some would be trained twice; leave one of them out"
        )
    if seeds > 1 and spec.start_from is not None and spec.start_from.from_weights:
        raise UserError(
            f"{source}: 'start_from.from_weights' beside 'seeds: {seeds}': all would start from the same weights"
        )
    wanting = [o.metric for o in spec.objectives if METRICS[o.metric].seeds]
    if wanting and seeds == 1:
        raise UserError(f"{source}: objectives: '{wanting[0]}' is measured between seeds: it needs 'seeds: 2' or more")


def _defaults_that_differ(sae_types: list[str]) -> set[str]:
    """Fields of `saes` that several of the architectures have, each with a default of its own."""
    from saeopt.saes.registry import sae_config_class

    seen: dict[str, object] = {}
    differing = {"sae_type"}
    for sae_type in sae_types:
        for name, field in sae_config_class(sae_type).model_fields.items():
            default = field.get_default(call_default_factory=True, validated_data={})
            if seen.setdefault(name, default) != default:
                differing.add(name)
    return differing - {"sae_type"}


def _expanded(folder: str, source: str) -> str:
    try:
        return expanded(folder)
    except UserError as error:
        raise UserError(f"{source}: 'output_dir': {error}") from None


def _sae_types(spec: StudySpec, source: str) -> list[str]:
    """The architectures that the space visits."""
    if any(d.values is None or d.when for d in spec.space.get(_SAE_TYPE, [])):
        raise UserError(f"{source}: 'space.{_SAE_TYPE}': must be a plain list of names")
    return spec.sae_types


def _dimension(spec: StudySpec, name: str, dimension: Dimension, sae_types: list[str], source: str) -> Dimension:
    where = f"{source}: space"
    field, at, hook = name.partition("@")
    if at and (not field.startswith("saes.") or not hook):
        raise UserError(f"{where}: '{name}': only fields of 'saes' can differ per hook point")
    if (dimension.refine or AUTO in (dimension.values or [])) and field == TARGET and at:
        raise UserError(
            f"{where}: '{name}': 'auto' holds for all hook points of a trial, and each gets an L0 of its own from it:"
            f" name the field without '@{hook}'"
        )
    when = _conditions(spec, name, dimension, where)
    visited = [t for t in sae_types if t in when.get(_SAE_TYPE, sae_types)]
    if not visited:
        raise UserError(f"{where}: '{name}': 'when' never holds (sae_type is one of {', '.join(sae_types)})")
    if not any(has_field(field, t) for t in visited):
        raise UserError(
            f"{where}: unknown config field '{field}'{field_suggestion(field, field_names(visited[0]), visited[0])}"
        )
    missing = [t for t in visited if not has_field(field, t)]
    if missing:
        raise UserError(
            f"{where}: '{name}': sae_type {', '.join(missing)} has no such field;"
            f" add 'when: {{sae_type: {[t for t in visited if t not in missing]}}}'"
        )
    if dimension.values is None:
        for sae_type in visited:
            _check_range(field, dimension, sae_type, where)
        return dimension.model_copy(update={"when": when})
    if field == TARGET and (dimension.refine or AUTO in dimension.values):
        values = _first_targets(dimension.values, f"{where}: '{name}'", visited[0])
        return dimension.model_copy(update={"when": when, "values": values, "refine": True})
    if dimension.refine:
        raise UserError(f"{where}: '{name}': 'refine' is for '{TARGET}' alone")
    values = [field_value(field, v, visited[0], where) for v in dimension.values]
    return dimension.model_copy(update={"when": when, "values": distinct(values)})


def _first_targets(values: list[Any], where: str, sae_type: str) -> list[Any]:
    """L0s that are refined; `auto` stays until the model's width is known."""
    if AUTO in values:
        if len(values) > 1:
            raise UserError(f"{where}: 'auto' stands alone, in place of the list")
        return [AUTO]
    typed = distinct([field_value(TARGET, v, sae_type, where) for v in values])
    if any(v is None or not float(v).is_integer() for v in typed):
        raise UserError(f"{where}: 'refine: true' needs whole numbers")
    if len(typed) < FEWEST:
        raise UserError(f"{where}: 'refine: true' needs {FEWEST} values or more: fewer show no curve")
    return [int(v) for v in typed]


def _conditions(spec: StudySpec, name: str, dimension: Dimension, where: str) -> dict[str, list[Any]]:
    """The `when` of a dimension with typed values; every parent must be an unconditional list of the space."""
    result = {}
    for parent, accepted in dimension.when.items():
        field = parent.partition("@")[0]
        owner = next((t for t in spec.sae_types if has_field(field, t)), spec.base_sae_type)
        values = [field_value(field, v, owner, where) for v in accepted]
        alternatives = spec.space.get(parent)
        if alternatives is None and parent != _SAE_TYPE:
            raise UserError(f"{where}: '{name}': 'when' names '{parent}', which is not in the space")
        if alternatives is not None and (len(alternatives) > 1 or alternatives[0].values is None):
            raise UserError(f"{where}: '{name}': 'when' can only depend on a plain list, and '{parent}' is none")
        if alternatives and parent == TARGET and (alternatives[0].refine or AUTO in (alternatives[0].values or [])):
            raise UserError(f"{where}: '{name}': 'when' cannot depend on '{parent}', of which more values will come")
        if parent == name or (alternatives and alternatives[0].when):
            raise UserError(f"{where}: '{name}': 'when' cannot depend on '{parent}', which is conditional itself")
        result[parent] = distinct(values)
    return result


def _check_range(field: str, dimension: Dimension, sae_type: str, where: str) -> None:
    for end in (dimension.low, dimension.high):
        typed = field_value(field, end, sae_type, where)
        if isinstance(typed, bool) or not isinstance(typed, int | float):
            raise UserError(f"{where}: '{field}': a range needs a field that holds a number")
        if isinstance(typed, int) and not dimension.integer:
            raise UserError(f"{where}: '{field}': whole numbers only: add 'int: true' to the range")
    steps = (dimension.low or 0.0, dimension.step or 0.5)
    if field == TARGET and not dimension.integer and not all(map(float.is_integer, steps)) and _is_whole_k(sae_type):
        raise UserError(f"{where}: '{field}': is k for {sae_type}, whole numbers only: add 'int: true' to the range")


def _is_whole_k(sae_type: str) -> bool:
    """Whether `target_l0` is k, and k a whole number."""
    from saeopt.saes.registry import sae_config_class

    found = sae_config_class(sae_type)
    return found.selects_k() and found.model_fields["k"].annotation is int


def distinct(values: list[Any]) -> list[Any]:
    """The values without repetitions, in order (true and 1 are different)."""
    return list({json.dumps(v, sort_keys=True): v for v in values}.values())
