"""SAELens: `cfg.json` and `sae_weights.safetensors`, as released and as its training saves them.

While it trains, its weights are in units that `activation_scaler.json` beside them tells: these are folded in. Read in
the source of sae-lens 6.54: what `normalize_activations` says without that file does nothing, except `layer_norm` and
`constant_norm_rescale`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeopt.config.sites import Site
from saeopt.errors import UserError
from saeopt.imports.imported import Held, Imported, from_portable
from saeopt.imports.tensors import check_shapes, load_safetensors, need
from saeopt.imports.trees import Tree
from saeopt.saes.portable import CodeForm, Portable

WHAT = "sae-lens' cfg.json and sae_weights.safetensors"
_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
_SCALER, _WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
_FORMS: dict[str, CodeForm] = {
    "standard": "relu",
    "gated": "gated",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}


@dataclass(frozen=True)
class _Files:
    """One SAE's."""

    files: Tree
    inside: str
    names: frozenset[str]

    def get(self, name: str) -> Path:
        return self.files.get(self.inside + name)


def held(files: Tree, folder: str, names: set[str]) -> list[Held]:
    """As :class:`saeopt.imports.find.Reader`."""
    if not {_CONFIG, _WEIGHTS} <= names:
        return []
    inside = f"{folder}/" if folder else ""
    where = files.where(inside + _CONFIG)
    config = _as_version_6(files.json(inside + _CONFIG))
    _check(where, config)
    told = [config["metadata"].get(name) for name in ("hook_name", "hook_name_out")]
    hooks = [hook for hook in told if isinstance(hook, str) and hook]
    transcodes = "transcoder" in config["architecture"]
    site = _site(hooks, transcodes)
    own = _Files(files, inside, frozenset(names))
    return [
        Held(
            site.key if site is not None else files.called(folder),
            site,
            files.where(inside + _WEIGHTS),
            lambda: (_read(own, config, transcodes), own.get(_WEIGHTS)),
        )
    ]


def _site(hooks: list[str], transcodes: bool) -> Site | None:
    if not transcodes:
        return Site.of(hooks[0]) if hooks else None
    return Site((hooks[0],), (hooks[1],), "->".join(hooks)) if len(hooks) == 2 else None


def _as_version_6(config: dict[str, Any]) -> dict[str, Any]:
    """Fields as version 6 writes them; before it hook and model stood beside them."""
    old = {"hook_point": "hook_name", "activation_fn_str": "activation_fn", "hook_point_head_index": "hook_head_index"}
    found = {old.get(name, name): value for name, value in config.items()}
    found["architecture"] = found.get("architecture") or "standard"
    kwargs = found.get("activation_fn_kwargs") or {}
    if found.get("activation_fn") == "topk" and kwargs.get("k") is not None:
        found |= {"architecture": "topk", "k": kwargs["k"], "activation_fn": "relu"}
    if not isinstance(found.get("metadata"), dict):
        found["metadata"] = {name: found.get(name) for name in ("hook_name", "hook_name_out", "hook_head_index")}
    return found


def _check(where: str, config: Mapping[str, Any]) -> None:
    """Refuse what no architecture here says."""
    architecture, norm = config["architecture"], config.get("normalize_activations") or "none"
    if architecture not in _FORMS:
        raise UserError(f"{where}: 'architecture': no architecture here has the code of '{architecture}'")
    if norm in ("layer_norm", "constant_norm_rescale"):
        raise UserError(f"{where}: 'normalize_activations: {norm}' scales each token, which none here does")
    if config.get("finetuning_scaling_factor"):
        raise UserError(f"{where}: 'finetuning_scaling_factor' is not read: fold it into W_dec")
    if config.get("activation_fn", "relu") != "relu":
        raise UserError(f"{where}: 'activation_fn: {config['activation_fn']}': relu and topk are known")
    if not all(isinstance(config.get(name), int) for name in ("d_in", "d_sae")):
        raise UserError(f"{where}: 'd_in' and 'd_sae' are missing: not sae-lens'")
    if config["metadata"].get("hook_head_index") is not None:
        raise UserError(f"{where}: 'hook_head_index': reads a single head, and hook points are read whole here")


def _read(own: _Files, config: Mapping[str, Any], transcodes: bool) -> Imported:
    path, form = own.get(_WEIGHTS), _FORMS[config["architecture"]]
    found = load_safetensors(path)
    if "log_threshold" in found:  # of training, before 6.40 or so
        found["threshold"] = found.pop("log_threshold").exp()
    running = found.pop("topk_threshold", None)
    if running is not None:
        found["threshold"] = running.to(found["b_enc"]).expand_as(found["b_enc"])
    biases = ("b_gate", "b_mag", "r_mag") if form == "gated" else ("b_enc",)
    thresholds = ("threshold",) if form == "jumprelu" else ()
    need(path, found, ("W_enc", "W_dec", "b_dec", *biases, *thresholds), ("W_skip", "finetuning_scaling_factor"))
    vectors = {name: found[name] for name in (*biases, *thresholds, "b_dec")}
    check_shapes(path, found["W_enc"], found["W_dec"], vectors)
    portable = Portable(
        form=form,
        W_enc=found["W_enc"],
        W_dec=found["W_dec"],
        b_enc=found["b_mag" if form == "gated" else "b_enc"],
        b_dec=found["b_dec"],
        b_gate=found.get("b_gate"),
        r_mag=found.get("r_mag"),
        threshold=found.get("threshold"),
        W_skip=found["W_skip"].T if "W_skip" in found else None,
        k=int(config.get("k", 100)) if form == "topk" else None,
        subtracts_bias=not transcodes and bool(config.get("apply_b_dec_to_input", True)),
    )
    if config.get("rescale_acts_by_decoder_norm"):  # it selects in these units, and gives its code in them
        portable = replace(portable.unit_rows(), threshold=portable.threshold)
    try:
        return from_portable(_unscaled(own, portable), transcodes=transcodes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _unscaled(own: _Files, portable: Portable) -> Portable:
    """What reads raw activations, of weights that read (x · scale − mean) · matrix."""
    if _SCALER not in own.names:
        return portable
    scaler = own.files.json(own.inside + _SCALER)
    if scaler.get("has_whitening") and _WHITENING in own.names:
        portable = _unwhitened(portable, load_safetensors(own.get(_WHITENING)))
    scale = scaler.get("scaling_factor")
    if scale is None:
        return portable
    return replace(portable, W_enc=portable.W_enc * scale, W_dec=portable.W_dec / scale, b_dec=portable.b_dec / scale)


def _unwhitened(portable: Portable, given: Mapping[str, Tensor]) -> Portable:
    mean_d, matrix_dd, inverse_dd = (given[name].double() for name in ("mean", "matrix", "inverse_matrix"))
    W_enc = matrix_dd @ portable.W_enc.double()
    changed: dict[str, Any] = {
        "W_enc": W_enc,
        "W_dec": portable.W_dec.double() @ inverse_dd,
        "b_dec": portable.b_dec.double() @ inverse_dd + mean_d,
    }
    if not portable.subtracts_bias:
        moved_h = mean_d @ W_enc
        factor = portable.r_mag.double().exp() if portable.r_mag is not None else torch.ones_like(moved_h)
        changed["b_enc"] = portable.b_enc.double() - factor * moved_h
        if portable.b_gate is not None:
            changed["b_gate"] = portable.b_gate.double() - moved_h
    return replace(portable, **{name: tensor.to(portable.W_enc.dtype) for name, tensor in changed.items()})
