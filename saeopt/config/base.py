"""The strict base of every config model, and how its errors read."""

from __future__ import annotations

import difflib
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from saeopt.errors import UserError


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


def _printable(text: str) -> str:
    """Control characters and halves of characters are in no name, path or hook point."""
    if any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in text):
        raise ValueError("must not hold control characters")
    return text


Text = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_printable)]
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


_OTHER_NAMES = {
    "learning_rate": "lr",
    "batch_size": "data.train_batch_size",
    "dataset": "data.dataset_name",
    "model": "tlens_model_name",
    "model_name": "tlens_model_name",
    "output_dir": "save_dir",
    "l1_coeff": "saes.sparsity_coeff",
    "hook_point": "saes.sae_positions",
    "hook_points": "saes.sae_positions",
    "expansion_factor": "saes.dict_size_to_input_ratio",
    "betas": "adam_betas",
    "grad_clip": "max_grad_norm",
}
"""What people bring from other libraries."""


def explain(
    error: ValidationError, source: str, known: dict[tuple[str, ...], list[str]], sae_type: str = ""
) -> UserError:
    """The first problem of a validation as one line; `known` maps a section to the names it accepts."""
    problems = error.errors(include_url=False)
    # a misspelt key that is required is told as a misspelling, not as missing
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    location = tuple(str(part) for part in first["loc"] if not str(part).startswith("function-"))
    field = ".".join(location) or "the file"
    if first["type"] == "extra_forbidden":
        return UserError(f"{source}: unknown key '{field}'{_suggestion(location, known, sae_type)}")
    if first["type"] == "missing":
        return UserError(f"{source}: '{field}' is missing")
    if first["type"] in ("model_type", "dict_type", "model_attributes_type"):
        return UserError(f"{source}: '{field}' must be a section of 'key: value' pairs")
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    shown = got(first.get("input"))
    if first["type"] == "value_error" and not location:
        return UserError(f"{source}: {message}")
    return UserError(f"{source}: '{field}': {message[:1].lower() + message[1:]}{shown}")


def got(value: object) -> str:
    """What stood in the file, where it is short."""
    try:
        return "" if isinstance(value, dict | list) or len(str(value)) > 80 else f" (got {value!r})"
    except (ValueError, RecursionError):  # a number of thousands of digits, a list in itself
        return ""


def _suggestion(location: tuple[str, ...], known: dict[tuple[str, ...], list[str]], sae_type: str) -> str:
    """Where the name would be right, or what it resembles."""
    section, name = location[:-1], location[-1]
    elsewhere = [".".join((*at, name)) for at, names in known.items() if name in names]
    if elsewhere or name in _OTHER_NAMES:
        return f"; did you mean '{(elsewhere or [_OTHER_NAMES[name]])[0]}'?"
    near = nearest(name, known.get(section, []))
    return f" of sae_type '{sae_type}'{near}" if sae_type and section == ("saes",) else near
