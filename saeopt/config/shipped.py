"""The configs and studies that come with saeopt: in a wheel inside the package, in a checkout beside it."""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path

from saeopt.config.base import nearest
from saeopt.errors import UserError

FOLDERS = ("configs", "studies")
_PACKAGE = Path(__file__).resolve().parents[1]


def root() -> Path:
    """The folder that holds `configs/` and `studies/`.

    Raises:
        UserError: neither is there: a package without its data.
    """
    for folder in (_PACKAGE / "_shipped", _PACKAGE.parent):
        if all((folder / name).is_dir() for name in FOLDERS):
            return folder
    raise UserError(f"{_PACKAGE}: this installation has no configs and studies beside it: install saeopt anew")


def names() -> list[str]:
    """Every shipped file, as `configs/tinystories/tinystories-relu.yaml`."""
    there = root()
    return sorted(str(path.relative_to(there)) for name in FOLDERS for path in (there / name).rglob("*.yaml"))


def named(words: list[str]) -> list[str]:
    """The shipped files that are meant: each word is a file's name with or without folders and `.yaml`, or a folder.

    Raises:
        UserError: nothing is called so, or several files are.
    """
    return list(dict.fromkeys(name for word in words for name in _meant(word)))


def with_bases(chosen: list[str]) -> list[str]:
    """The files, and the config that each study or sweep among them starts from."""
    bases = [base for name in chosen if (base := _base(name)) is not None]
    return list(dict.fromkeys([*chosen, *bases]))


def title(name: str) -> str:
    """What the file says of itself in its first sentence."""
    text = (root() / name).read_text(encoding="utf-8")
    comment = " ".join(line[2:] for line in takewhile(_is_prose, text.splitlines()))
    return re.split(r"(?:(?<=\?)|\.)(?:\s|$)", comment)[0].rstrip(":")


def hint(path: str | Path) -> str:
    """` (…)` where a file that is not there ships with saeopt under this name; else nothing."""
    try:
        return f" (it comes with saeopt: saeopt configs cp {Path(path).stem})" if str(path) in names() else ""
    except UserError:
        return ""


def _is_prose(line: str) -> bool:
    return line.startswith("# ") and not line.startswith("#  ")


def _meant(word: str) -> list[str]:
    known, asked = names(), word.strip("/")
    inside = [name for name in known if f"/{asked}/" in f"/{name}"]
    found = [name for name in known if name.removesuffix(".yaml").endswith(f"/{asked.removesuffix('.yaml')}")]
    exact = [name for name in known if name.removesuffix(".yaml") == asked.removesuffix(".yaml")]
    if exact or inside or len(found) == 1:
        return exact or inside or found
    if found:
        raise UserError(f"'{word}' may be {' or '.join(found)}")
    near = nearest(asked.rpartition("/")[2].removesuffix(".yaml"), sorted({Path(name).stem for name in known}))
    raise UserError(f"nothing that comes with saeopt is called '{word}'{near or ' (saeopt configs ls lists all)'}")


def _base(name: str) -> str | None:
    """The config that a study or a sweep names; no shipped study lies below another folder."""
    text = (root() / name).read_text(encoding="utf-8")
    found = re.search(r"^(?:base: \.\./|#.* --base-config )(configs/\S+)", text, re.MULTILINE)
    return found[1] if found else None
