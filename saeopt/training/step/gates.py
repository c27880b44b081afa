"""The stages of the architectures with gates, for `dense.run`. Shape suffixes as there."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saeopt.saes.hard_concrete import quiet_threshold
from saeopt.saes.noise import hashed_uniform
from saeopt.training.step.dense import Architecture, Back, Given, column, masked, penalty_pull
from saeopt.training.step.forms import Form


# ---- gated: f = 1[π_gate > 0] ⊙ magnitude, both from one product, see `saeopt.saes.gated`
def gated_parts(form: Form, given: Given, pres: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x̄ W_enc, e^r, the gate's argument and the magnitude's."""
    shared_MNh = pres[0].to(given.norm_Mh.dtype)
    gain_M1h = column(given.vectors["r_mag"].exp())
    gate_MNh = shared_MNh + column(given.vectors["b_gate"])
    return shared_MNh, gain_M1h, gate_MNh, gain_M1h * shared_MNh + column(given.vectors["b_mag"])


def gated_codes(form: Form, given: Given, pres: list[Tensor]) -> list[Tensor]:
    """f and relu(π_gate)."""
    _, _, gate_MNh, inner_MNh = gated_parts(form, given, pres)
    f_MNh = activation(form.magnitude, inner_MNh) * (gate_MNh > 0)
    return [masked(code, given.keep_N).to(pres[0].dtype) for code in (f_MNh, torch.relu(gate_MNh))]


def gated_back(form: Form, given: Given, pres: list[Tensor], codes: list[Tensor], g_codes: list[Tensor]) -> Back:
    """The gate learns from the penalty and the auxiliary term alone."""
    shared_MNh, gain_M1h, gate_MNh, inner_MNh = gated_parts(form, given, pres)
    dtype = shared_MNh.dtype
    open_MNh = gate_MNh > 0
    penalty_M = given.numbers["sparsity_coeff"] * form.penalty
    push_MNh = masked(column(penalty_M.unsqueeze(-1) * given.norm_Mh).expand_as(shared_MNh), given.keep_N)
    g_inner = g_codes[0].to(dtype) * open_MNh * activation_slope(form.magnitude, inner_MNh)
    g_gate = (g_codes[1].to(dtype) + push_MNh) * open_MNh
    per_latent_Mh = masked(torch.relu(gate_MNh), given.keep_N).sum(1)
    fired_Mh = (codes[0] != 0).sum(1, dtype=dtype)
    sparsity_M = penalty_M * (per_latent_Mh * given.norm_Mh).sum(-1)
    pull_Mh = penalty_pull(form, penalty_M, per_latent_Mh, given.norm_Mh)
    return gated_sums(shared_MNh, gain_M1h, g_gate, g_inner, codes[0].dtype, (pull_Mh, sparsity_M, fired_Mh, None))


def gated_sums(
    shared_MNh: Tensor,
    gain_M1h: Tensor,
    g_gate: Tensor,
    g_inner: Tensor,
    low: torch.dtype,
    sums: tuple[Tensor | None, Tensor, Tensor, Tensor | None],
) -> Back:
    """Gradients behind those of a gate and a magnitude that share their product."""
    g_shared = g_gate + gain_M1h * g_inner
    g_b_gate, g_b_mag = g_gate.sum(1), g_inner.sum(1)
    gain_Mh = gain_M1h.squeeze(1)
    vectors = {"b_gate": g_b_gate, "b_mag": g_b_mag, "r_mag": gain_Mh * (g_inner * shared_MNh).sum(1)}
    return Back([g_shared.to(low)], vectors, [g_b_gate + gain_Mh * g_b_mag], *sums)


# ---- hard_concrete: f = z ⊙ magnitude, see `saeopt.saes.hard_concrete`; `low["W_dec"]` has rows of fixed norm
def hard_concrete_parts(form: Form, given: Given, pres: list[Tensor]) -> tuple[Tensor, Tensor]:
    """log α and the magnitude's argument."""
    inner_MNh = pres[0].to(given.norm_Mh.dtype) + column(given.vectors["b_enc"])
    bias_M1h = column(given.vectors["b_gate"])
    return pres[1] + bias_M1h if len(pres) == 2 else bias_M1h.expand_as(inner_MNh), inner_MNh


def hard_concrete_codes(form: Form, given: Given, pres: list[Tensor]) -> list[Tensor]:
    """f."""
    log_alpha_MNh, inner_MNh = hard_concrete_parts(form, given, pres)
    z_MNh, _ = noisy_gate(form, given, log_alpha_MNh)
    return [masked(z_MNh * activation(form.magnitude, inner_MNh), given.keep_N).to(pres[0].dtype)]


def hard_concrete_back(
    form: Form, given: Given, pres: list[Tensor], codes: list[Tensor], g_codes: list[Tensor]
) -> Back:
    """The gate learns through z and from the penalty."""
    dtype = given.norm_Mh.dtype
    log_alpha_MNh, inner_MNh = hard_concrete_parts(form, given, pres)
    z_MNh, slope_MNh = noisy_gate(form, given, log_alpha_MNh)
    g_open, sparsity_M = open_gates(form, given, log_alpha_MNh)
    g_f = g_codes[0].to(dtype)
    g_inner = g_f * z_MNh * activation_slope(form.magnitude, inner_MNh)
    g_gate = g_f * activation(form.magnitude, inner_MNh) * slope_MNh + g_open
    g_b_enc, g_b_gate = g_inner.sum(1), g_gate.sum(1)
    products, through = [g_inner.to(codes[0].dtype)], [g_b_enc]
    if len(pres) == 2:
        products, through = [*products, g_gate.to(codes[0].dtype)], [*through, g_b_gate]
    fired_Mh = (codes[0] != 0).sum(1, dtype=dtype)
    vectors, evaluated_M = {"b_enc": g_b_enc, "b_gate": g_b_gate}, evaluated(form, given, log_alpha_MNh, inner_MNh)
    return Back(products, vectors, through, None, sparsity_M, fired_Mh, evaluated_M)


# ---- gated_hard_concrete: f = z ⊙ magnitude from one product, see `saeopt.saes.gated_hard_concrete`
def gated_hard_concrete_codes(form: Form, given: Given, pres: list[Tensor]) -> list[Tensor]:
    """f and the auxiliary code."""
    _, _, log_alpha_MNh, inner_MNh = gated_parts(form, given, pres)
    z_MNh, _ = noisy_gate(form, given, log_alpha_MNh)
    aux_MNh = z_MNh if form.seed_aux else z_MNh * torch.relu(log_alpha_MNh)
    f_MNh = z_MNh * activation(form.magnitude, inner_MNh)
    return [masked(code, given.keep_N).to(pres[0].dtype) for code in (f_MNh, aux_MNh)]


def gated_hard_concrete_back(
    form: Form, given: Given, pres: list[Tensor], codes: list[Tensor], g_codes: list[Tensor]
) -> Back:
    """The gate learns through z from both reconstructions, and from the penalty."""
    shared_MNh, gain_M1h, log_alpha_MNh, inner_MNh = gated_parts(form, given, pres)
    dtype = shared_MNh.dtype
    z_MNh, slope_MNh = noisy_gate(form, given, log_alpha_MNh)
    g_open, sparsity_M = open_gates(form, given, log_alpha_MNh)
    g_f, g_aux = g_codes[0].to(dtype), g_codes[1].to(dtype)
    g_inner = g_f * z_MNh * activation_slope(form.magnitude, inner_MNh)
    g_z = g_f * activation(form.magnitude, inner_MNh)
    if form.seed_aux:
        g_gate = (g_z + g_aux) * slope_MNh + g_open
    else:
        weight_MNh = torch.relu(log_alpha_MNh)
        g_gate = (g_z + g_aux * weight_MNh) * slope_MNh + g_open + g_aux * z_MNh * (log_alpha_MNh > 0)
    fired_Mh = (codes[0] != 0).sum(1, dtype=dtype)
    sums = (None, sparsity_M, fired_Mh, evaluated(form, given, log_alpha_MNh, inner_MNh))
    return gated_sums(shared_MNh, gain_M1h, g_gate, g_inner, codes[0].dtype, sums)


GATED = Architecture(gated_codes, gated_back)
HARD_CONCRETE = Architecture(hard_concrete_codes, hard_concrete_back)
GATED_HARD_CONCRETE = Architecture(gated_hard_concrete_codes, gated_hard_concrete_back)


# ---- pieces
def activation(name: str, inner: Tensor) -> Tensor:
    """The magnitude's activation."""
    if name == "relu":
        return torch.relu(inner)
    return torch.nn.functional.softplus(inner) if name == "softplus" else inner


def activation_slope(name: str, inner: Tensor) -> Tensor:
    """Its derivative."""
    if name == "relu":
        return (inner > 0).to(inner.dtype)
    return torch.sigmoid(inner) if name == "softplus" else torch.ones_like(inner)


def noisy_gate(form: Form, given: Given, log_alpha_MNh: Tensor) -> tuple[Tensor, Tensor]:
    """z and ∂z/∂log α."""
    u_MNh = given.u_MNh
    if u_MNh is None:
        assert given.keys_2MN is not None
        u_MNh = hashed_uniform(given.keys_2MN, log_alpha_MNh.shape[-1]).to(log_alpha_MNh.dtype)
    low, high = form.limits
    inverse_beta_M11 = 1 / given.numbers["beta"][:, None, None]
    s_MNh = torch.sigmoid((torch.log(u_MNh / (1 - u_MNh)) + log_alpha_MNh) * inverse_beta_M11)
    stretched = s_MNh * (high - low) + low
    inside = (stretched >= 0) & (stretched <= 1)
    slope_MNh = torch.where(inside, (high - low) * inverse_beta_M11 * s_MNh * (1 - s_MNh), 0.0)
    return stretched.clamp(0, 1), slope_MNh


def evaluated(form: Form, given: Given, log_alpha_MNh: Tensor, inner_MNh: Tensor) -> Tensor | None:
    """Non-zeros of the evaluation form per member, where they are tallied."""
    if form.eval_gate is None:
        return None
    opens = quiet_threshold(given.numbers["beta"][:, None, None], form.limits, form.eval_gate)
    open_MNh = (log_alpha_MNh > opens) & (activation(form.magnitude, inner_MNh) != 0)
    return masked(open_MNh.to(given.norm_Mh.dtype), given.keep_N).sum(1).sum(-1)


def open_gates(form: Form, given: Given, log_alpha_MNh: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of λ Σ P(z ≠ 0) on log α, and that term per member."""
    shift = math.log(-form.limits[0] / form.limits[1])
    p_MNh = torch.sigmoid(log_alpha_MNh - given.numbers["beta"][:, None, None] * shift)
    penalty_M = given.numbers["sparsity_coeff"] * form.penalty
    g_MNh = masked(penalty_M[:, None, None] * p_MNh * (1 - p_MNh), given.keep_N)
    return g_MNh, penalty_M * masked(p_MNh, given.keep_N).sum(1).sum(-1)  # tokens first, as all other sums
