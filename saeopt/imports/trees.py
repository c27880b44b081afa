"""Where another tool's files lie: a folder, or a repository of the hub, of which only what is needed is downloaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from saeopt.errors import UserError
from saeopt.files import read_error

_DEPTH = 4
"""Folders below the one that was named in which SAEs are looked for."""
_MOST = 20_000
"""Files; a folder with more is none of SAEs."""
_NAME = r"[A-Za-z0-9][\w.-]{0,95}"
_HUB = re.compile(rf"(?P<mark>hub:)?(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[^:\s]+))?(?::(?P<folder>\S+))?$")
_HUB_PATH = re.compile(rf"(?P<mark>hub:)(?P<repo>{_NAME}/{_NAME})/(?P<folder>\S+)$")


@dataclass(frozen=True)
class Tree:
    """Names of files, relative with `/`, and how one of them becomes a file here."""

    source: str
    """As people called it."""
    names: tuple[str, ...]
    get: Callable[[str], Path]

    def folders(self) -> dict[str, set[str]]:
        """Folder (`""`: the tree's own) → the names of its files."""
        found: dict[str, set[str]] = {}
        for name in self.names:
            folder, _, file = name.rpartition("/")
            found.setdefault(folder, set()).add(file)
        return dict(sorted(found.items(), key=lambda item: _natural(item[0])))

    def text(self, name: str) -> str:
        """A text file.

        Raises:
            UserError: it cannot be read.
        """
        path = self.get(name)
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{path}: is no text") from None
        except OSError as error:
            raise read_error(path, error) from error

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object.

        Raises:
            UserError: it is none.
        """
        try:
            found = json.loads(self.text(name))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.where(name)}: no JSON: {error}") from None
        if not isinstance(found, dict):
            raise UserError(f"{self.where(name)}: holds no JSON object")
        return found

    def yaml(self, name: str) -> dict[str, Any]:
        """A YAML mapping; nothing where the file is another thing.

        Raises:
            UserError: it cannot be read.
        """
        import yaml

        try:
            found = yaml.safe_load(self.text(name))
        except (yaml.YAMLError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def where(self, name: str) -> str:
        """A file as people know it."""
        return f"{self.source}{':' if is_hub(self.source) and ':' not in self.source[4:] else '/'}{name}"

    def called(self, folder: str) -> str:
        """What a folder of it is called."""
        return PurePosixPath(folder).name or PurePosixPath(self.source.split("@")[0]).name or self.source


def _natural(text: str) -> list[tuple[int, str]]:
    """layers.10 behind layers.9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]


def is_hub(text: str) -> bool:
    """Whether a text names a repository of the hub: `hub:OWNER/NAME[/FOLDER]` or, if no such path exists here,
    `OWNER/NAME[@REVISION][:FOLDER]`."""
    if os.path.exists(text) or text.startswith((".", "~", "/")):
        return False
    return bool(_HUB.match(text) or _HUB_PATH.match(text))


def tree(source: str) -> Tree:
    """The files of a folder, of one file and what lies beside it, or of a repository of the hub.

    Raises:
        UserError: there is no such thing, or it cannot be reached.
    """
    if is_hub(source):
        return _hub_tree(source)
    path = Path(source)
    if not path.exists():
        raise UserError(f"{source}: no such file or folder, nor the form of a repository of the hub (OWNER/NAME)")
    folder = path if path.is_dir() else path.parent
    names: list[str] = []
    for where, folders, files in os.walk(folder):
        inside = Path(where).relative_to(folder)
        folders[:] = [] if len(inside.parts) >= _DEPTH or not path.is_dir() else [f for f in folders if f[0] != "."]
        names += [(inside / file).as_posix() for file in files if file[0] != "."]
        if len(names) > _MOST:
            raise UserError(f"{source}: holds more than {_MOST:,} files: name the folder of the SAEs")
    if not path.is_dir():  # that one, with what describes it
        names = [n for n in names if n == path.name or n.endswith((".json", ".yaml"))]
    return Tree(source, tuple(names), lambda name: folder / name)


@cache
def _hub_tree(source: str) -> Tree:
    """Asked for once per process: a run of many hook points looks each of them up."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    found = _HUB.match(source) or _HUB_PATH.match(source)
    assert found is not None
    told = found.groupdict()
    repo, revision, folder = told["repo"], told.get("revision"), (told.get("folder") or "").strip("/")
    inside = f"{folder}/" if folder else ""

    def cached() -> Tree | None:
        try:
            root = Path(snapshot_download(repo, revision=revision, local_files_only=True)) / folder
        except Exception:  # whatever keeps the cache from being used, the first error is told
            return None
        here = tree(str(root)) if root.is_dir() else None
        return Tree(source, here.names, here.get) if here and here.names else None

    try:
        info = HfApi().model_info(repo, revision=revision)
    except Exception as error:  # of the hub's client and of two HTTP libraries below it
        if (offline := cached()) is not None:
            return offline
        raise UserError(f"{source}: {_told(error)}") from None
    listed = [file.rfilename for file in info.siblings or []]
    names = tuple(name.removeprefix(inside) for name in listed if name.startswith(inside))
    if not names:
        raise UserError(f"{source}: {repo} holds no folder '{folder}'")

    @cache
    def get(name: str) -> Path:
        try:  # by the revision's name, under which the cache is found without a network
            return Path(hf_hub_download(repo, inside + name, revision=revision))
        except Exception as error:  # as above
            raise UserError(f"{source}: {inside}{name}: {_told(error)}") from None

    return Tree(source, names, get)


def _told(error: Exception) -> str:
    """What went wrong with the hub, in a line."""
    kind = type(error).__name__
    if kind == "GatedRepoError":
        return "this repository is gated: accept its terms on the hub and set HF_TOKEN"
    if kind in ("RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError", "RemoteEntryNotFoundError"):
        return "no such file or folder here, and no such repository, revision or file on the hub (or it is private)"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror} (HF_HOME can name a folder that is writable)"
    return f"no such file or folder here, and the hub cannot be reached: {kind}: {' '.join(str(error).split())[:150]}"
