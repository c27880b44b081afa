"""Which SAEs a folder or a repository of the hub holds, whatever tool wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from saeopt.errors import UserError
from saeopt.imports.imported import Held, foreign
from saeopt.imports.trees import Tree, tree

READERS = (
    "saeopt.imports.plain",
    "saeopt.imports.sae_lens",
    "saeopt.imports.dictionary_learning",
    "saeopt.imports.sparsify",
    "saeopt.imports.circuit_tracer",
    "saeopt.imports.replaced",
)
"""Modules, each of one format."""


class Reader(Protocol):
    """What a reader's module has."""

    WHAT: str
    """Its files, for people."""

    def held(self, files: Tree, folder: str, names: set[str]) -> list[Held]:
        """The SAEs of this format in one folder of a tree, whose files have these names; no weights are read.

        Raises:
            UserError: they are of this format, and cannot be read.
        """
        ...


def readers() -> list[Reader]:
    """All of them."""
    return [cast(Reader, import_module(name)) for name in READERS]


def find(source: str) -> list[Held]:
    """The SAEs of a folder, a file or a repository of the hub, by key; no weights are read.

    Raises:
        UserError: there are none.
    """
    files = tree(source)
    found: list[Held] = []
    for folder, names in files.folders().items():
        for reader in readers():
            with foreign(files.where(folder)):
                found += reader.held(files, folder, names)
    if not found:
        known = "; ".join(reader.WHAT for reader in readers())
        raise UserError(f"{source}: holds no SAE that is known here (no run folder, nor {known})")
    return found


def choose(found: Sequence[Held], key: str) -> Held:
    """The one of a site, or the only one.

    Raises:
        UserError: there are several, of which none or more than one is of this site.
    """
    own = [one for one in found if one.key == key] or (list(found) if len(found) == 1 else [])
    if len(own) == 1:
        return own[0]
    if own:
        raise UserError(f"several SAEs for {key}: name one of {_some(one.path for one in own)}")
    raise UserError(f"no SAE for {key} (found: {_some(one.key for one in found)}; '{key}=PATH' says which one is)")


def _some(names: Iterable[str], most: int = 6) -> str:
    shown = list(dict.fromkeys(names))
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def refuse_foreign(path: Path) -> None:
    """Say what evaluates SAEs of another tool, which tell no language model and no text.

    Raises:
        UserError: these are such SAEs.
    """
    if not path.exists() or not is_foreign(path):
        return
    try:
        held = find(str(path))
    except UserError:
        return  # no SAEs at all: told by who reads run folders
    raise UserError(
        f"{path}: {held[0].path.rpartition('/')[2]} is another tool's: a config with saes.pretrained_sae_paths:"
        f" {path} and saes.retrain_saes: false evaluates it"
    )


def is_foreign(path: Path) -> bool:
    """Whether a path is none of our run folders or weights files."""
    from saeopt.runs.names import CONFIG
    from saeopt.runs.weights import list_checkpoints

    if path.is_dir():
        begun = (path / CONFIG).exists() and not any(path.glob("samples_*.pt"))  # a run that has no checkpoint yet
        return not begun and not list_checkpoints(path)
    return path.suffix != ".safetensors" or not _ours(path)


def _ours(path: Path) -> bool:
    from saeopt.runs.tensor_file import read_metadata

    try:
        return "hook_points" in read_metadata(path)
    except UserError:  # damaged, or another tool's
        return path.name.startswith("samples_")
