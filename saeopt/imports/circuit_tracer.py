"""circuit-tracer: `config.yaml` and `layer_N.safetensors`, the transcoders of layers 0…n − 1; relu and JumpReLU."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saeopt.config.sites import Site
from saeopt.errors import UserError
from saeopt.imports.imported import Held, Imported, from_portable
from saeopt.imports.tensors import check_shapes, load_safetensors, need
from saeopt.imports.trees import Tree
from saeopt.saes.portable import Portable

WHAT = "circuit-tracer's config.yaml and layer_N.safetensors"
_CONFIG = "config.yaml"
_LAYER = re.compile(r"layer_(\d+)\.safetensors")
_THRESHOLD = "activation_function.threshold"


def held(files: Tree, folder: str, names: set[str]) -> list[Held]:
    """As :class:`saeopt.imports.find.Reader`."""
    if _CONFIG not in names:
        return []
    inside = f"{folder}/" if folder else ""
    config, where = files.yaml(inside + _CONFIG), files.where(inside + _CONFIG)
    kind = config.get("model_kind")
    if kind is None:
        return []
    if kind != "transcoder_set":
        raise UserError(f"{where}: 'model_kind: {kind}': only transcoder_set (one layer each) can be read")
    layers = _layers(config, names)
    if not layers:
        raise UserError(f"{where}: no layer_N.safetensors beside it: name the repository that holds the transcoders")
    return [_one(files, inside, layer, name, config) for layer, name in sorted(layers.items())]


def _layers(config: Mapping[str, Any], names: set[str]) -> dict[int, str]:
    listed = config.get("transcoders")
    if isinstance(listed, list):
        return {layer: str(name) for layer, name in enumerate(listed) if str(name) in names}
    return {int(layer[1]): name for name in names if (layer := _LAYER.fullmatch(name))}


def _one(files: Tree, inside: str, layer: int, name: str, config: Mapping[str, Any]) -> Held:
    hooks = [config.get(f"feature_{side}_hook") for side in ("input", "output")]
    read, written = (f"blocks.{layer}.{hook}" if hook else None for hook in hooks)
    site = Site((read,), (written,), f"{read}->{written}") if read and written else None
    path = files.where(inside + name)
    return Held(site.key if site else f"layer_{layer}", site, path, lambda: _read(files.get(inside + name)))


def _read(path: Path) -> tuple[Imported, Path]:
    found = load_safetensors(path)
    need(path, found, ("W_enc", "W_dec", "b_enc", "b_dec"), ("W_skip", _THRESHOLD))
    threshold = found.get(_THRESHOLD)
    if threshold is not None:
        threshold = threshold.flatten().expand_as(found["b_enc"])
        if bool((threshold < 0).any()):
            raise UserError(f"{path}: '{_THRESHOLD}' is below 0, where negative latents pass, which none here lets")
    portable = Portable(
        form="relu" if threshold is None else "jumprelu",
        W_enc=found["W_enc"].T,
        W_dec=found["W_dec"],
        b_enc=found["b_enc"],
        b_dec=found["b_dec"],
        threshold=threshold,
        W_skip=found["W_skip"].T if "W_skip" in found else None,
        subtracts_bias=False,
    )
    check_shapes(path, portable.W_enc, portable.W_dec, {"b_enc": portable.b_enc, "b_dec": portable.b_dec})
    try:
        return from_portable(portable, transcodes=True), path
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
