"""What a foreign format is, and which there are. Importing this imports no torch.

A format is one file here and one line in `FORMATS`. It gets an SAE's evaluation form in raw units
(:class:`saeopt.saes.portable.Portable`) and says for itself what it cannot say exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from saeopt import __version__
from saeopt.config.base import nearest
from saeopt.config.sites import Site
from saeopt.errors import UserError

if TYPE_CHECKING:
    from saeopt.saes.base import SAE
    from saeopt.saes.portable import Portable

FORMATS = {
    "sae-lens": "saeopt.exports.sae_lens:SAELens",
    "dictionary-learning": "saeopt.exports.dictionary_learning:DictionaryLearning",
    "sparsify": "saeopt.exports.sparsify:Sparsify",
    "circuit-tracer": "saeopt.exports.circuit_tracer:CircuitTracer",
    "safetensors": "saeopt.exports.plain:Plain",
}
"""Name → `module:class`. In the order in which one is named where another one is refused; the last takes all."""

REPO = "OWNER/NAME"
"""Stands in text files for the repository on the hub, until they are pushed to one."""
_UNFIT = re.compile(r"[^A-Za-z0-9._+-]")
_LAYER = re.compile(r"^blocks\.(\d+)\.")


@dataclass(frozen=True)
class About:
    """What is known of an SAE besides its weights. What a bare SAE does not tell is None or empty."""

    site: Site
    model: str | None = None
    """The language model's name, as TransformerLens and the hub know it, or a folder's name."""
    hub_model: str | None = None
    """The same where it is a name on the hub."""
    tokenizer: str | None = None
    """None: the model's own."""
    dataset: str | None = None
    """A name on the hub, or a file's or folder's name."""
    hub_dataset: str | None = None
    """The same where it is a name on the hub, of what was trained on."""
    context_size: int | None = None
    prepend_bos: bool | None = None
    masks_special_tokens: bool | None = None
    """Whether special tokens were left out of training and metrics."""
    skip_first_positions: int = 0
    """Positions at the start of every sample that were left out."""
    compatibility: bool = False
    """Whether the language model's weights were folded and centred (`lm_processing: compatibility`)."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the evaluation of these weights; names as in `saeopt.metrics`."""
    config: str | None = None
    """The run's config as YAML."""
    command: str | None = None
    """What makes it again from this config."""
    exported_by: str | None = None
    """What wrote these files."""
    name: str | None = None
    """The run, or the study and its trial."""
    trial: int | None = None
    seed: int | None = None
    samples: int | None = None
    """Samples of the checkpoint; None where none were trained on."""
    kept: bool = False
    """Whether the run took the weights over and only evaluated them (`saes.retrain_saes: false`)."""
    architecture: str | None = None
    """`saes.sae_type` of the training."""
    normalised_by: str | None = None
    """What was folded in: none, scale, mean_scale or whiten."""
    latents: int | None = None
    unit_decoder: bool = False
    """Whether decoder rows were made 1 long."""
    license: str | None = None
    version: str = __version__
    """saeopt's."""

    @property
    def layer(self) -> int | None:
        """The block of what is written; None outside blocks, and where several are written."""
        found = {m[1] if (m := _LAYER.match(hook)) else None for hook in self.site.writes}
        only = next(iter(found)) if len(found) == 1 else None
        return None if only is None else int(only)


@dataclass(frozen=True)
class Placed:
    """An SAE of a set: what is known of it, and its folder below the set's (`.`: the set's own)."""

    about: About
    folder: str


@dataclass(frozen=True)
class Release:
    """A set of SAEs that leaves as one."""

    name: str
    placed: tuple[Placed, ...]


class Format(Protocol):
    """A foreign format. Subclasses inherit what has a body."""

    name: str
    library: str | None = None
    """What the hub calls the library that loads it (`library_name` of a model card)."""
    unit_rows: frozenset[str] = frozenset()
    """Architectures that it has with decoder rows of norm 1 alone; they leave so."""

    def problem(self, portable: Portable, site: Site) -> str | None:
        """Why this format cannot say the SAE exactly, in words that follow `sae-lens:`; None where it can."""
        ...

    def write(self, portable: Portable, about: About, folder: Path) -> list[Path]:
        """Write one SAE's files into a folder that is there, and give their paths."""
        ...

    def write_whole(self, sae: SAE, about: About, folder: Path) -> list[Path] | None:
        """Write an SAE whose code no other tool has; None where that cannot be."""
        return None

    def place(self, about: About, alone: bool) -> str:
        """The SAE's folder within a set, `.` where all share one; `alone`: the only one of its site."""
        site = _UNFIT.sub("_", about.site.key.replace("->", "-to-"))
        return site if alone or about.trial is None else f"{site}/trial-{about.trial}"

    def set_problem(self, release: Release) -> str | None:
        """Why these SAEs, which this format can say one by one, are not a set of its; None where they are."""
        return None

    def usage(self, release: Release, placed: Placed) -> str:
        """The lines of Python that load an SAE, for its model card."""
        return ""

    def finish(self, release: Release, folder: Path) -> list[Path]:
        """Write what a set has beside its SAEs, once these are there."""
        return []


def get_format(name: str) -> Format:
    """The format of a name.

    Raises:
        UserError: there is none.
    """
    if name not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"--to {name}: no such format{nearest(name, list(FORMATS))} (known: {known})")
    module, _, attribute = FORMATS[name].partition(":")
    return cast(Format, getattr(import_module(module), attribute)())


def nearest_format(portable: Portable | None, site: Site) -> str:
    """The first format that says an SAE exactly; `portable` None: one whose code no other tool has."""
    *others, last = FORMATS
    for name in others if portable is not None else []:
        if portable is not None and get_format(name).problem(portable, site) is None:
            return name
    return last
