"""An SAE of another tool as one of ours: what a reader gives, and how it becomes an SAE or a member's weights.

Shape suffixes: d width read, e width written, h dictionary width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saeopt.config.run import NEWEST_RECIPE
from saeopt.config.sites import Site
from saeopt.console import log
from saeopt.errors import UserError
from saeopt.saes.base import SAE, Widths, where
from saeopt.saes.origin import Origin
from saeopt.saes.registry import get_sae

if TYPE_CHECKING:
    from saeopt.saes.portable import Portable

_OF_TRAINING = ("tokens_since_fired", "scale", "scale_written")
_THRESHOLDED = ("batch_topk", "matryoshka_batch_topk")


@contextmanager
def foreign(where: str) -> Iterator[None]:
    """Files of others may hold anything: whatever is done with what they say ends in one line that names them.

    Raises:
        UserError: what they say cannot be used.
    """
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{where}: is not as its tool writes it: {' '.join(what.split())[:200]}") from None


@dataclass(frozen=True)
class Imported:
    """Weights that read and give raw activations, under the names of one of our architectures."""

    sae_type: str
    tensors: Mapping[str, Tensor]
    transcodes: bool = False
    """Whether it writes something else than it reads: b_dec is not taken from x then."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `saes` that its code depends on."""

    @property
    def d(self) -> int:
        """The width that is read."""
        return self.tensors["W_enc"].shape[0]

    @property
    def h(self) -> int:
        """The dictionary's width."""
        return self.tensors["W_enc"].shape[1]

    @property
    def e(self) -> int:
        """The width that is written."""
        return self.tensors["W_dec"].shape[1]

    @property
    def shape(self) -> str:
        """For people."""
        widths = f"widths read {self.d}, written {self.e}" if self.transcodes else f"d={self.d}"
        return f"{widths}, h={self.h}"

    def sae(self, key: str, site: Site | None, device: torch.device | str = "cpu") -> SAE:
        """An SAE of its own, which does not normalise; `site` None: the files do not tell it."""
        cls = get_sae(self.sae_type)
        position: Any = key
        if self.transcodes:
            read, write = (site.reads, site.writes) if site is not None else (("read",), ("written",))
            position = {"read": list(read), "write": list(write), "name": key}
            if site is not None and key == Site(site.reads, site.writes, "").key:
                del position["name"]
        config = cls.Config.model_validate(
            {
                "sae_type": self.sae_type,
                "sae_positions": [position],
                "dict_size_to_input_ratio": self.h / self.d,
                "normalize_activations": False,
                "decoder_norm": "free",
                **{name: value for name, value in self.fields.items() if name in cls.Config.model_fields},
            }
        )
        widths = Widths((self.d,), (self.e,), False) if self.transcodes else None
        sae = cls(self.d, self.h, config, recipe=NEWEST_RECIPE, dtype=self.tensors["W_enc"].dtype, **where(widths))
        if "row_norm" in self.tensors:  # where whitening was folded in, one number became one for each row
            sae.register_buffer("row_norm", torch.ones_like(self.tensors["row_norm"]))
        self._copy_to(sae, self.tensors)
        sae.origin = None if site is None else Origin(config.site(key))
        return sae.to(device).requires_grad_(False)

    def put_into(self, own: SAE, source: str) -> None:
        """Become the weights of an SAE that the config made; it must not normalise yet.

        Raises:
            UserError: it is of another architecture or shape, or, where it is kept as it is, has other fields.
        """
        tensors = self._as(own.config.sae_type)
        widths = Widths((self.d,), (self.e,), False) if self.transcodes else None
        if tensors is None or (self.d, self.h, widths) != (own.d, own.h, own.widths):
            ratio = f"{self.h / self.d:.10g}"
            raise UserError(
                f"{source}: holds a {self.sae_type} {'transcoder' if self.transcodes else 'SAE'} with {self.shape}: set"
                f" saes.sae_type: {self.sae_type} and saes.dict_size_to_input_ratio: {ratio} (the config asks for"
                f" {own.config.sae_type} with {shape_of(own)})"
            )
        told = own.config.model_dump(mode="json")
        fields = json.loads(json.dumps(dict(self.fields)))
        odd = [n for n, t in own.named_buffers(recurse=False) if n in tensors and tensors[n].shape not in (t.shape, ())]
        if odd:
            raise UserError(f"{source}: '{odd[0]}' has a number for each latent, which only 'saeopt.load' can hold")
        differ = {name: value for name, value in fields.items() if name in told and told[name] != value}
        if differ:
            wanted = ", ".join(f"saes.{name}: {value}" for name, value in differ.items())
            if not own.config.retrain_saes:
                raise UserError(f"{source}: was saved with {wanted}: set it, or its code would be another one")
            log.warning("%s: was saved with %s; it is trained on with the config's", source, wanted)
        self._copy_to(own, tensors)

    def _as(self, sae_type: str) -> Mapping[str, Tensor] | None:
        """Its tensors under an architecture that has the same code; None where that has not."""
        if sae_type == self.sae_type:
            return self.tensors
        tensors = dict(self.tensors)
        if self.sae_type == "relu" and sae_type in ("jumprelu", *_THRESHOLDED):
            tensors["threshold"] = torch.zeros_like(tensors["b_enc"])
        elif self.sae_type != "jumprelu" or sae_type not in _THRESHOLDED:
            return None
        if sae_type in _THRESHOLDED:
            values = tensors["threshold"].unique()
            if len(values) > 1:
                return None
            tensors["threshold"] = values[0]
        return tensors

    @staticmethod
    @torch.no_grad()
    def _copy_to(sae: SAE, tensors: Mapping[str, Tensor]) -> None:
        known = dict(sae.named_parameters()) | dict(sae.named_buffers())
        for name, tensor in tensors.items():
            if name in known and name not in _OF_TRAINING:
                known[name].copy_(tensor)


@dataclass(frozen=True)
class Held:
    """An SAE among files, before its weights are read."""

    key: str
    """Its site's key where the files tell it, else what they call it."""
    site: Site | None
    path: str
    """The file of its weights, for messages."""
    read: Callable[[], tuple[Imported, Path]]
    """See :meth:`weights`."""

    def weights(self) -> tuple[Imported, Path]:
        """Its weights, and the file that they were read from.

        Raises:
            UserError: they cannot be read, or no architecture here has their code.
        """
        with foreign(self.path):
            return self.read()

    def sae(self, device: torch.device | str = "cpu") -> SAE:
        """An SAE of its own.

        Raises:
            UserError: as :meth:`weights`.
        """
        with foreign(self.path):
            return self.weights()[0].sae(self.key, self.site, device)

    def at(self, key: str) -> Held:
        """The same, whatever its files say, at this site."""
        return replace(self, key=key)


def from_portable(portable: Portable, *, transcodes: bool = False, **fields: Any) -> Imported:
    """The architecture that has this code: relu, gated, topk or jumprelu.

    Raises:
        UserError: it has a skip connection.
    """
    if portable.W_skip is not None:
        raise UserError("has a skip connection (W_skip), which no architecture here has")
    portable = portable.without_bias_in_x() if transcodes else portable.with_bias_in_x()
    tensors = {"W_enc": portable.W_enc, "W_dec": portable.W_dec, "b_dec": portable.b_dec}
    if portable.form == "gated":
        assert portable.b_gate is not None
        assert portable.r_mag is not None
        tensors |= {"b_mag": portable.b_enc, "b_gate": portable.b_gate, "r_mag": portable.r_mag}
    else:
        tensors["b_enc"] = portable.b_enc
    if portable.form == "jumprelu":
        assert portable.threshold is not None
        tensors["threshold"] = portable.threshold.clamp_min(0)
    if portable.form == "topk":
        assert portable.k is not None
        if portable.k < 1:
            raise UserError(f"k is {portable.k}: must be 1 or more")
        fields["k"] = min(portable.k, portable.h)
    return Imported(portable.form, {n: t.detach().contiguous() for n, t in tensors.items()}, transcodes, fields)


def shape_of(sae: SAE) -> str:
    """An SAE's widths, for people."""
    if sae.widths is None:
        return f"d={sae.d}, h={sae.h}"
    read, written = ("+".join(map(str, widths)) for widths in sae.widths[:2])
    return f"widths read {read}, written {written}, h={sae.h}"
