"""The gated SAE with hard-concrete gates (SAE-Interpretability's; arXiv 2404.16014 and 1712.01312)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from saeopt.config.base import Weight
from saeopt.config.marks import Stack
from saeopt.config.saes import FirstCoeff, SAEConfig
from saeopt.saes.base import Forward, StepInputs
from saeopt.saes.gated import MAGNITUDES, GatedSAE
from saeopt.saes.hard_concrete import NoisyGateConfig, NoisyGateSAE
from saeopt.saes.init import point


class GatedHardConcreteConfig(NoisyGateConfig):
    """`sae_type: gated_hard_concrete`."""

    first_coeff: ClassVar[FirstCoeff | None] = FirstCoeff(0.095, 1.0, 0.75)

    aux_coeff: Stack[Weight] = 1.0
    """α, the weight of the auxiliary reconstruction by the gate alone."""
    aux_form: Stack[Literal["gated", "seed"]] = "gated"
    """What reconstructs in the auxiliary term: z ⊙ relu(log α), or z alone as in SAE-Interpretability."""


class GatedHardConcreteSAE(NoisyGateSAE):
    """f = z ⊙ relu(e^{r_mag} ⊙ (x̄ W_enc) + b_mag), log α = x̄ W_enc + b_gate, x̄ = x − b_dec.

    Loss = mean ‖x − x̂‖² + λ mean Σ P(z ≠ 0) + α mean ‖x − ((z ⊙ relu(log α)) sg[W_dec] + sg[b_dec])‖²,
    sg = stop gradient; `aux_form: seed` has z sg[W_dec] + sg[b_dec]. Under `legacy_scaling` every term is
    divided by d.
    """

    Config: ClassVar[type[SAEConfig]] = GatedHardConcreteConfig
    latent_vectors: ClassVar[tuple[str, ...]] = ("b_gate", "b_mag", "r_mag")
    config: GatedHardConcreteConfig
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter

    shift_code = GatedSAE.shift_code

    @torch.no_grad()
    def restart(self, dead_n: Tensor, alive_h: Tensor, along_nd: Tensor, opens_at_n: Tensor) -> None:
        """As in the base; the gate is as steep as the living ones, and r_mag makes the magnitude small."""
        length = point(self.W_enc, dead_n, alive_h, along_nd, 1.0)
        self.b_gate[dead_n] = -length * opens_at_n
        self.r_mag[dead_n] = self.r_mag[alive_h].mean().nan_to_num(0.0) + math.log(self.restart_share)

    def log_alpha_and_magnitude(self, x_Nd: Tensor) -> tuple[Tensor, Tensor]:
        """log α and the magnitude."""
        shared_Nh = self.centred(x_Nd) @ self.W_enc
        magnitude = MAGNITUDES[self.config.magnitude_activation]
        pre_Nh = self.before_activation(self.r_mag.exp() * shared_Nh + self.b_mag)
        return shared_Nh + self.b_gate, magnitude(pre_Nh)

    def code(self, x_Nd: Tensor) -> Tensor:
        """z ⊙ magnitude with the gate that `eval_gate` names."""
        log_alpha_Nh, magnitude_Nh = self.log_alpha_and_magnitude(x_Nd)
        return self.eval_gate(log_alpha_Nh) * magnitude_Nh

    def training_forward(self, x_Nd: Tensor, y_Ne: Tensor, inputs: StepInputs) -> Forward:
        """Terms `mse`, `sparsity` and `aux`; with `auxk_coeff` the ratio `auxk`."""
        log_alpha_Nh, magnitude_Nh = self.log_alpha_and_magnitude(x_Nd)
        z_Nh = self.train_gate(log_alpha_Nh, inputs)
        f_Nh = self.masked(z_Nh * magnitude_Nh, inputs.keep_N)
        x_hat_Nd = self.reconstruct(f_Nh)
        aux_Nh = z_Nh * torch.relu(log_alpha_Nh) if self.config.aux_form == "gated" else z_Nh
        from_gate_Nd = aux_Nh @ self.W_dec.detach() + self.b_dec.detach()
        forward = Forward(
            x_hat_Nd,
            f_Nh,
            {
                "mse": self.config.mse_coeff * self.squared_error(x_hat_Nd, y_Ne, inputs.keep_N),
                "sparsity": inputs.sparsity_coeff * self.penalty(log_alpha_Nh, inputs),
                "aux": self.config.aux_coeff * self.squared_error(from_gate_Nd, y_Ne, inputs.keep_N),
            },
            tallies=self.evaluated(log_alpha_Nh, magnitude_Nh, inputs),
        )
        return self.revived(forward, y_Ne, torch.sigmoid(log_alpha_Nh) * magnitude_Nh, inputs)
