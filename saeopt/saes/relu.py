"""The ReLU SAE with the L1 penalty (Anthropic, April 2024; Bricken et al. 2023)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from saeopt.config.saes import FirstCoeff, SAEConfig
from saeopt.saes.auxk import Revival, RevivalConfig, softened
from saeopt.saes.base import Forward, StepInputs
from saeopt.saes.prefixes import PrefixConfig, PrefixSAE


class ReluConfig(RevivalConfig, PrefixConfig):
    """`sae_type: relu`."""

    first_coeff: ClassVar[FirstCoeff | None] = FirstCoeff(0.38, 0.72, 0.5)


class ReluSAE(Revival, PrefixSAE):
    """f = relu(π); loss = mean ‖x − x̂‖² + λ mean Σ f ‖W_dec‖.

    `decoder_norm: unit` keeps the decoder rows at norm 1, the penalty is then λ mean Σ f.
    Under `legacy_scaling` both terms are divided by d. `prefixes`: the squared error is that of nested dictionaries.
    """

    Config: ClassVar[type[SAEConfig]] = ReluConfig
    config: ReluConfig

    def code(self, x_Nd: Tensor) -> Tensor:
        """relu(π)."""
        return torch.relu(self.pre_activation(x_Nd))

    def evaluation_form(self) -> dict[str, Any] | str:
        """relu(π)."""
        return {"form": "relu", "b_enc": self.b_enc}

    def training_forward(self, x_Nd: Tensor, y_Ne: Tensor, inputs: StepInputs) -> Forward:
        """Terms `mse` and `sparsity`; with `auxk_coeff` the ratio `auxk`."""
        pre_Nh = self.pre_activation(x_Nd)
        f_Nh = self.masked(torch.relu(pre_Nh), inputs.keep_N)
        x_hat_Nd, squared_error = self.reconstructed(f_Nh, y_Ne, inputs.keep_N)
        penalty = (f_Nh * self.decoder_norm_h()).sum() / (self.e if self.legacy_scaling else 1)
        forward = Forward(
            x_hat_Nd,
            f_Nh,
            {
                "mse": self.config.mse_coeff * squared_error,
                "sparsity": inputs.sparsity_coeff * penalty,
            },
        )
        return self.revived(forward, y_Ne, softened(pre_Nh), inputs)
