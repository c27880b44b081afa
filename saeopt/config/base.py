"""The strict base of every config model, and how its errors read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from saeopt.errors import UserError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class StrictModel(BaseModel):
    """Frozen; unknown keys are errors; fields carry descriptions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, protected_namespaces=()
    )


def _whole(value: object) -> object:
    """YAML reads `1e5` as a string and `1e+5` as a float; both mean a whole number of samples."""
    if isinstance(value, bool):
        raise ValueError("must be a whole number, not true or false")
    if isinstance(value, str):
        try:
            return int(value.replace("_", "")) if len(value) < 40 else value
        except ValueError:
            pass
        try:
            value = float(value.replace("_", ""))
        except ValueError:
            return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def word(value: object, true: str | None, false: str) -> object:
    """YAML reads on, yes, off and no as booleans where a word is meant (`true` None: no word)."""
    if value is False:
        return false
    return true if value is True and true is not None else value


def _number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value.replace("_", "") if isinstance(value, str) else value


Int = Annotated[int, BeforeValidator(_whole)]
Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
MOST = 10**15
"""Samples, tokens: beyond it something else is meant."""


def printable(text: str) -> str:
    """Control characters and halves of characters are in no name, path or hook point."""
    if any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in text):
        raise ValueError("must not hold control characters")
    return text


Text = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(printable)]
Amount = Annotated[Int, Field(gt=0, le=MOST)]
"""Samples or tokens."""
Span = Annotated[Int, Field(ge=0, le=MOST)]
"""Samples or tokens, or none."""
BatchSize = Annotated[Int, Field(gt=0, le=2**20)]
Seed = Annotated[Int, Field(ge=0, lt=2**63)]
Weight = Annotated[Float, Field(ge=0, le=1e12)]
"""Of a loss term; what is larger overflows float32."""


def nearest(word: str, known: list[str], n: int = 3) -> str:
    """`; did you mean 'a' or 'b'?`, or an empty string when nothing is near."""
    near = difflib.get_close_matches(word, known, n=n, cutoff=0.5)
    return "; did you mean " + " or ".join(repr(k) for k in near) + "?" if near else ""


def explain(
    error: ValidationError,
    source: str,
    known: dict[tuple[str, ...], list[str]],
    sae_type: str = "",
    changes: Iterable[str] = (),
) -> UserError:
    """The first problem of a validation as one line (`more` has the others); `known` maps a section to the names it
    accepts.

    `changes` are the `key=value` of the command line: the one at fault is named instead of the file.
    """
    # a misspelt key that is required is told as a misspelling, not as missing
    problems = sorted(error.errors(include_url=False), key=lambda p: p["type"] != "extra_forbidden")
    told: dict[tuple[str, ...], str] = {}  # a value that fits none of several kinds is one mistake
    for problem in problems:
        if problem["type"] == "default_factory_not_called" and len(problems) > 1:
            continue  # because of another
        location = tuple(str(part) for part in problem["loc"] if not str(part).startswith("function-"))
        about = next((f"--set {c[:200]}" for c in changes if _is_about(c, location, problem["msg"])), source)
        told.setdefault(location[:2], f"{about}: {_explained(problem, location, known, sae_type)}")
    first, *others = told.values()
    return UserError(first, others)


def _explained(
    problem: ErrorDetails, location: tuple[str, ...], known: dict[tuple[str, ...], list[str]], sae_type: str
) -> str:
    from saeopt.config.names import suggestion

    field = ".".join(location) or "the file"
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{field}'{suggestion(location, known, sae_type)}"
    if problem["type"] == "missing":
        return f"'{field}' is missing"
    if problem["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return f"'{field}' must be a section of 'key: value' pairs"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    message = re.sub(r"^\w+ should have (.+) after validation, not", r"must have \1, not", message)
    if problem["type"] == "string_pattern_mismatch":  # the one pattern is that of names
        message = "must begin with a letter or digit and hold no others but '.', '_' and '-'"
    if problem["type"] == "value_error" and not location:
        return message
    return f"'{field}': {message[:1].lower() + message[1:]}{got(problem.get('input'))}"


def _is_about(change: str, location: tuple[str, ...], message: str) -> bool:
    """Whether a `key=value` set what an error is about: the field itself, or one that the message names."""
    field, _, hook = change.partition("=")[0].strip().partition("@")
    path = tuple(field.split("."))
    if hook:
        path = ("saes", "per_hook", hook, path[-1])
        if f"per_hook.{hook}.{path[-1]}" in message:
            return True
    return location[: len(path)] == path or (location == path[: len(location)] and f"'{path[-1]}" in message)


def got(value: object) -> str:
    """What stood in the file, where it is short."""
    try:
        return "" if isinstance(value, dict | list) or len(str(value)) > 80 else f" (got {value!r})"
    except (ValueError, RecursionError):  # a number of thousands of digits, a list in itself
        return ""
