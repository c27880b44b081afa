"""Study files: read, checked and normalised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from saeopt.config.base import explain
from saeopt.config.io import read_run_yaml, read_yaml, stored
from saeopt.config.normalise import normalised
from saeopt.config.places import expanded
from saeopt.config.run import NEWEST_RECIPE
from saeopt.config.study import StudySpec, known_names
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
    try:
        spec = StudySpec.model_validate(raw)
    except ValidationError as error:
        raise explain(error, str(source), known_names()) from None
    found = normalised(spec, str(source))
    if "recipe" not in spec.base and found.base["recipe"] == NEWEST_RECIPE:
        older = ({"recipe": 2, **spec.base}, stored(spec.base))
        found.set_older(*(normalised(spec.model_copy(update={"base": base}), str(source)) for base in older))
    return found


def load_study_spec(path: str | Path) -> StudySpec:
    """A native study file. `name` defaults to the file's name."""
    raw = read_yaml(path)
    raw.setdefault("name", Path(path).stem)
    return study_spec(raw, path)
