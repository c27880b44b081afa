"""The JumpReLU SAE (Rajamanoharan et al. 2024, arXiv 2407.14435; Gemma Scope; Anthropic, January 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from saeopt.config.base import Float, Weight
from saeopt.config.marks import Member, Stack
from saeopt.config.saes import FirstCoeff, SAEConfig
from saeopt.errors import UserError
from saeopt.saes.auxk import Revival, RevivalConfig, softened
from saeopt.saes.base import SAE, Forward, Rule, StepInputs
from saeopt.saes.init import point
from saeopt.saes.numbers import Number, Progress

_MEMORY = 0.99
"""What is left, after a window, of the weight that a window has in the running density."""
_START_TOKENS, _START_ABOVE = 2048, 2.0
Positive = Annotated[Float, Field(gt=0, le=1e6)]


class JumpReluConfig(RevivalConfig):
    """`sae_type: jumprelu`."""

    only_with: ClassVar[Mapping[str, str]] = {**RevivalConfig.only_with, "density_coeff": "max_density"}
    resamples: ClassVar[bool] = False  # not shown to help: docs/recipes.md
    first_coeff: ClassVar[FirstCoeff | None] = FirstCoeff(0.08, 1.2, 0.6, reach=10)

    penalty: Stack[Literal["step", "tanh", "quadratic"]] = "step"
    """What λ multiplies: `step`, the mean L0; `tanh`, the mean of Σ tanh(4 f ‖W_dec‖); `quadratic`,
    (L0 / `l0_penalty_target` − 1)²."""
    l0_penalty_target: Stack[Positive | None] = None
    """L0 at which the quadratic penalty is 0."""
    initial_threshold: Member[Annotated[Float, Field(ge=0, le=1e6)]] = 0.5
    """What θ starts at, in units of the normalised activations."""
    threshold_lr_factor: Stack[Annotated[Float, Field(ge=0, le=1e6)]] = 1.0
    """θ's learning rate as a multiple of `lr`."""
    bandwidth: Member[Positive] = 0.25
    """ε: θ learns from pre-activations that are closer to it than ε / 2."""
    final_bandwidth: Member[Positive | None] = None
    """ε moves exponentially to this value after the warm-up; null: it stays."""
    pre_activation_coeff: Stack[Weight] = 3e-6
    """With `penalty: tanh`, the weight of Σ relu(θ − π) ‖W_dec‖ over dead latents, which draws them back."""
    max_density: Stack[Annotated[Float, Field(gt=0, le=1)] | None] = None
    """λ is larger for a latent that fires on more than this share of the tokens; null: it is the same for all."""
    density_coeff: Stack[Weight] = 1.0
    """By how much: λ · (1 + this · (density / `max_density` − 1))."""

    @model_validator(mode="after")
    def _target_where_it_is_needed(self) -> Self:
        if (self.penalty == "quadratic") != (self.l0_penalty_target is not None):
            raise ValueError("'penalty: quadratic' and 'l0_penalty_target' go together: give both or neither")
        usual = type(self).model_fields["pre_activation_coeff"].default
        if self.pre_activation_coeff != usual and self.penalty != "tanh":
            raise ValueError("'pre_activation_coeff' has no effect without 'penalty: tanh'")
        if self.penalty == "quadratic" and self.target_l0 is not None:
            raise ValueError("'target_l0' moves λ, and 'penalty: quadratic' has 'l0_penalty_target' in its place")
        return self


def bandwidth(config: Any, progress: Progress) -> float:
    """ε: constant, or exponentially from its first to its last value over what follows the warm-up."""
    if config.final_bandwidth is None:
        return float(config.bandwidth)
    return float(config.bandwidth * (config.final_bandwidth / config.bandwidth) ** progress.after_warmup)


class _Jump(torch.autograd.Function):
    """π 1[π > θ], with ∂/∂θ = −(θ / ε) 1[|π − θ| < ε / 2]."""

    @staticmethod
    def forward(ctx: Any, pre_Nh: Tensor, threshold_h: Tensor, width: Tensor) -> Tensor:
        ctx.save_for_backward(pre_Nh, threshold_h, width)
        return pre_Nh * (pre_Nh > threshold_h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        pre_Nh, threshold_h, width = ctx.saved_tensors
        near_Nh = (pre_Nh - threshold_h).abs() < width / 2
        return grads[0] * (pre_Nh > threshold_h), -(threshold_h / width) * (grads[0] * near_Nh).sum(0), None


class _Step(torch.autograd.Function):
    """1[π > θ], with ∂/∂θ = −(1 / ε) 1[|π − θ| < ε / 2] and no gradient for π."""

    @staticmethod
    def forward(ctx: Any, pre_Nh: Tensor, threshold_h: Tensor, width: Tensor) -> Tensor:
        ctx.save_for_backward(pre_Nh, threshold_h, width)
        return (pre_Nh > threshold_h).to(pre_Nh.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        pre_Nh, threshold_h, width = ctx.saved_tensors
        near_Nh = (pre_Nh - threshold_h).abs() < width / 2
        return None, -(grads[0] * near_Nh).sum(0) / width, None


class JumpReluSAE(Revival):
    """f = π 1[π > θ]; loss = mean ‖x − x̂‖² + λ mean Σ 1[π > θ], or another `penalty`.

    θ ≥ 0 is a parameter of its own; its gradients are the straight-through ones of the paper, taken on π, so that the
    penalty reaches θ alone. Deviations: decoder rows of norm 1 unless `decoder_norm: free` says otherwise, θ itself
    and not its logarithm, a learning rate of its own for it. `quadratic`: λ (L0 / L0* − 1)², of which value and slope
    are taken at the L0 of the window before, so that micro-batches and processes do not matter (0 in the first one).
    `tanh`: λ mean Σ tanh(4 f ‖W_dec‖) and the pre-activation loss of Anthropic (January 2025) on dead latents.
    `max_density` is our form of what Gemma Scope 2 names without a formula. Under `legacy_scaling` the squared error
    and the penalty are divided by d.
    """

    Config: ClassVar[type[SAEConfig]] = JumpReluConfig
    numbers: ClassVar[dict[str, Number]] = {**SAE.numbers, "bandwidth": Number(bandwidth)}
    default_decoder_norm: ClassVar[str] = "unit"
    latent_vectors: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    config: JumpReluConfig
    threshold: nn.Parameter
    last_l0: Tensor
    density: Tensor
    density_windows: Tensor

    def build(self) -> None:
        super().build()
        target = self.config.l0_penalty_target or 0.0
        if target > self.h:
            raise UserError(f"'saes.l0_penalty_target': {target:g} exceeds the dictionary's {self.h} latents")
        self.needs_dead |= self.config.penalty == "tanh"
        if self.config.penalty == "quadratic":
            self.tallies = {"fired": "sum"}
            self.register_buffer("last_l0", self.ones() * target)
        if self.config.max_density is not None:
            self.tallies = {"fired": "sum"}
            self.register_buffer("density", 0 * self.ones(self.h))
            self.register_buffer("density_windows", 0 * self.ones())

    @property
    def rules(self) -> dict[str, Rule]:
        """θ learns slowly and stays above 0."""
        return {"threshold": Rule(self.config.threshold_lr_factor, 0.0)}

    @torch.no_grad()
    def start_encoder(self, directions_dh: Tensor, x_Nd: Tensor) -> None:
        """As in the base; θ is set."""
        super().start_encoder(directions_dh, x_Nd)
        self.threshold.fill_(self.config.initial_threshold)

    @torch.no_grad()
    def initialise(self, x_Nd: Tensor, generator: torch.Generator, y_Ne: Tensor | None = None) -> None:
        """As in the base; with `target_l0` θ starts where so many times that many latents are active, if not above.

        θ's steps are as long as its learning rate whatever λ is: from L0 h / 2 a short run would never come to a few.
        """
        super().initialise(x_Nd, generator, y_Ne)
        if self.config.target_l0 is not None:
            pre_Nh = self.pre_activation(x_Nd[:_START_TOKENS].to(self.W_enc))
            active = min(pre_Nh.numel(), math.ceil(_START_ABOVE * self.config.target_l0 * len(pre_Nh)))
            self.threshold.clamp_min_(pre_Nh.flatten().topk(active).values[-1])

    @torch.no_grad()
    def restart(self, dead_n: Tensor, alive_h: Tensor, along_nd: Tensor, opens_at_n: Tensor) -> None:
        """As in the base; θ says where a latent opens, and not its bias."""
        length = point(self.W_enc, dead_n, alive_h, along_nd, self.restart_share)
        self.threshold[dead_n] = length * opens_at_n

    def code(self, x_Nd: Tensor) -> Tensor:
        """π where it is above θ."""
        pre_Nh = self.pre_activation(x_Nd)
        return pre_Nh * (pre_Nh > self.threshold)

    def evaluation_form(self) -> dict[str, Any] | str:
        """π above θ."""
        return {"form": "jumprelu", "b_enc": self.b_enc, "threshold": self.threshold}

    def training_forward(self, x_Nd: Tensor, y_Ne: Tensor, inputs: StepInputs) -> Forward:
        """Terms `mse` and `sparsity`; with `penalty: tanh` also `pre_activation`."""
        pre_Nh, keep_N = self.pre_activation(x_Nd), inputs.keep_N
        width = torch.as_tensor(inputs.numbers["bandwidth"], dtype=pre_Nh.dtype, device=pre_Nh.device)
        f_Nh = self.masked(_Jump.apply(pre_Nh, self.threshold, width), keep_N)
        x_hat_Nd, share = self.reconstruct(f_Nh), 1 / self.e if self.legacy_scaling else 1
        open_Nh = self.masked(_Step.apply(pre_Nh, self.threshold, width), keep_N)
        n = torch.tensor(float(len(x_Nd))).to(f_Nh) if keep_N is None else keep_N.sum()
        terms = {
            "mse": self.config.mse_coeff * self.squared_error(x_hat_Nd, y_Ne, keep_N),
            "sparsity": inputs.sparsity_coeff * share * self.penalty(f_Nh, open_Nh, n),
        }
        if self.config.penalty == "tanh" and inputs.dead_h is not None:
            below_Nh = self.masked(torch.relu(self.threshold - pre_Nh) * inputs.dead_h, keep_N)
            terms["pre_activation"] = self.config.pre_activation_coeff * (below_Nh * self.decoder_norm_h()).sum()
        tallies = {name: open_Nh.detach().sum(0, dtype=torch.float64) for name in self.tallies}
        forward = Forward(x_hat_Nd, f_Nh, terms, tallies=tallies)
        return self.revived(forward, y_Ne, softened(pre_Nh - self.threshold), inputs)

    def penalty(self, f_Nh: Tensor, open_Nh: Tensor, n: Tensor) -> Tensor:
        """What λ multiplies, summed over the kept tokens."""
        weight_h = self.weight_h()
        if self.config.penalty == "tanh":
            return (torch.tanh(4 * f_Nh * self.decoder_norm_h()) * weight_h).sum()
        counted = (open_Nh * weight_h).sum()
        if self.config.penalty == "step":
            return counted
        assert self.config.l0_penalty_target is not None
        target = self.config.l0_penalty_target
        excess = self.last_l0 / target - 1
        return n * excess.square() + 2 * excess / target * (counted - counted.detach())

    def weight_h(self) -> Tensor | float:
        """λ's factor per latent."""
        if self.config.max_density is None:
            return 1.0
        return 1 + self.config.density_coeff * (self.density / self.config.max_density - 1).clamp_min(0)

    @property
    def learns_from_windows(self) -> bool:
        """Only where it tallies."""
        return bool(self.tallies)

    @torch.no_grad()
    def after_window(self, tallies: Mapping[str, Tensor], n: Tensor) -> None:
        """The window's L0 and densities, for the next ones."""
        if "fired" not in tallies:
            return
        density_h = (tallies["fired"] / n).to(self.threshold.dtype)
        if self.config.penalty == "quadratic":
            self.last_l0.copy_(density_h.sum())
        if self.config.max_density is not None:
            self.density_windows.add_(1)
            self.density.lerp_(density_h, (1 - _MEMORY) / (1 - _MEMORY**self.density_windows))
