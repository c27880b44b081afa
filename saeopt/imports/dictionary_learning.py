"""dictionary_learning: `ae.pt`, a state dict, and `config.json`, whose `trainer.dict_class` says what it is of.

The shapes are those of nn.Linear, except for JumpReLU and Matryoshka. Its AutoEncoder is given rows of norm 1 when it
is loaded: here too, so that codes are equal.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saeopt.config.sites import Site
from saeopt.errors import UserError
from saeopt.imports.imported import Held, Imported, from_portable
from saeopt.imports.tensors import check_shapes, load_torch, need
from saeopt.imports.trees import Tree
from saeopt.saes.portable import Portable

WHAT = "dictionary_learning's ae.pt and config.json"
_CONFIG, _WEIGHTS = "config.json", "ae.pt"
_RESIDUAL = re.compile(r"resid_post_layer_(\d+)")
_LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_enc": "encoder.bias", "b_dec": "b_dec"}
_PLAIN = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
_NAMES: dict[str, dict[str, str]] = {
    "AutoEncoder": {**_LINEAR, "b_dec": "bias"},
    "AutoEncoderNew": {**_LINEAR, "b_dec": "decoder.bias"},
    "GatedAutoEncoder": {
        "W_enc": "encoder.weight",
        "W_dec": "decoder.weight",
        "b_enc": "mag_bias",
        "b_gate": "gate_bias",
        "r_mag": "r_mag",
        "b_dec": "decoder_bias",
    },
    "AutoEncoderTopK": _LINEAR,
    "BatchTopKSAE": _LINEAR,
    "MatryoshkaBatchTopKSAE": _PLAIN,
    "JumpReluAutoEncoder": {**_PLAIN, "threshold": "threshold"},
}
"""Class → our names of its tensors."""
_BUFFERS = ("k", "threshold", "group_sizes")


def held(files: Tree, folder: str, names: set[str]) -> list[Held]:
    """As :class:`saeopt.imports.find.Reader`."""
    if _WEIGHTS not in names:
        return []
    inside = f"{folder}/" if folder else ""
    where = files.where(inside + _WEIGHTS)
    if _CONFIG not in names:
        raise UserError(f"{where}: no {_CONFIG} beside it, which says what it is of")
    trainer = files.json(inside + _CONFIG).get("trainer")
    config: Mapping[str, Any] = trainer if isinstance(trainer, dict) else {}
    kind = config.get("dict_class")
    if kind not in _NAMES:
        raise UserError(f"{files.where(inside + _CONFIG)}: 'trainer.dict_class': '{kind}' is not known")
    site = _site(config)
    key = site.key if site is not None else files.called(folder)
    return [Held(key, site, where, lambda: _read(files.get(inside + _WEIGHTS), kind))]


def _site(config: Mapping[str, Any]) -> Site | None:
    name = config.get("submodule_name")
    if not isinstance(name, str):
        return None
    residual = _RESIDUAL.fullmatch(name)
    hook = f"blocks.{residual[1]}.hook_resid_post" if residual else name
    return Site.of(hook) if "hook_" in hook else None


def _read(path: Path, kind: str) -> tuple[Imported, Path]:
    found, names = load_torch(path), _NAMES[kind]
    need(path, found, list(names.values()), _BUFFERS if kind not in ("AutoEncoder", "AutoEncoderNew") else ())
    given: dict[str, Any] = {own: found[name] for own, name in names.items()}
    if names["W_enc"] != "W_enc":
        given |= {name: given[name].T for name in ("W_enc", "W_dec")}
    shown = {name: tensor for name, tensor in given.items() if name not in ("W_enc", "W_dec")}
    check_shapes(path, given["W_enc"], given["W_dec"], shown)
    form = {"GatedAutoEncoder": "gated", "AutoEncoderTopK": "topk", "JumpReluAutoEncoder": "jumprelu"}.get(kind, "relu")
    if form == "topk":
        given["k"] = _number(path, found, "k")
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        threshold = found.get("threshold")
        if threshold is None:
            raise UserError(f"{path}: holds no 'threshold': it was never set, and the code depends on the batch")
        form, given["threshold"] = "jumprelu", threshold.clamp_min(0).expand_as(given["b_enc"])
    reads_x = kind in ("AutoEncoderNew", "JumpReluAutoEncoder")
    portable = Portable(form=form, subtracts_bias=not reads_x, **given)  # type: ignore[arg-type]
    return from_portable(portable.unit_rows() if kind == "AutoEncoder" else portable), path


def _number(path: Path, found: Mapping[str, Tensor], name: str) -> int:
    if name not in found or found[name].numel() != 1:
        raise UserError(f"{path}: holds no number '{name}'")
    return int(found[name])
