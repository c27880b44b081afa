"""The gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator
from torch import Tensor, nn

from saeopt.config.base import Weight
from saeopt.config.marks import Stack
from saeopt.config.saes import FirstCoeff, SAEConfig
from saeopt.saes.auxk import Revival, RevivalConfig, softened
from saeopt.saes.base import Forward, StepInputs
from saeopt.saes.init import point

MAGNITUDES = {"relu": torch.relu, "softplus": nn.functional.softplus, "identity": lambda m_Nh: m_Nh}


class MagnitudeConfig(RevivalConfig):
    """Fields of the architectures that compute a magnitude apart from a gate."""

    magnitude_activation: Stack[Literal["relu", "softplus", "identity"]] = "relu"
    """What the magnitude passes through; null means `identity`."""

    @field_validator("magnitude_activation", mode="before")
    @classmethod
    def _null_is_identity(cls, value: object) -> object:
        return "identity" if value is None else value


class GatedConfig(MagnitudeConfig):
    """`sae_type: gated`."""

    first_coeff: ClassVar[FirstCoeff | None] = FirstCoeff(0.45, 0.7, 0.45)

    aux_coeff: Stack[Weight] = 1.0
    """α, the weight of the auxiliary reconstruction by the gate alone (1 in the paper)."""


class GatedSAE(Revival):
    """f = 1[π_gate > 0] ⊙ relu(e^{r_mag} ⊙ (x̄ W_enc) + b_mag), π_gate = x̄ W_enc + b_gate, x̄ = x − b_dec.

    Loss = mean ‖x − x̂‖² + λ mean Σ relu(π_gate) ‖W_dec‖ + α mean ‖x − (relu(π_gate) sg[W_dec] + sg[b_dec])‖²,
    sg = stop gradient. The step function gives no gradient: the gate learns from the penalty and the auxiliary
    term only. As in the paper the decoder rows are kept at norm 1, and b_dec in x̄ is the decoder's, frozen in the
    auxiliary term's decoder alone. Deviations, by hand: `magnitude_activation` other than relu, `mse_coeff`, and
    `decoder_norm: free`, where the norm stands in the penalty and nothing in the auxiliary term is frozen (sae-lens'
    form: free rows beside a frozen copy would shrink while r_mag makes up for it, and the penalty would fall for
    nothing; recipe 1 has just that). Under `legacy_scaling` both squared errors are divided by d, the penalty is not.
    """

    Config: ClassVar[type[SAEConfig]] = GatedConfig
    default_decoder_norm: ClassVar[str] = "unit"
    default_transcoder_norm: ClassVar[str] = "unit"
    latent_vectors: ClassVar[tuple[str, ...]] = ("b_gate", "b_mag", "r_mag")
    config: GatedConfig
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter

    @property
    def frozen_aux(self) -> bool:
        """Whether the auxiliary term takes the decoder as it is."""
        return self.unit_rows or self.recipe == 1

    def code(self, x_Nd: Tensor) -> Tensor:
        """1[π_gate > 0] ⊙ magnitude."""
        return self.gate_and_code(x_Nd)[1]

    def gate_and_code(self, x_Nd: Tensor) -> tuple[Tensor, Tensor]:
        """π_gate and f."""
        shared_Nh = self.centred(x_Nd) @ self.W_enc
        gate_Nh = shared_Nh + self.b_gate
        pre_Nh = self.before_activation(self.r_mag.exp() * shared_Nh + self.b_mag)
        return gate_Nh, MAGNITUDES[self.config.magnitude_activation](pre_Nh) * (gate_Nh > 0)

    @torch.no_grad()
    def restart(self, dead_n: Tensor, alive_h: Tensor, along_nd: Tensor, opens_at_n: Tensor) -> None:
        """As in the base, for gate and magnitude."""
        length = point(self.W_enc, dead_n, alive_h, along_nd, self.restart_share)
        self.b_gate[dead_n] = self.b_mag[dead_n] = -length * opens_at_n

    @torch.no_grad()
    def shift_code(self, shift_d: Tensor) -> None:
        """As in the base; both halves see the same product."""
        shared_h = shift_d @ self.W_enc
        self.b_gate.add_(shared_h)
        self.b_mag.add_(self.r_mag.exp() * shared_h)

    def evaluation_form(self) -> dict[str, Any] | str:
        """Gate and magnitude; other tools know relu alone for the latter."""
        if self.config.magnitude_activation != "relu":
            return f"no format of other tools has 'magnitude_activation: {self.config.magnitude_activation}'"
        return {"form": "gated", "b_enc": self.b_mag, "b_gate": self.b_gate, "r_mag": self.r_mag}

    def training_forward(self, x_Nd: Tensor, y_Ne: Tensor, inputs: StepInputs) -> Forward:
        """Terms `mse`, `sparsity` and `aux`; with `auxk_coeff` the ratio `auxk`."""
        gate_Nh, f_Nh = self.gate_and_code(x_Nd)
        f_Nh, open_Nh = self.masked(f_Nh, inputs.keep_N), self.masked(torch.relu(gate_Nh), inputs.keep_N)
        x_hat_Nd = self.reconstruct(f_Nh)
        W_dec, b_dec = (self.W_dec.detach(), self.b_dec.detach()) if self.frozen_aux else (self.W_dec, self.b_dec)
        from_gate_Nd = open_Nh @ W_dec + b_dec
        forward = Forward(
            x_hat_Nd,
            f_Nh,
            {
                "mse": self.config.mse_coeff * self.squared_error(x_hat_Nd, y_Ne, inputs.keep_N),
                "sparsity": inputs.sparsity_coeff * (open_Nh * self.decoder_norm_h()).sum(),
                "aux": self.config.aux_coeff * self.squared_error(from_gate_Nd, y_Ne, inputs.keep_N),
            },
        )
        return self.revived(forward, y_Ne, softened(gate_Nh), inputs)
