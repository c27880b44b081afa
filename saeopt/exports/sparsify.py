"""sparsify 1.3 (EleutherAI): `cfg.json` and `sae.safetensors`, a folder per hook point; topk alone.

`layers.N` is its name for what block N gives; other hook points keep theirs, since `SparseCoder.load_many` gives SAEs
under the folders' names.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from saeopt.config.sites import Site
from saeopt.exports.files import save_tensors
from saeopt.exports.formats import REPO, About, Format, Placed, Release
from saeopt.files import write_json

if TYPE_CHECKING:
    from saeopt.saes.portable import Portable

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


class Sparsify(Format):
    """A topk SAE, or a topk transcoder whose hook points are equally wide."""

    name = "sparsify"
    library = "sparsify"

    def problem(self, portable: Portable, site: Site) -> str | None:
        if len(site.reads) > 1 or len(site.writes) > 1:
            return "it has no SAE over several hook points"
        if portable.form != "topk":
            return f"it has topk alone, and no {portable.trained_as or portable.form}"
        if portable.d != portable.e:
            return f"it writes as wide as it reads ({portable.d}, and not {portable.e})"
        if site.one and not portable.subtracts_bias:
            return "its SAEs take b_dec from x"
        return None

    def write(self, portable: Portable, about: About, folder: Path) -> list[Path]:
        if not about.site.one:
            portable = portable.without_bias_in_x()
        site = about.site
        config = {
            "activation": "topk",
            "expansion_factor": max(1, portable.h // portable.d),
            "normalize_decoder": False,  # of training alone
            "num_latents": portable.h,
            "k": portable.k,
            "multi_topk": False,
            "skip_connection": portable.W_skip is not None,
            "transcode": not site.one,
            "d_in": portable.d,
            "saeopt_site": {"reads": list(site.reads), "writes": list(site.writes), "key": site.key},
            "model": about.model,
        }
        write_json(folder / CONFIG, config)
        tensors = {
            "encoder.weight": portable.W_enc.T,
            "encoder.bias": portable.b_enc,
            "W_dec": portable.W_dec,
            "b_dec": portable.b_dec,
            "W_skip": None if portable.W_skip is None else portable.W_skip.T,
        }
        return [folder / CONFIG, save_tensors(folder / WEIGHTS, tensors)]

    def place(self, about: About, alone: bool) -> str:
        found = super().place(about, alone)
        residual = f"blocks.{about.layer}.hook_resid_post"
        return found.replace(residual, f"layers.{about.layer}", 1) if about.site.key == residual else found

    def usage(self, release: Release, placed: Placed) -> str:
        return (
            "from sparsify import SparseCoder\n\n"
            f'sae = SparseCoder.load_from_hub("{REPO}", hookpoint="{placed.folder}")\n'
            f'sae = SparseCoder.load_from_disk("{placed.folder}")  # from a copy of this folder\n'
        )
