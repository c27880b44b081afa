"""sparsify (EleutherAI): a folder per hook point with `cfg.json` and `sae.safetensors`; topk SAEs and transcoders.

`layers.N` is what block N gives. Transcoders read and write a module, whose hook points its name does not tell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from saeopt.config.sites import Site
from saeopt.errors import UserError
from saeopt.imports.imported import Held, Imported, from_portable
from saeopt.imports.tensors import check_shapes, load_safetensors, need
from saeopt.imports.trees import Tree
from saeopt.saes.portable import Portable

WHAT = "sparsify's cfg.json and sae.safetensors"
_CONFIG, _WEIGHTS = "cfg.json", "sae.safetensors"
_BLOCK = re.compile(r"(?:layers|h|blocks)\.(\d+)")


def held(files: Tree, folder: str, names: set[str]) -> list[Held]:
    """As :class:`saeopt.imports.find.Reader`."""
    if not {_CONFIG, _WEIGHTS} <= names:
        return []
    inside = f"{folder}/" if folder else ""
    config, where = files.json(inside + _CONFIG), files.where(inside + _CONFIG)
    if config.get("activation", "topk") != "topk":
        raise UserError(f"{where}: 'activation': no architecture here has the code of '{config['activation']}'")
    if not isinstance(config.get("d_in"), int):
        raise UserError(f"{where}: 'd_in' is missing: not sparsify's")
    name = unquote(files.called(folder))
    site = _site(name, config)
    weights = inside + _WEIGHTS
    return [Held(site.key if site else name, site, files.where(weights), lambda: _read(files.get(weights), config))]


def _site(name: str, config: Mapping[str, Any]) -> Site | None:
    told = config.get("saeopt_site")
    if isinstance(told, dict) and told.get("reads") and told.get("writes"):
        return Site(tuple(told["reads"]), tuple(told["writes"]), str(told.get("key")))
    if config.get("transcode"):
        return None
    block = _BLOCK.fullmatch(name)
    if block:
        return Site.of(f"blocks.{block[1]}.hook_resid_post")
    return Site.of(name) if "hook_" in name and "->" not in name else None


def _read(path: Path, config: Mapping[str, Any]) -> tuple[Imported, Path]:
    found, transcodes = load_safetensors(path), bool(config.get("transcode"))
    need(path, found, ("encoder.weight", "encoder.bias", "W_dec", "b_dec"), ("W_skip",))
    portable = Portable(
        form="topk",
        W_enc=found["encoder.weight"].T,
        b_enc=found["encoder.bias"],
        W_dec=found["W_dec"],
        b_dec=found["b_dec"],
        W_skip=found["W_skip"].T if "W_skip" in found else None,
        k=int(config.get("k") or 32),
        subtracts_bias=not transcodes,
    )
    check_shapes(path, portable.W_enc, portable.W_dec, {"b_enc": portable.b_enc, "b_dec": portable.b_dec})
    try:
        return from_portable(portable, transcodes=transcodes), path
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
