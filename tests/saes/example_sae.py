"""A user's own SAE in one file: `sae_type: example_sae:LeakySAE`."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from saeopt.config.saes import SAEConfig
from saeopt.saes.base import SAE, Forward, StepInputs


class LeakyConfig(SAEConfig):
    """What a config file can say about it."""

    slope: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Slope below 0."""


class LeakySAE(SAE):
    """f = leaky_relu(π); loss = mean ‖x − x̂‖² + λ mean Σ|f|."""

    Config: ClassVar[type[SAEConfig]] = LeakyConfig
    config: LeakyConfig

    def code(self, x_Nd: Tensor) -> Tensor:
        return torch.nn.functional.leaky_relu(self.pre_activation(x_Nd), self.config.slope)

    def training_forward(self, x_Nd: Tensor, y_Ne: Tensor, inputs: StepInputs) -> Forward:
        f_Nh = self.masked(self.code(x_Nd), inputs.keep_N)
        x_hat_Nd = self.reconstruct(f_Nh)
        terms = {
            "mse": self.squared_error(x_hat_Nd, y_Ne, inputs.keep_N),
            "sparsity": inputs.sparsity_coeff * f_Nh.abs().sum(),
        }
        return Forward(x_hat_Nd, f_Nh, terms)
