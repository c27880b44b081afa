"""Study files: read, checked and normalised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from saeopt.config.base import explain
from saeopt.config.io import read_run_yaml, read_yaml, stored
from saeopt.config.normalise import normalised
from saeopt.config.places import expanded
from saeopt.config.run import NEWEST_RECIPE
from saeopt.config.study import AUTO, TARGET, StudySpec, known_names
from saeopt.errors import UserError


def study_spec(raw: dict[str, Any], source: str | Path) -> StudySpec:
    """A spec whose base and space are checked and normalised; :class:`UserError` names `source` and the field."""
    base = raw.get("base")
    if isinstance(base, str):
        try:
            near = Path(source).parent / expanded(base)
        except UserError as error:
            raise UserError(f"{source}: 'base': {error}") from None
        raw = {**raw, "base": read_run_yaml(near if near.exists() else base)}
    fixed, asked = without_auto(raw.get("base"))
    if asked:
        space = raw.get("space") or {}
        raw = {**raw, "base": fixed, "space": {TARGET: AUTO, **space} if isinstance(space, dict) else space}
    if "base" in raw:
        raw = {**raw, "base": with_open_k(raw["base"], raw.get("space"))}
    try:
        spec = StudySpec.model_validate(raw)
    except ValidationError as error:
        raise explain(error, str(source), known_names()) from None
    found = normalised(spec, str(source))
    if "recipe" not in spec.base and found.base["recipe"] == NEWEST_RECIPE:
        found.set_older(*_older(spec, str(source)))
    return found


def _older(spec: StudySpec, source: str) -> Iterator[StudySpec]:
    """The study as it was made under older recipes, where these allow it."""
    for base in ({"recipe": 2, **spec.base}, stored(spec.base)):
        with suppress(UserError):
            yield normalised(spec.model_copy(update={"base": base}), source)


def without_auto(base: object) -> tuple[Any, bool]:
    """A base config without its `saes.target_l0: auto`, which is a matter of the space; whether it had one."""
    saes = base.get("saes") if isinstance(base, dict) else None
    if not isinstance(base, dict) or not isinstance(saes, dict) or saes.get("target_l0") != AUTO:
        return base, False
    return {**base, "saes": {key: value for key, value in saes.items() if key != "target_l0"}}, True


def with_open_k(base: object, space: object) -> Any:
    """A base config without its `k: null`, where the space's `saes.target_l0` sets k."""
    saes = base.get("saes") if isinstance(base, dict) else None
    if not isinstance(base, dict) or not isinstance(saes, dict) or not isinstance(space, dict) or TARGET not in space:
        return base
    return {**base, "saes": {key: value for key, value in saes.items() if key != "k" or value is not None}}


def load_study_spec(path: str | Path) -> StudySpec:
    """A native study file. `name` defaults to the file's name."""
    raw = read_yaml(path)
    raw.setdefault("name", Path(path).stem)
    return study_spec(raw, path)
