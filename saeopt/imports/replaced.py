"""`samples_N.pt` of SAE-Interpretability, the system that saeopt replaces, beside its `final_config.yaml`.

A state dict of all hook points, whose names have `-` for `.`. relu and hard_concrete read x itself and use decoder
columns of norm 1, as topk does; gated and gated_hard_concrete use them as they are. Gates are evaluated as σ(log α).
What `torch.load` would run of a pickle is not run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from saeopt.config.sites import Site
from saeopt.errors import UserError
from saeopt.imports.imported import Held, Imported, from_portable
from saeopt.imports.tensors import check_shapes, load_torch, need
from saeopt.imports.trees import Tree
from saeopt.saes.gated import MAGNITUDES
from saeopt.saes.portable import Portable

WHAT = "samples_N.pt and final_config.yaml of SAE-Interpretability"
_FILE, _CONFIG = re.compile(r"samples_(\d+)\.pt"), "final_config.yaml"


def held(files: Tree, folder: str, names: set[str]) -> list[Held]:
    """As :class:`saeopt.imports.find.Reader`: the newest checkpoint's."""
    found = {int(samples[1]): name for name in names if (samples := _FILE.fullmatch(name))}
    if not found:
        return []
    inside = f"{folder}/" if folder else ""
    weights = inside + found[max(found)]
    config = files.yaml(inside + _CONFIG) if _CONFIG in names else {}
    saes = config.get("saes") if isinstance(config.get("saes"), dict) else None
    if saes is None:
        raise UserError(f"{files.where(weights)}: no {_CONFIG} with a saes section beside it, which says what it is of")
    positions = saes.get("sae_positions") or []
    hooks = [positions] if isinstance(positions, str) else [str(hook) for hook in positions]
    path = files.where(weights)
    return [Held(hook, Site.of(hook), path, partial(_read, files, weights, hook, saes)) for hook in hooks]


def _read(files: Tree, weights: str, hook: str, saes: Mapping[str, Any]) -> tuple[Imported, Path]:
    path = files.get(weights)
    start = hook.replace(".", "-") + "."
    found = {name.removeprefix(start): t for name, t in load_torch(path).items() if name.startswith(start)}
    if not found:
        raise UserError(f"{path}: holds no SAE at {hook}")
    kind = saes.get("sae_type")
    readers = {"relu": _relu, "gated": _gated, "topk": _topk, "hard_concrete": _hard_concrete}
    if kind == "gated_hard_concrete":
        return _gated_hard_concrete(path, found, saes), path
    if kind not in readers:
        raise UserError(f"{path.parent / _CONFIG}: 'saes.sae_type': '{kind}' is not known")
    return readers[kind](path, found, saes), path


def _relu(path: Path, found: Mapping[str, Tensor], saes: Mapping[str, Any]) -> Imported:
    need(path, found, ("encoder.0.weight", "encoder.0.bias", "decoder.weight", "decoder.bias"))
    portable = Portable(
        form="relu",
        W_enc=found["encoder.0.weight"].T,
        b_enc=found["encoder.0.bias"],
        W_dec=normalize(found["decoder.weight"], dim=0).T,
        b_dec=found["decoder.bias"],
        subtracts_bias=False,
    )
    check_shapes(path, portable.W_enc, portable.W_dec, {"b_enc": portable.b_enc, "b_dec": portable.b_dec})
    return from_portable(portable)


_GATED = ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "mag_bias", "gate_bias")


def _gated(path: Path, found: Mapping[str, Tensor], saes: Mapping[str, Any]) -> Imported:
    need(path, found, _GATED)
    portable = Portable(
        form="gated",
        W_enc=found["encoder.weight"].T,
        b_enc=found["mag_bias"],
        b_gate=found["gate_bias"],
        r_mag=found["r_mag"],
        W_dec=found["decoder.weight"].T,
        b_dec=found["decoder_bias"],
        subtracts_bias=True,
    )
    vectors = {"mag_bias": portable.b_enc, "gate_bias": portable.b_gate, "b_dec": portable.b_dec}
    check_shapes(path, portable.W_enc, portable.W_dec, vectors)
    return from_portable(portable)


def _topk(path: Path, found: Mapping[str, Tensor], saes: Mapping[str, Any]) -> Imported:
    need(path, found, ("encoder.weight", "decoder.weight", "decoder_bias"))
    if not isinstance(saes.get("k"), int) or not saes.get("use_pre_relu", True):
        raise UserError(f"{path.parent / _CONFIG}: needs 'saes.k' and 'use_pre_relu: true'")
    W_enc = found["encoder.weight"].T
    portable = Portable(
        form="topk",
        W_enc=W_enc,
        b_enc=W_enc.new_zeros(W_enc.shape[1]),
        W_dec=normalize(found["decoder.weight"], dim=0).T,
        b_dec=found["decoder_bias"],
        k=int(saes["k"]),
        subtracts_bias=True,
    )
    check_shapes(path, portable.W_enc, portable.W_dec, {"b_dec": portable.b_dec})
    return from_portable(portable)


def _hard_concrete(path: Path, found: Mapping[str, Tensor], saes: Mapping[str, Any]) -> Imported:
    if "magnitude_scale" in found:
        raise UserError(f"{path}: a hard_concrete SAE of August 2025 or later ('magnitude_scale'), which is not read")
    gates = () if saes.get("input_dependent_gates", True) else ("gate_logits",)
    need(path, found, ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias", "beta", *gates))
    W_dec, b_dec = normalize(found["decoder.weight"], dim=0).T, found["decoder.bias"]
    both, biases = found["encoder.weight"].T.double(), found["encoder.bias"].double()
    h = W_dec.shape[0]
    if both.shape[1] != (h if gates else 2 * h):
        raise UserError(f"{path}: encoder {tuple(both.shape)} and decoder {tuple(W_dec.shape)} do not fit each other")
    biases = biases + b_dec.double() @ both  # it reads x, and ours reads x − b_dec
    tensors = {"W_enc": both[:, -h:], "b_enc": biases[-h:], "W_dec": W_dec, "b_dec": b_dec, "beta": found["beta"]}
    tensors |= {"b_gate": found["gate_logits"]} if gates else {"W_gate": both[:, :h], "b_gate": biases[:h]}
    fields = _gate_fields(saes, "identity") | {"input_dependent_gates": not gates}
    return Imported("hard_concrete", {name: t.float() for name, t in tensors.items()}, False, fields)


def _gated_hard_concrete(path: Path, found: Mapping[str, Tensor], saes: Mapping[str, Any]) -> Imported:
    need(path, found, (*_GATED, "beta"))
    tensors = {
        "W_enc": found["encoder.weight"].T,
        "W_dec": found["decoder.weight"].T,
        "b_dec": found["decoder_bias"],
        "b_mag": found["mag_bias"],
        "b_gate": found["gate_bias"],
        "r_mag": found["r_mag"],
        "beta": found["beta"],
    }
    vectors = {name: tensors[name] for name in ("b_mag", "b_gate", "r_mag", "b_dec")}
    check_shapes(path, tensors["W_enc"], tensors["W_dec"], vectors)
    return Imported("gated_hard_concrete", tensors, False, _gate_fields(saes, "relu"))


def _gate_fields(saes: Mapping[str, Any], magnitude: str) -> dict[str, Any]:
    """How a gate without noise is read."""
    limits = saes.get("hard_concrete_stretch_limits") or (-0.1, 1.1)
    magnitude = saes.get("magnitude_activation", magnitude) or "identity"
    if magnitude not in MAGNITUDES:
        raise UserError(f"{_CONFIG}: 'saes.magnitude_activation: {magnitude}' is none of {', '.join(MAGNITUDES)}")
    return {
        "eval_gate": "paper",
        "hard_concrete_stretch_limits": tuple(float(limit) for limit in limits),
        "magnitude_activation": magnitude,
    }
