"""`safetensors`: one plain file for programs of one's own, for any architecture (docs/export.md has the format).

Tensors are those of :class:`~saeopt.saes.portable.Portable`; of an SAE whose code no other tool has they are the
architecture's own, folded. What they mean stands as JSON in the file's one metadata key, `saeopt`.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeopt.config.sites import Site
from saeopt.exports.formats import About, Format, Placed, Release
from saeopt.runs.tensor_file import METADATA_KEY, write_tensors

if TYPE_CHECKING:
    from saeopt.saes.base import SAE
    from saeopt.saes.portable import Portable

FILE = "sae.safetensors"
LAYOUT = 1
"""Of the metadata: a higher one may say what this version does not know."""
OWN = "own"
"""The form of a code that no other tool has."""


class Plain(Format):
    """Takes everything."""

    name = "safetensors"

    def problem(self, portable: Portable, site: Site) -> str | None:
        return None

    def write(self, portable: Portable, about: About, folder: Path) -> list[Path]:
        from torch import Tensor

        found = {f.name: getattr(portable, f.name) for f in fields(portable)}
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in found.items() if value is not None and name not in tensors}
        return _write(folder, tensors, plain, about)

    def write_whole(self, sae: SAE, about: About, folder: Path) -> list[Path]:
        folded = sae.folded()
        left_out = {"tokens_since_fired", *(name for name, _ in folded.normalising())}  # these do nothing any more
        tensors = {name: tensor for name, tensor in folded.state_dict().items() if name not in left_out}
        told = {"form": OWN, "trained_as": sae.config.sae_type, "normalised_by": sae.normalisation}
        return _write(folder, tensors, {**told, "sae_config": sae.config.model_dump(mode="json")}, about)

    def usage(self, release: Release, placed: Placed) -> str:
        return (
            "import json\n\nfrom safetensors import safe_open\n\n"
            f'with safe_open("{placed.folder}/{FILE}", "pt") as file:\n'
            "    tensors = {name: file.get_tensor(name) for name in file.keys()}\n"
            f'    told = json.loads(file.metadata()["{METADATA_KEY}"])  # form, k, site, …\n'
        )


def _write(folder: Path, tensors: dict[str, Any], told: dict[str, Any], about: About) -> list[Path]:
    site = {"reads": about.site.reads, "writes": about.site.writes, "key": about.site.key}
    known = {"model": about.model, "context_size": about.context_size, "prepend_bos": about.prepend_bos}
    write_tensors(
        folder / FILE,
        tensors,
        {"layout": LAYOUT, **told, "site": site, **known, "metrics": about.metrics, "saeopt_version": about.version},
    )
    return [folder / FILE]
