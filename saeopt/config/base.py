"""The strict base of every config model, and how its errors read."""

from __future__ import annotations

import difflib
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from saeopt.errors import UserError


class StrictModel(BaseModel):
    """Frozen; unknown keys are errors; fields carry descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, protected_namespaces=()
    )


def _whole(value: object) -> object:
    """YAML reads `1e5` as a string and `1e+5` as a float; both mean a whole number of samples."""
    if isinstance(value, bool):
        raise ValueError("a whole number, not true or false")
    if isinstance(value, str):
        try:
            value = float(value.replace("_", ""))
        except ValueError:
            return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number, not true or false")
    return value.replace("_", "") if isinstance(value, str) else value


Int = Annotated[int, BeforeValidator(_whole)]
Float = Annotated[float, BeforeValidator(_number)]


def nearest(word: str, known: list[str], n: int = 3) -> str:
    """`; did you mean 'a' or 'b'?`, or an empty string when nothing is near."""
    near = difflib.get_close_matches(word, known, n=n, cutoff=0.5)
    return "; did you mean " + " or ".join(repr(k) for k in near) + "?" if near else ""


def explain(error: ValidationError, source: str, known: dict[tuple[str, ...], list[str]]) -> UserError:
    """The first problem of a validation as one line; `known` maps a section to the names it accepts."""
    first = error.errors(include_url=False)[0]
    location = tuple(str(part) for part in first["loc"] if not str(part).startswith("function-"))
    field = ".".join(location) or "the file"
    if first["type"] == "extra_forbidden":
        names = known.get(location[:-1], [])
        return UserError(f"{source}: unknown key '{field}'{nearest(location[-1], names)}")
    if first["type"] == "missing":
        return UserError(f"{source}: '{field}' is missing")
    message = first["msg"].removeprefix("Value error, ")
    value: Any = first.get("input")
    shown = "" if isinstance(value, dict | list) or len(str(value)) > 80 else f" (got {value!r})"
    if first["type"] == "value_error" and not location:
        return UserError(f"{source}: {message}")
    return UserError(f"{source}: '{field}': {message[:1].lower() + message[1:]}{shown}")
