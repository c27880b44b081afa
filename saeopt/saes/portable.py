"""An SAE's evaluation form as plain tensors in raw units: what leaves for other tools, and what comes from them.

Shape suffixes: d width read, e width written, h dictionary width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from saeopt.errors import UserError
from saeopt.saes.base import SAE

CodeForm = Literal["relu", "gated", "topk", "jumprelu"]


@dataclass(frozen=True)
class Portable:
    """x̂ = f W_dec + b_dec (+ x W_skip), with π = x̄ W_enc + b_enc and x̄ = x − b_dec where `subtracts_bias`, else x.

    f by `form`: `relu`: relu(π); `topk`: the k largest of relu(π); `jumprelu`: π where π > `threshold`, compared
    strictly and in the units of π; `gated`: relu(e^{r_mag} ⊙ (x̄ W_enc) + b_enc) where x̄ W_enc + b_gate > 0.
    """

    form: CodeForm
    W_enc: Tensor
    """d × h."""
    b_enc: Tensor
    """h; of `gated` the magnitude's bias."""
    W_dec: Tensor
    """h × e."""
    b_dec: Tensor
    """Of length e."""
    subtracts_bias: bool
    k: int | None = None
    threshold: Tensor | None = None
    """h, ≥ 0."""
    b_gate: Tensor | None = None
    r_mag: Tensor | None = None
    W_skip: Tensor | None = None
    """d × e; a linear way past the code (skip transcoders)."""
    trained_as: str = ""
    """The architecture of the training, as `saes.sae_type` names it."""
    normalised_by: str = "none"

    @property
    def d(self) -> int:
        """The width that is read."""
        return self.W_enc.shape[0]

    @property
    def h(self) -> int:
        """The dictionary's width."""
        return self.W_enc.shape[1]

    @property
    def e(self) -> int:
        """The width that is written."""
        return self.W_dec.shape[1]

    def encode(self, x_Nd: Tensor) -> Tensor:
        """The code f (N, h) of raw activations (N, d)."""
        shared_Nh = (x_Nd - self.b_dec if self.subtracts_bias else x_Nd) @ self.W_enc
        if self.form == "gated":
            assert self.b_gate is not None
            assert self.r_mag is not None
            return torch.relu(self.r_mag.exp() * shared_Nh + self.b_enc) * (shared_Nh + self.b_gate > 0)
        acts_Nh = torch.relu(shared_Nh + self.b_enc)
        if self.form == "topk":
            assert self.k is not None
            kept = acts_Nh.topk(min(self.k, self.h), dim=-1)
            return torch.zeros_like(acts_Nh).scatter(-1, kept.indices, kept.values)
        return acts_Nh if self.threshold is None else acts_Nh * (acts_Nh > self.threshold)

    def decode(self, f_Nh: Tensor, x_Nd: Tensor | None = None) -> Tensor:
        """What is given (N, e), raw; x is what was read, needed with `W_skip`."""
        y_Ne = f_Nh @ self.W_dec + self.b_dec
        if self.W_skip is None:
            return y_Ne
        if x_Nd is None:
            raise ValueError("a skip transcoder needs what it reads, besides its code")
        return y_Ne + x_Nd @ self.W_skip

    @property
    def selection_holds(self) -> bool:
        """Whether the rows may be made 1 long (they are equally long, or the code does not choose between latents)."""
        norm_h = self.W_dec.norm(dim=-1)
        return self.form != "topk" or bool(torch.allclose(norm_h, norm_h.mean(), rtol=1e-4))

    def unit_rows(self) -> Self:
        """The same map with decoder rows of norm 1 and a code longer by as much; a row of 0 stays as it is.

        Exact for all forms but a `topk` whose rows differ in length (`selection_holds`).
        """
        norm_h = self.W_dec.norm(dim=-1)
        norm_h = torch.where(norm_h > 0, norm_h, 1.0)
        longer: dict[str, Any] = {
            name: vector * norm_h
            for name in ("b_enc", "threshold", "b_gate")
            if (vector := getattr(self, name)) is not None
        }
        return replace(self, W_enc=self.W_enc * norm_h, W_dec=self.W_dec / norm_h.unsqueeze(-1), **longer)

    def without_bias_in_x(self) -> Self:
        """The same map that reads x itself: b_enc takes b_dec in."""
        return self._moved(-1.0) if self.subtracts_bias else self

    def with_bias_in_x(self) -> Self:
        """The same map that takes b_dec from x, as our autoencoders do."""
        return self if self.subtracts_bias else self._moved(1.0)

    def _moved(self, sign: float) -> Self:
        """b_dec W_enc times `sign` added to what is compared with, in float64."""
        moved_h = sign * (self.b_dec.double() @ self.W_enc.double())
        stretched_h = moved_h if self.r_mag is None else self.r_mag.double().exp() * moved_h
        biases = {"b_enc": (self.b_enc, stretched_h), "b_gate": (self.b_gate, moved_h)}
        changed: dict[str, Any] = {n: (b + more).to(b.dtype) for n, (b, more) in biases.items() if b is not None}
        return replace(self, subtracts_bias=not self.subtracts_bias, **changed)


@torch.no_grad()
def portable(sae: SAE) -> Portable:
    """The evaluation form of an SAE that was loaded or trained, in raw units; its code is that of `sae.encode`.

    Raises:
        UserError: no other tool has such a code.
    """
    if sae.unit_lengths is not None:
        raise UserError("this SAE was given by unit_decoder(): take the SAE that was loaded, with unit_decoder=True")
    folded = sae.folded()
    form = folded.evaluation_form()
    if isinstance(form, str):
        raise UserError(form)
    fields: dict[str, Any] = {"W_enc": folded.W_enc, "W_dec": folded.decoder_rows(), "b_dec": folded.b_dec, **form}
    cloned: dict[str, Any] = {n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in fields.items()}
    return Portable(
        **cloned,
        subtracts_bias=sae.widths is None,
        trained_as=sae.config.sae_type,
        normalised_by=sae.normalisation,
    )
