"""`sae.safetensors` as `saeopt export --to safetensors` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saeopt.config.sites import Site
from saeopt.errors import UserError
from saeopt.imports.imported import Held, Imported, from_portable
from saeopt.imports.trees import Tree
from saeopt.runs.tensor_file import read_metadata, read_tensors
from saeopt.saes.registry import ARCHITECTURES

WHAT = "saeopt's own sae.safetensors"
_FILE, _LAYOUT, _OWN = "sae.safetensors", 1, "own"
_OF_ITS_CODE = ("eval_gate", "hard_concrete_stretch_limits", "magnitude_activation", "input_dependent_gates")


def held(files: Tree, folder: str, names: set[str]) -> list[Held]:
    """As :class:`saeopt.imports.find.Reader`. Its header is read, which downloads it."""
    if _FILE not in names or "cfg.json" in names:
        return []
    name = f"{folder}/{_FILE}" if folder else _FILE
    path = files.get(name)
    told: Any = read_metadata(path)
    if told.get("layout") != _LAYOUT or "form" not in told:
        raise UserError(f"{files.where(name)}: its layout is not {_LAYOUT}, the one that this version reads")
    of = told["site"]
    site = Site(tuple(of["reads"]), tuple(of["writes"]), of["key"])
    if len(site.reads) > 1 or len(site.writes) > 1:
        raise UserError(f"{files.where(name)}: reads or writes several hook points: load the run that it was made from")
    return [Held(site.key, site, files.where(name), lambda: (_read(path, told, not site.one), path))]


def _read(path: Path, told: dict[str, Any], transcodes: bool) -> Imported:
    from dataclasses import fields

    from saeopt.saes.portable import Portable

    tensors = read_tensors(path)
    if told["form"] == _OWN:
        config = told["sae_config"]
        if config["sae_type"] not in ARCHITECTURES:  # nothing is imported because a file says so
            raise UserError(f"{path}: its architecture '{config['sae_type'][:80]}' is none of saeopt's: load its run")
        return Imported(config["sae_type"], tensors, transcodes, {n: config[n] for n in _OF_ITS_CODE if n in config})
    known = {field.name for field in fields(Portable)}
    given: dict[str, Any] = {**tensors, **{name: value for name, value in told.items() if name in known}}
    portable = Portable(**given)
    try:
        return from_portable(portable, transcodes=transcodes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
