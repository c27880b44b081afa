"""SAELens: `cfg.json` and `sae_weights.safetensors` per SAE, a folder per SAE, and the entry for its table of SAEs.

Written as sae-lens 6.54 reads it. Its loader does nothing for scales and whitening, so that everything is folded; it
takes missing keys for defaults of its own, so that every key that decides something is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from saeopt.config.sites import Site
from saeopt.exports.files import save_tensors
from saeopt.exports.formats import REPO, About, Format, Placed, Release
from saeopt.files import write_json, write_text
from saeopt.metrics import value_of

if TYPE_CHECKING:
    from torch import Tensor

    from saeopt.saes.portable import Portable

CONFIG, WEIGHTS, TABLE = "cfg.json", "sae_weights.safetensors", "pretrained_saes.yaml"
VERSION = "6.54.12"
"""Of the layout. A config without a version of 6 loses its hook point, and its architecture becomes `standard`."""
_AUTOENCODERS = {"relu": "standard", "gated": "gated", "topk": "topk", "jumprelu": "jumprelu"}
_TRANSCODERS = {"relu": "transcoder", "jumprelu": "jumprelu_transcoder"}
_SKIPPING = {"relu": "skip_transcoder", "jumprelu": "jumprelu_skip_transcoder"}
_COMPATIBILITY = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
"""What its loader of models does for `lm_processing: compatibility`; by itself it leaves weights as they are."""
_HEADS = "_z"
"""Hook points whose activations have an axis of heads there; here the heads lie side by side."""


class SAELens(Format):
    """An SAE of one hook point, or a transcoder from one to another."""

    name = "sae-lens"
    library = "saelens"

    def problem(self, portable: Portable, site: Site) -> str | None:
        if len(site.reads) > 1 or len(site.writes) > 1:
            return "it has no SAE over several hook points"
        if site.one:
            return None if portable.W_skip is None else "it has no autoencoder with W_skip"
        if portable.form not in _TRANSCODERS:
            return f"it has no {portable.trained_as or portable.form} transcoder"
        if any(hook.endswith(_HEADS) for hook in site.hooks):
            return "its transcoders do not lay heads side by side (hook_z)"
        return None

    def write(self, portable: Portable, about: About, folder: Path) -> list[Path]:
        if not about.site.one:
            portable = portable.without_bias_in_x()
        write_json(folder / CONFIG, _config(portable, about))
        return [folder / CONFIG, save_tensors(folder / WEIGHTS, _tensors(portable))]

    def usage(self, release: Release, placed: Placed) -> str:
        return (
            "from sae_lens import SAE\n\n"
            f'sae = SAE.from_pretrained("{REPO}", "{placed.folder}")  # from the hub\n'
            f'sae = SAE.load_from_disk("{placed.folder}")  # from a copy of this folder\n'
        )

    def finish(self, release: Release, folder: Path) -> list[Path]:
        """The entry for `sae_lens/pretrained_saes.yaml`: with it the release's name loads its SAEs."""
        entry = {
            "conversion_func": None,
            "model": next((p.about.model for p in release.placed if p.about.model), None),
            "repo_id": REPO,
            "saes": [_row(placed) for placed in release.placed],
        }
        write_text(folder / TABLE, yaml.safe_dump({release.name: entry}, sort_keys=False, allow_unicode=True))
        return [folder / TABLE]


def _row(placed: Placed) -> dict[str, Any]:
    found = {"l0": value_of(placed.about.metrics, "l0"), "variance_explained": None}
    if placed.about.site.one:
        found["variance_explained"] = value_of(placed.about.metrics, "explained_variance")
    return {"id": placed.folder, "path": placed.folder, **{k: round(v, 4) for k, v in found.items() if v is not None}}


def _tensors(portable: Portable) -> dict[str, Tensor | None]:
    shared = {"W_enc": portable.W_enc, "W_dec": portable.W_dec, "b_dec": portable.b_dec}
    if portable.form == "gated":
        return {**shared, "b_mag": portable.b_enc, "b_gate": portable.b_gate, "r_mag": portable.r_mag}
    skip = None if portable.W_skip is None else portable.W_skip.T
    return {**shared, "b_enc": portable.b_enc, "threshold": portable.threshold, "W_skip": skip}


def _config(portable: Portable, about: About) -> dict[str, Any]:
    site = about.site
    own: dict[str, Any] = {}
    if site.one:
        architecture = _AUTOENCODERS[portable.form]
    else:
        architecture = (_TRANSCODERS if portable.W_skip is None else _SKIPPING)[portable.form]
        own["d_out"] = portable.e
    if portable.form == "topk":
        own |= {"k": portable.k, "rescale_acts_by_decoder_norm": False}  # with it both selection and code would change
    return {
        "architecture": architecture,
        "d_in": portable.d,
        "d_sae": portable.h,
        **own,
        "dtype": str(portable.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": portable.subtracts_bias,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if site.one and site.key.endswith(_HEADS) else "none",
        "metadata": _metadata(portable, about),
    }


def _metadata(portable: Portable, about: About) -> dict[str, Any]:
    """What it knows besides the weights; keys as its own configs have them."""
    site = about.site
    return {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": about.model,
        "model_class_name": "HookedTransformer",
        "model_from_pretrained_kwargs": dict.fromkeys(_COMPATIBILITY, True) if about.compatibility else {},
        "hook_name": site.reads[0],
        **({} if site.one else {"hook_name_out": site.writes[0]}),
        "hook_head_index": None,
        "context_size": about.context_size,
        "seqpos_slice": [about.skip_first_positions, None] if about.skip_first_positions else [None],
        "prepend_bos": about.prepend_bos,
        "exclude_special_tokens": about.masks_special_tokens,
        "dataset_path": about.dataset,
        "training_architecture": portable.trained_as,
        "saeopt_version": about.version,
    }
