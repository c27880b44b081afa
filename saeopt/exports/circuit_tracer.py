"""circuit-tracer 0.5: a set of transcoders, `config.yaml` and `layer_N.safetensors` for every layer from 0 on.

Encoders are stored transposed, and so is W_skip. It takes what has no threshold for relu, so that topk is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from saeopt.config.sites import Site
from saeopt.errors import UserError
from saeopt.exports.files import save_tensors
from saeopt.exports.formats import REPO, About, Format, Placed, Release
from saeopt.files import write_text

if TYPE_CHECKING:
    from saeopt.saes.portable import Portable

CONFIG = "config.yaml"
_IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


class CircuitTracer(Format):
    """A relu or JumpReLU transcoder of one block."""

    name = "circuit-tracer"
    library = "circuit-tracer"

    def problem(self, portable: Portable, site: Site) -> str | None:
        if site.one or len(site.reads) > 1 or len(site.writes) > 1:
            return "it has transcoders alone, from one hook point of a block to another"
        read, written = (_IN_BLOCK.fullmatch(hooks[0]) for hooks in (site.reads, site.writes))
        if read is None or written is None or read[1] != written[1]:
            return "its transcoders read and write the same block"
        if portable.form not in ("relu", "jumprelu"):
            return f"it has no {portable.trained_as or portable.form} transcoder"
        if portable.d != portable.e:
            return f"it writes as wide as it reads ({portable.d}, and not {portable.e})"
        return None

    def write(self, portable: Portable, about: About, folder: Path) -> list[Path]:
        portable = portable.without_bias_in_x()
        tensors = {
            "W_enc": portable.W_enc.T,
            "W_dec": portable.W_dec,
            "b_enc": portable.b_enc,
            "b_dec": portable.b_dec,
            "activation_function.threshold": portable.threshold,
            "W_skip": None if portable.W_skip is None else portable.W_skip.T,
        }
        return [save_tensors(folder / f"layer_{about.layer}.safetensors", tensors)]

    def place(self, about: About, alone: bool) -> str:
        return "."

    def set_problem(self, release: Release) -> str | None:
        layers = [placed.about.layer for placed in release.placed]
        if sorted(layers, key=str) != sorted(range(len(layers)), key=str):
            shown = ", ".join(map(str, sorted(layers, key=str)))
            return f"it needs one transcoder for every layer from 0 on (there are those of {shown})"
        if len({_hooks(placed.about) for placed in release.placed}) > 1:
            return "its transcoders read the same hook point of their block, and write the same"
        return None

    def usage(self, release: Release, placed: Placed) -> str:
        return (
            "from circuit_tracer.utils.hf_utils import load_transcoder_from_hub\n\n"
            f'transcoders, config = load_transcoder_from_hub("{REPO}")\n'
        )

    def finish(self, release: Release, folder: Path) -> list[Path]:
        """The set's config: which hook points, and of which model.

        Raises:
            UserError: the transcoders differ in size, or in having a skip connection.
        """
        from safetensors import safe_open

        shapes = set()
        for layer in range(len(release.placed)):
            with safe_open(folder / f"layer_{layer}.safetensors", "pt") as file:
                shapes.add((tuple(file.get_slice("W_enc").get_shape()), "W_skip" in set(file.keys())))
        if len(shapes) > 1:
            raise UserError("circuit-tracer: the transcoders of a set are equally large, with W_skip all or none")
        first = release.placed[0].about
        read, written = _hooks(first)
        config = {
            "model_name": first.hub_model or first.model,
            "model_kind": "transcoder_set",
            "feature_input_hook": read,
            "feature_output_hook": written,
            "scan": release.name,
        }
        write_text(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))
        return [folder / CONFIG]


def _hooks(about: About) -> tuple[str, str]:
    """Of a block, without its number."""
    found = [_IN_BLOCK.fullmatch(hooks[0]) for hooks in (about.site.reads, about.site.writes)]
    read, written = (match[2] if match else "" for match in found)
    return read, written
