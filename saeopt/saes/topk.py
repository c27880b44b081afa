"""The TopK SAE with the auxiliary loss that revives dead latents (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from saeopt.config.base import BatchSize, Weight
from saeopt.config.marks import Member, Slow, Stack
from saeopt.errors import UserError
from saeopt.saes.auxk import aux_ratio, keep_largest, usual_k
from saeopt.saes.base import Forward, StepInputs
from saeopt.saes.prefixes import PrefixConfig, PrefixSAE


class TopKConfig(PrefixConfig):
    """`sae_type: topk`. `sparsity_coeff` has no effect: k fixes L0."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"sparsity_coeff", "sparsity_warmup_samples"})
    k: Annotated[Member[BatchSize], Slow(4)] = 32
    """Latents kept per token."""
    aux_k: Stack[BatchSize | None] = None
    """Dead latents that the auxiliary loss uses per token; null: the power of two at or below d / 2."""
    aux_coeff: Stack[Weight] = 1 / 32
    """α, the weight of the auxiliary loss, in the paper's proportion to the squared error (recipe 1: α alone)."""

    @property
    def sparsity_label(self) -> str:
        return f"k{self.k:g}"


class TopKSAE(PrefixSAE):
    """f = the k largest of relu(π) per token; loss = mean ‖x − x̂‖² + α V AuxK, V = E‖x − mean x‖².

    AuxK = Σ‖e − ê‖² / Σ‖e − mean e‖² over the window, with e = sg[x − x̂] and ê = (the k_aux largest of relu(π)
    among dead latents) W_dec, no bias; k_aux = min(number of dead latents, aux_k). 0 without dead latents, and
    0 / 0 counts as 0. V is measured once, with the scale, and kept in the buffer `variance`: in the paper both terms
    are shares of a variance, here the squared error is a sum over d (about V · FVU), and AuxK needs the same unit.
    The decoder rows are kept at norm 1, W_enc starts as their transpose and b_dec in π is the decoder's, all as in the
    paper. Deviations: the relu, b_enc, V measured once, AuxK's denominator per window, and a smaller W_enc where x̂
    would start longer than x. Recipe 1: α AuxK, which is about d times weaker and revives nothing, free rows
    (`decoder_norm: free`), and W_enc of the size that makes x̂ as long as x. Under `legacy_scaling` the squared
    error and V are divided by d. `prefixes`: the squared error is that of nested dictionaries.
    """

    Config: ClassVar[type[TopKConfig]] = TopKConfig
    needs_dead: bool = True
    default_decoder_norm: ClassVar[str] = "unit"
    default_encoder_start: ClassVar[str] = "transpose"
    config: TopKConfig
    variance: Tensor

    def build(self) -> None:
        if self.recipe > 1:
            self.register_buffer("variance", self.ones())
        if self.config.k > self.h:
            raise UserError(f"'saes.k': {self.config.k:g} exceeds the dictionary's {self.h} latents")
        self.aux_k = min(self.h, self.config.aux_k or usual_k(self.e))

    @torch.no_grad()
    def measure(self, y_Ne: Tensor) -> None:
        """V of normalised activations."""
        if self.recipe > 1:
            self.variance.fill_(y_Ne.double().var(0, correction=0).sum())

    @property
    def selected(self) -> int:
        """k."""
        return math.ceil(self.config.k)

    @property
    def aux_share(self) -> float:
        """What multiplies V AuxK (recipe 1: AuxK)."""
        return self.config.aux_coeff / (self.e if self.legacy_scaling and self.recipe > 1 else 1)

    def code(self, x_Nd: Tensor) -> Tensor:
        """The k largest of relu(π)."""
        return keep_largest(torch.relu(self.pre_activation(x_Nd)), self.config.k)

    def select(self, acts_Nh: Tensor, keep_N: Tensor | None) -> Tensor:
        """The code of training from relu(π), 0 on masked tokens."""
        return self.masked(keep_largest(acts_Nh, self.config.k), keep_N)

    def evaluation_form(self) -> dict[str, Any] | str:
        """The k largest of relu(π)."""
        return {"form": "topk", "b_enc": self.b_enc, "k": self.selected}

    def training_forward(self, x_Nd: Tensor, y_Ne: Tensor, inputs: StepInputs) -> Forward:
        """Term `mse`, ratio `aux` (where a mask of dead latents is given)."""
        acts_Nh = torch.relu(self.pre_activation(x_Nd))
        f_Nh = self.select(acts_Nh, inputs.keep_N)
        x_hat_Nd, squared_error = self.reconstructed(f_Nh, y_Ne, inputs.keep_N)
        forward = Forward(x_hat_Nd, f_Nh, {"mse": self.config.mse_coeff * squared_error})
        if inputs.dead_h is not None:
            weight, error_Nd = self.aux_share * (self.variance if self.recipe > 1 else 1.0), (y_Ne - x_hat_Nd).detach()
            forward.ratios["aux"] = aux_ratio(error_Nd, acts_Nh, self.W_dec, inputs, self.aux_k, weight)
        return forward
