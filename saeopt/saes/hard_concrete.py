"""SAEs whose gates are hard-concrete random variables (Louizos et al. 2018, arXiv 1712.01312).

A gate with location log α and temperature β, from uniform noise u and with limits γ < 0 < 1 < ζ:
s = σ((log u − log(1 − u) + log α) / β), z = clip(s (ζ − γ) + γ, 0, 1), P(z ≠ 0) = σ(log α − β log(−γ / ζ)).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from saeopt.config.base import Float
from saeopt.config.marks import Member, Shape, Stack
from saeopt.config.saes import FirstCoeff, SAEConfig
from saeopt.errors import UserError
from saeopt.saes.auxk import Revival, RevivalConfig
from saeopt.saes.base import SAE, Forward, StepInputs
from saeopt.saes.gated import MAGNITUDES, MagnitudeConfig
from saeopt.saes.init import point
from saeopt.saes.numbers import EVALUATED, Number, Progress

Limits = tuple[float, float]
Temperature = Annotated[Float, Field(ge=1e-4, le=1e4)]


class NoisyGateConfig(MagnitudeConfig):
    """Fields of both hard-concrete architectures."""

    only_with: ClassVar[Mapping[str, str]] = {**RevivalConfig.only_with, "final_beta": "beta_annealing"}

    initial_beta: Member[Temperature] = 0.5
    """β, the temperature of the gates (at the start, where it is annealed)."""
    final_beta: Member[Temperature | None] = None
    """β at the end."""
    beta_annealing: Member[bool] = False
    """Move β exponentially from `initial_beta` to `final_beta` after the warm-up."""
    hard_concrete_stretch_limits: Stack[tuple[Float, Float]] = (-0.1, 1.1)
    """γ and ζ: the gate is stretched to them and clipped to [0, 1]."""
    eval_gate: Stack[Literal["median", "paper"]] = "median"
    """The gate without noise: σ(log α / β), the median over the noise, or the paper's σ(log α)."""

    @field_validator("hard_concrete_stretch_limits")
    @classmethod
    def _around_0_and_1(cls, value: Limits) -> Limits:
        if not value[0] < 0 < 1 < value[1]:
            raise ValueError("must be a number below 0 and a number above 1")
        return value

    @model_validator(mode="after")
    def _annealing_has_an_end(self) -> Self:
        if self.beta_annealing and self.final_beta is None:
            raise ValueError("'beta_annealing' needs 'final_beta'")
        return self


def annealed_beta(config: NoisyGateConfig, progress: Progress) -> float:
    """β: constant during the warm-up, then exponential from `initial_beta` to `final_beta`."""
    if not config.beta_annealing or config.final_beta is None:
        return config.initial_beta
    return float(config.initial_beta * (config.final_beta / config.initial_beta) ** progress.after_warmup)


class HardConcreteConfig(NoisyGateConfig):
    """`sae_type: hard_concrete`."""

    first_coeff: ClassVar[FirstCoeff | None] = FirstCoeff(0.19, 0.9, 0.55)

    magnitude_activation: Stack[Literal["relu", "softplus", "identity"]] = "identity"
    """What the magnitude passes through; null means `identity`: the code can be negative."""
    input_dependent_gates: Shape[bool] = True
    """false: log α is one learned number per latent."""


def noisy_gate(log_alpha_Nh: Tensor, u_Nh: Tensor, beta: Tensor | float, limits: Limits) -> Tensor:
    """z in [0, 1]."""
    logit_Nh = u_Nh.log() - torch.log1p(-u_Nh)
    return _stretch(torch.sigmoid((logit_Nh + log_alpha_Nh) / beta), limits)


def quiet_gate(log_alpha_Nh: Tensor, beta: Tensor | float, limits: Limits, form: str) -> Tensor:
    """z without noise."""
    return _stretch(torch.sigmoid(log_alpha_Nh / beta if form == "median" else log_alpha_Nh), limits)


def quiet_threshold(beta: Tensor | float, limits: Limits, form: str) -> Tensor | float:
    """log α above which the gate without noise is not 0."""
    return math.log(-limits[0] / limits[1]) * (beta if form == "median" else 1.0)


def probability_nonzero(log_alpha_Nh: Tensor, beta: Tensor | float, limits: Limits) -> Tensor:
    """P(z ≠ 0) over the noise."""
    return torch.sigmoid(log_alpha_Nh - beta * math.log(-limits[0] / limits[1]))


def _stretch(s_Nh: Tensor, limits: Limits) -> Tensor:
    low, high = limits
    return (s_Nh * (high - low) + low).clamp(0, 1)


class NoisyGateSAE(Revival):
    """What both hard-concrete architectures share. The buffer `beta` is that of the last training step."""

    numbers: ClassVar[dict[str, Number]] = {**SAE.numbers, "beta": Number(annealed_beta)}
    needs_noise: ClassVar[bool] = True
    config: NoisyGateConfig
    beta: Tensor

    def build(self) -> None:
        super().build()
        if self.config.steers:
            self.tallies = {EVALUATED: "sum"}
        self.register_buffer("beta", self.ones() * self.config.initial_beta)

    def rescale_rows(self) -> bool:
        """Gates have no scale of their own to make up for the rows'; the first step does what `unit` asks for."""
        return False

    def train_gate(self, log_alpha_Nh: Tensor, inputs: StepInputs) -> Tensor:
        """z with this step's noise; remembers β for the evaluation form."""
        if inputs.u_Nh is None:
            raise ValueError("hard-concrete gates are trained with noise: StepInputs.u_Nh is missing")
        with torch.no_grad():
            self.beta.fill_(inputs.beta)
        return noisy_gate(log_alpha_Nh, inputs.u_Nh, inputs.beta, self.config.hard_concrete_stretch_limits)

    def eval_gate(self, log_alpha_Nh: Tensor) -> Tensor:
        """z without noise, in the form that `eval_gate` names."""
        config = self.config
        return quiet_gate(log_alpha_Nh, self.beta, config.hard_concrete_stretch_limits, config.eval_gate)

    @torch.no_grad()
    def evaluated(self, log_alpha_Nh: Tensor, m_Nh: Tensor, inputs: StepInputs) -> dict[str, Tensor]:
        """The tally of what the evaluation form has for non-zeros: gates without noise open others than the noisy.

        Nothing where no target is steered to by it.
        """
        if not self.tallies:
            return {}
        opens = quiet_threshold(inputs.beta, self.config.hard_concrete_stretch_limits, self.config.eval_gate)
        return {EVALUATED: self.masked(((log_alpha_Nh > opens) & (m_Nh != 0)).double(), inputs.keep_N).sum()}

    def penalty(self, log_alpha_Nh: Tensor, inputs: StepInputs) -> Tensor:
        """Σ over kept tokens of the expected number of open gates; divided by d under `legacy_scaling`."""
        open_Nh = probability_nonzero(log_alpha_Nh, inputs.beta, self.config.hard_concrete_stretch_limits)
        return self.masked(open_Nh, inputs.keep_N).sum() / (self.e if self.legacy_scaling else 1)


class HardConcreteSAE(NoisyGateSAE):
    """f = z ⊙ (x̄ W_enc + b_enc), log α = x̄ W_gate + b_gate, x̄ = x − b_dec; x̂ uses decoder rows of norm 1.

    Loss = mean ‖x − x̂‖² + λ mean Σ P(z ≠ 0). `input_dependent_gates: false` makes log α = b_gate.
    Under `legacy_scaling` both terms are divided by d.
    """

    Config: ClassVar[type[SAEConfig]] = HardConcreteConfig
    latent_vectors: ClassVar[tuple[str, ...]] = ("b_enc", "b_gate")
    zero_decoder: ClassVar[bool] = False
    config: HardConcreteConfig
    b_gate: nn.Parameter
    row_norm: Tensor

    def build(self) -> None:
        super().build()
        if self.config.input_dependent_gates:
            self.W_gate = self.parameter(self.d, self.h)
        self.register_buffer("row_norm", self.ones())

    def start_encoder(self, directions_dh: Tensor, x_Nd: Tensor) -> None:
        """The gates look along the decoder too, with log α of order 1 whatever the units of x."""
        super().start_encoder(directions_dh, x_Nd)
        if self.config.input_dependent_gates:
            typical = self.centred(x_Nd).norm(dim=-1).mean().clamp_min(1e-12)
            self.W_gate.copy_(directions_dh * (math.sqrt(self.d) / typical))

    @torch.no_grad()
    def restart(self, dead_n: Tensor, alive_h: Tensor, along_nd: Tensor, opens_at_n: Tensor) -> None:
        """As in the base; the gates are as steep as the living ones, or as open where they do not see x."""
        point(self.W_enc, dead_n, alive_h, along_nd, self.restart_share)
        if self.config.input_dependent_gates:
            self.b_gate[dead_n] = -point(self.W_gate, dead_n, alive_h, along_nd, 1.0) * opens_at_n
        else:
            self.b_gate[dead_n] = self.b_gate[alive_h].mean().nan_to_num(0.0)

    def log_alpha_and_magnitude(self, x_Nd: Tensor) -> tuple[Tensor, Tensor]:
        """log α and m."""
        centred_Nd = self.centred(x_Nd)
        pre_Nh = self.before_activation(centred_Nd @ self.W_enc + self.b_enc)
        m_Nh = MAGNITUDES[self.config.magnitude_activation](pre_Nh)
        if self.config.input_dependent_gates:
            return centred_Nd @ self.W_gate + self.b_gate, m_Nh
        return self.b_gate.expand_as(m_Nh), m_Nh

    def code(self, x_Nd: Tensor) -> Tensor:
        """z ⊙ m with the gate that `eval_gate` names."""
        log_alpha_Nh, m_Nh = self.log_alpha_and_magnitude(x_Nd)
        return self.eval_gate(log_alpha_Nh) * m_Nh

    def reconstruct(self, f_Nh: Tensor) -> Tensor:
        """f times the decoder with every row at norm `row_norm` (1 until the scale is folded in), plus b_dec."""
        return f_Nh @ self.decoder_rows() + self.b_dec

    def decoder_rows(self) -> Tensor:
        """W_dec with every row at norm `row_norm`."""
        return self.W_dec / self.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12) * self.row_norm

    def training_forward(self, x_Nd: Tensor, y_Ne: Tensor, inputs: StepInputs) -> Forward:
        """Terms `mse` and `sparsity`; with `auxk_coeff` the ratio `auxk`."""
        log_alpha_Nh, m_Nh = self.log_alpha_and_magnitude(x_Nd)
        f_Nh = self.masked(self.train_gate(log_alpha_Nh, inputs) * m_Nh, inputs.keep_N)
        x_hat_Nd = self.reconstruct(f_Nh)
        forward = Forward(
            x_hat_Nd,
            f_Nh,
            {
                "mse": self.config.mse_coeff * self.squared_error(x_hat_Nd, y_Ne, inputs.keep_N),
                "sparsity": inputs.sparsity_coeff * self.penalty(log_alpha_Nh, inputs),
            },
            tallies=self.evaluated(log_alpha_Nh, m_Nh, inputs),
        )
        return self.revived(forward, y_Ne, torch.sigmoid(log_alpha_Nh) * m_Nh, inputs)

    @torch.no_grad()
    def folded(self) -> Self:
        """As in the base; the decoder's units go into `row_norm`."""
        other = super().folded()
        if self.widths is None and not self.whitens:
            other.row_norm.div_(self.scale)
        else:  # directions with units of their own: each row gets a norm of its own
            other.row_norm = self.raw_rows(self.decoder_rows()).norm(dim=-1, keepdim=True)
        return other

    @torch.no_grad()
    def unfold(self) -> None:
        """As in the base; the decoder's units go into `row_norm`.

        Raises:
            UserError: each row would have a norm of its own.
        """
        super().unfold()
        norm_h = self.normalised_rows(self.decoder_rows()).norm(dim=-1)
        if not torch.allclose(norm_h, norm_h.mean(), rtol=1e-4):
            raise UserError(
                f"'saes.normalize_activations: {self.normalisation}': rows of a hard_concrete SAE that reads raw"
                " activations would differ in length: set none, scale or mean_scale"
            )
        self.row_norm.copy_(norm_h.mean())

    def encoders(self) -> list[nn.Parameter]:
        """The gates' too."""
        return [self.W_enc, self.W_gate] if self.config.input_dependent_gates else [self.W_enc]

    @torch.no_grad()
    def shift_code(self, shift_d: Tensor) -> None:
        """As in the base; the gates have a matrix of their own."""
        super().shift_code(shift_d)
        if self.config.input_dependent_gates:
            self.b_gate.add_(shift_d @ self.W_gate)

    @torch.no_grad()
    def unit_decoder(self) -> Self:
        """As in the base; here `row_norm` says how long the rows are."""
        other = super().unit_decoder()
        other.row_norm.fill_(1.0)
        return other
