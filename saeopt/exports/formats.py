"""What a foreign format is, and which there are. Importing this imports no torch.

A format is one file here and one line in `FORMATS`. It gets an SAE's evaluation form in raw units
(:class:`saeopt.saes.portable.Portable`) and says for itself what it cannot say exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
    "safetensors": "saeopt.exports.plain:Plain",
}
"""Name → `module:class`. In the order in which one is named where another one is refused; the last takes all."""

_LAYER = re.compile(r"^blocks\.(\d+)\.")


@dataclass(frozen=True)
class About:
    """What is known of an SAE besides its weights. What a bare SAE does not tell is None or empty."""

    site: Site
    model: str | None = None
    """The language model's name, as TransformerLens and the hub know it, or a folder's name."""
    tokenizer: str | None = None
    """None: the model's own."""
    dataset: str | None = None
    context_size: int | None = None
    prepend_bos: bool | None = None
    masks_special_tokens: bool | None = None
    """Whether special tokens were left out of training and metrics."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the evaluation of these weights; names as in `saeopt.metrics`."""
    config: str | None = None
    """The run's config as YAML."""
    command: str | None = None
    """What made it."""
    name: str | None = None
    """The run or `STUDY #TRIAL`."""
    trial: int | None = None
    seed: int | None = None
    samples: int | None = None
    """Samples of the checkpoint."""
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


class Format(Protocol):
    """A foreign format. Subclasses inherit `place` and `finish`."""

    name: str

    def problem(self, portable: Portable, site: Site) -> str | None:
        """Why this format cannot say the SAE exactly, in words that follow `sae-lens: `; None where it can."""
        ...

    def write(self, portable: Portable, about: About, folder: Path) -> list[Path]:
        """Write one SAE's files into a folder that is there, and give their paths."""
        ...

    def place(self, about: About, alone: bool) -> str:
        """The SAE's folder within a set, `.` where all share one; `alone`: the only one of its site."""
        return about.site.file_name if alone or about.trial is None else f"{about.site.file_name}/trial-{about.trial}"

    def set_problem(self, placed: Sequence[Placed]) -> str | None:
        """Why these SAEs, which this format can say one by one, are not a set of its; None where they are."""
        return None

    def finish(self, placed: Sequence[Placed], folder: Path) -> list[Path]:
        """Write what a set has beside its SAEs, once these are there."""
        return []


class WholeFormat(Format, Protocol):
    """A format that takes any SAE as it is, also one whose code no other tool has."""

    def write_whole(self, sae: SAE, about: About, folder: Path) -> list[Path]:
        """Write one SAE's files: the folded weights."""
        ...


class Readable(Protocol):
    """A format whose files are read as well."""

    def read(self, folder: Path) -> dict[str, tuple[Portable, ...]]:
        """Hook point (or site) → the SAEs that a folder of this format holds for it.

        Raises:
            UserError: no such files, damaged ones, or ones that say something this system has not.
        """
        ...


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
