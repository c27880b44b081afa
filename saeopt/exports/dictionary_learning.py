"""dictionary_learning 0.1: `ae.pt` (a state dict) and `config.json` per SAE, as its `load_dictionary` reads them.

Its AutoEncoder is given decoder rows of norm 1 when it is loaded, so that a relu SAE is written so: same x̂, a code
longer by the rows. Its JumpReLU does not take b_dec from x.
"""

from __future__ import annotations

import io
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from saeopt.config.sites import Site
from saeopt.errors import UserError
from saeopt.exports.formats import About, Format, Placed, Release
from saeopt.files import write_bytes, write_json

if TYPE_CHECKING:
    from saeopt.saes.portable import Portable

CONFIG, WEIGHTS = "config.json", "ae.pt"
_TRAINERS = {
    "AutoEncoder": "StandardTrainer",
    "GatedAutoEncoder": "GatedSAETrainer",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
}


class DictionaryLearning(Format):
    """An autoencoder at one hook point."""

    name = "dictionary-learning"
    library = "dictionary_learning"
    unit_rows = frozenset({"relu"})

    def problem(self, portable: Portable, site: Site) -> str | None:
        if not site.one:
            return "it has autoencoders of one hook point alone"
        return None if portable.W_skip is None else "it has no W_skip"

    def write(self, portable: Portable, about: About, folder: Path) -> list[Path]:
        import torch

        trained = _section(about)
        kind = _kind(portable, trained)
        tensors = _tensors(kind, portable, trained)
        buffer = io.BytesIO()  # of a file torch writes the name into it
        torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, buffer)
        write_bytes(folder / WEIGHTS, buffer.getvalue())
        write_json(folder / CONFIG, _config(kind, portable, about, trained))
        return [folder / CONFIG, folder / WEIGHTS]

    def usage(self, release: Release, placed: Placed) -> str:
        return (
            "from dictionary_learning.utils import load_dictionary\n\n"
            f'ae, config = load_dictionary("{placed.folder}", device="cpu")  # from a copy of this folder\n'
        )


def _kind(portable: Portable, trained: dict[str, Any]) -> str:
    """Its class; the thresholds of batch_topk are one number, and its k must be known."""
    if portable.form != "jumprelu":
        return {"relu": "AutoEncoder", "gated": "GatedAutoEncoder", "topk": "AutoEncoderTopK"}[portable.form]
    assert portable.threshold is not None
    if "k" not in trained or not bool((portable.threshold == portable.threshold[0]).all()):
        return "JumpReluAutoEncoder"
    return "MatryoshkaBatchTopKSAE" if trained.get("prefixes") else "BatchTopKSAE"


def _section(about: About) -> dict[str, Any]:
    """The `saes` of the run's config at this site, as far as it decides here."""
    raw = yaml.safe_load(about.config) if about.config else {}
    saes = raw.get("saes") or {}
    saes = {**saes, **(saes.get("per_hook") or {}).get(about.site.key, {})}
    found = {name: saes[name] for name in ("k", "prefixes") if saes.get(name) is not None}
    return found if str(saes.get("sae_type", "")).endswith("batch_topk") else {}


def _tensors(kind: str, portable: Portable, trained: dict[str, Any]) -> dict[str, Any]:
    import torch

    if kind == "AutoEncoder":
        portable = portable.unit_rows()
    if kind == "JumpReluAutoEncoder":
        portable = _precisely_without_bias(portable)
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
        return {name: getattr(portable, name) for name in names}
    numbers: dict[str, Any] = {}
    if kind not in ("AutoEncoder", "GatedAutoEncoder"):
        k = portable.k if portable.k is not None else max(1, round(trained["k"]))
        threshold = -1.0 if portable.threshold is None else float(portable.threshold[0])
        numbers = {"k": torch.tensor(k, dtype=torch.int), "threshold": torch.tensor(threshold, dtype=torch.float32)}
    if kind == "MatryoshkaBatchTopKSAE":
        plain = {name: getattr(portable, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
        return {**numbers, "group_sizes": torch.tensor(_groups(portable, trained)), **plain}
    linear = {"encoder.weight": portable.W_enc.T, "decoder.weight": portable.W_dec.T}
    if kind == "GatedAutoEncoder":
        own = {"decoder_bias": portable.b_dec, "mag_bias": portable.b_enc}
        return {**linear, **own, "gate_bias": portable.b_gate, "r_mag": portable.r_mag}
    bias = "bias" if kind == "AutoEncoder" else "b_dec"
    return {**numbers, **linear, "encoder.bias": portable.b_enc, bias: portable.b_dec}


def _groups(portable: Portable, trained: dict[str, Any]) -> list[int]:
    from itertools import pairwise

    from saeopt.saes.prefixes import prefix_widths

    ends = prefix_widths(trained["prefixes"], portable.h) or (portable.h,)
    return [end - start for start, end in pairwise((0, *ends))]


def _precisely_without_bias(portable: Portable) -> Portable:
    """The bias taken into b_enc in float64: a large mean would cost digits."""
    from torch import Tensor

    given: dict[str, Any] = {f.name: getattr(portable, f.name) for f in fields(portable)}
    wide: dict[str, Any] = {name: value.double() for name, value in given.items() if isinstance(value, Tensor)}
    moved = replace(portable, **wide).without_bias_in_x()
    return replace(moved, **{name: getattr(moved, name).to(given[name].dtype) for name in wide})


def _config(kind: str, portable: Portable, about: About, trained: dict[str, Any]) -> dict[str, Any]:
    hook, layer = about.site.key, about.layer
    residual = layer is not None and hook == f"blocks.{layer}.hook_resid_post"
    trainer: dict[str, Any] = {
        "trainer_class": _TRAINERS[kind],
        "dict_class": kind,
        "activation_dim": portable.d,
        "dict_size": portable.h,
        "device": "cpu",
        "layer": layer,
        "lm_name": about.model,
        "submodule_name": f"resid_post_layer_{layer}" if residual else hook,
        "seed": about.seed,
        "wandb_name": about.name,
    }
    if "TopK" in kind:
        trainer["k"] = portable.k if portable.k is not None else max(1, round(trained["k"]))
    if kind == "MatryoshkaBatchTopKSAE":
        trainer["group_sizes"] = _groups(portable, trained)
    if kind == "AutoEncoder" and not portable.subtracts_bias:
        raise UserError(f"{hook}: a relu SAE that reads x without b_dec is no AutoEncoder of dictionary-learning")
    return {"trainer": trainer, "buffer": {"d_submodule": portable.d, "io": "out", "ctx_len": about.context_size}}
