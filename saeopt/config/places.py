"""The paths of a config: as they were typed, and where they lie for whoever comes from another folder or host.

`~` and `$VAR` are expanded, and what exists is stored with its absolute path; `as_typed` says what stood there. A path
that is not there (a run folder was copied, a worker runs on another host) is looked for as it was typed.
"""

from __future__ import annotations

import copy
import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from saeopt.config.roles import MADE, PATHS
from saeopt.errors import UserError


def expanded(text: str) -> str:
    """The path with `~` and `$VAR` replaced.

    Raises:
        UserError: no such variable or user.
    """
    found = os.path.expandvars(os.path.expanduser(text))
    unknown = re.search(r"\$(\w+|\{\w+\})", found)
    if unknown and not os.path.exists(found):
        raise UserError(f"the environment variable {unknown[1].strip('{}')} is not set (got {text!r})")
    if found.startswith("~") and not os.path.exists(found):
        raise UserError(f"there is no user {found.split(os.sep)[0][1:]} (got {text!r})")
    return found


_AT_SITE = re.compile(r"([^/=~$]*hook_[^/=]*)=(.+)", re.DOTALL)


def site_and_place(text: str) -> tuple[str | None, str]:
    """`HOOK_POINT=PATH` as its two parts; of a path alone the site is None."""
    found = _AT_SITE.fullmatch(text)
    return (found[1], found[2]) if found and not os.path.exists(text) else (None, text)


def located(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A run's raw config with its paths made absolute where they exist.

    Raises:
        UserError: a path names a variable or user that does not exist.
    """
    result: dict[str, Any] = copy.deepcopy(dict(raw))
    typed = result.get("as_typed")
    typed = dict(typed) if isinstance(typed, dict) else {}

    def locate(field: str, text: str) -> str:
        site, place = site_and_place(text)
        if site is not None:
            return f"{site}={locate(field, place)}"
        first = typed.get(text, text)
        try:
            found = expanded(text)
            if field not in MADE:
                found = _absolute(found) or _absolute(expanded(first)) or found
        except UserError as error:
            raise UserError(f"'{field}': {error}") from None
        if found not in (text, first):
            typed[found] = first
        return found

    _map_paths(result, locate)
    if typed:
        result["as_typed"] = typed
    return result


def as_typed(dumped: Mapping[str, Any]) -> dict[str, Any]:
    """A dumped config with its paths as they were typed, wherever they lie: what makes two configs the same."""
    result: dict[str, Any] = copy.deepcopy(dict(dumped))
    typed = result.pop("as_typed", None) or {}

    def as_it_was(text: str) -> str:
        site, place = site_and_place(text)
        return typed.get(text, text) if site is None else f"{site}={typed.get(place, place)}"

    _map_paths(result, lambda _field, text: as_it_was(text))
    return result


def without_folders(dumped: Mapping[str, Any]) -> dict[str, Any]:
    """A dumped config for people elsewhere: paths as they were typed, of absolute ones the last part alone."""
    result = as_typed(dumped)
    _map_paths(result, lambda _field, text: os.path.basename(text.rstrip(os.sep)) if os.path.isabs(text) else text)
    return result


def _absolute(text: str) -> str | None:
    """The absolute path of what exists; None for anything else, a hub's name too."""
    there = os.path.exists(text) or (any(c in text for c in "*?[") and next(glob.iglob(text, recursive=True), None))
    return os.path.abspath(text) if there else None


def _map_paths(raw: dict[str, Any], change: Callable[[str, str], str]) -> None:
    for section, name, field in _places(raw):
        value = section[name]
        if isinstance(value, str) and value:
            section[name] = change(field, value)
        elif isinstance(value, list):
            section[name] = [change(field, v) if isinstance(v, str) and v else v for v in value]


def _places(raw: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    for field in PATHS:
        section_name, _, name = field.rpartition(".")
        section = raw.get(section_name) if section_name else raw
        if isinstance(section, dict) and name in section:
            yield section, name, field


def first_made(typed: Mapping[str, str], folder: str, inside: str) -> Path:
    """`inside` of a folder that was typed: where it is already, else from where the process works."""
    known = [found for found, text in typed.items() if text == folder and os.path.exists(os.path.join(found, inside))]
    return Path(known[0] if known else expanded(folder)) / inside
