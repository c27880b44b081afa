"""AuxK, the auxiliary loss that revives dead latents (Gao et al. 2024, arXiv 2406.04093), for any code.

Shape suffixes: N tokens, e width written, h dictionary width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import elu

from saeopt.config.base import BatchSize, Span, Weight
from saeopt.config.marks import Stack
from saeopt.config.saes import SAEConfig
from saeopt.saes.base import SAE, Forward, Ratio, StepInputs


def keep_largest(values_Nh: Tensor, k: int) -> Tensor:
    """The k largest of each row, 0 elsewhere."""
    largest = values_Nh.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(values_Nh).scatter(-1, largest.indices, largest.values)


def usual_k(e: int) -> int:
    """The paper's number of dead latents per token: the power of two at or below e / 2."""
    return int(2 ** max(0, math.floor(math.log2(e / 2))))


def aux_ratio(
    error_Ne: Tensor, acts_Nh: Tensor, rows_he: Tensor, inputs: StepInputs, k: int, weight: Tensor | float
) -> Ratio:
    """weight · Σ‖e − ê‖² / Σ‖e − mean e‖² of an error without gradient; ê = (the k largest among dead latents) rows."""
    dead_h, keep_N = inputs.dead_h, inputs.keep_N
    assert dead_h is not None
    # Living latents count as 0 here: with fewer dead ones than k the rest of the selection adds nothing,
    # so that the number of dead latents is never needed on the host.
    dead_Nh = keep_largest(acts_Nh * dead_h, k)
    if keep_N is not None:
        error_Ne, dead_Nh = error_Ne * keep_N.unsqueeze(-1), SAE.masked(dead_Nh, keep_N)
    left_Ne = error_Ne - dead_Nh @ rows_he
    numerator = weight * left_Ne.square().sum() * dead_h.any()
    return Ratio(numerator, error_Ne.square().sum(dtype=torch.float64), error_Ne.sum(0, dtype=torch.float64))


class RevivalConfig(SAEConfig):
    """The fields of architectures that take AuxK on request."""

    only_with: ClassVar[Mapping[str, str]] = {"aux_k": "auxk_coeff"}

    resamples: ClassVar[bool] = True
    """Whether dead latents are resampled where the config does not say, since recipe 3."""

    auxk_coeff: Stack[Weight] = 0.0
    """Weight of an auxiliary loss for dead latents, in topk's proportion to the squared error (there it is 1/32); 0:
    none. It takes the reference step."""
    resample_every_tokens: Stack[Span | None] = None
    """Every so many training tokens latents that have not fired for `dead_after_tokens` get the directions of inputs
    that are badly reconstructed (after Bricken 2023); not in the last fifth of a run; 0: never; null: a twentieth of
    the run (jumprelu, and recipes 1 and 2: never)."""
    aux_k: Stack[BatchSize | None] = None
    """Dead latents that `auxk_coeff`'s loss uses per token; null: the power of two at or below d / 2."""


class Revival(SAE):
    """What an architecture inherits to take `auxk_coeff`: α V AuxK, V = E‖x − mean x‖² (:class:`TopKSAE`).

    A dead latent of a topk code has π > 0 somewhere. Here it has π ≤ 0, or a closed gate, on all tokens, and relu(π)
    would give it no gradient: what is selected among dead latents is what the architecture gives as `willing_Nh`
    instead, positive everywhere.
    """

    config: RevivalConfig
    variance: Tensor

    def build(self) -> None:
        super().build()
        if self.config.auxk_coeff > 0:
            self.needs_dead = True
            self.register_buffer("variance", self.ones())

    @torch.no_grad()
    def measure(self, y_Ne: Tensor) -> None:
        """V of normalised activations."""
        if self.config.auxk_coeff > 0:
            self.variance.fill_(y_Ne.double().var(0, correction=0).sum())

    def revived(self, forward: Forward, y_Ne: Tensor, willing_Nh: Tensor, inputs: StepInputs) -> Forward:
        """The forward with the ratio `auxk`, where it is asked for and a mask of dead latents is given."""
        if self.config.auxk_coeff > 0 and inputs.dead_h is not None:
            weight = self.config.auxk_coeff * self.variance / (self.e if self.legacy_scaling else 1)
            k = min(self.h, self.config.aux_k or usual_k(self.e))
            error_Ne = (y_Ne - forward.x_hat_Nd).detach()
            forward.ratios["auxk"] = aux_ratio(error_Ne, willing_Nh, self.decoder_rows(), inputs, k, weight)
        return forward


def softened(pre_Nh: Tensor) -> Tensor:
    """elu(π) + 1: e^π below 0 (as in ghost gradients), π + 1 above."""
    return elu(pre_Nh) + 1
