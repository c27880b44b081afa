"""Forward and backward of the architectures whose code is dense, written by hand for members side by side.

Shape suffixes: M members, N tokens, d model width, h dictionary width. One function per architecture computes
Σ over tokens of everything a step needs; the formulas are those of the modules in `saeopt.saes`, whose autograd
is the oracle. Elementwise parts are plain torch, so that torch.compile can fuse them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saeopt.saes.base import SAE


class Form(NamedTuple):
    """The numbers that all members of a stack share (hashable: compiled code is specialised on them)."""

    mse: float
    aux: float
    penalty: float
    unit: bool
    magnitude: str
    limits: tuple[float, float]
    seed_aux: bool
    per_input_gate: bool

    @classmethod
    def of(cls, sae: SAE) -> Form:
        """From a module's config; `legacy_scaling` divides terms by d as the module does."""
        config: Any = sae.config
        share = 1 / sae.d if sae.legacy_scaling else 1.0
        return cls(
            mse=config.mse_coeff * share,
            aux=getattr(config, "aux_coeff", 0.0) * share,
            penalty=1.0 if config.sae_type == "gated" else share,
            unit=config.decoder_norm == "unit",
            magnitude=getattr(config, "magnitude_activation", "relu"),
            limits=getattr(config, "hard_concrete_stretch_limits", (-0.1, 1.1)),
            seed_aux=getattr(config, "aux_form", "gated") == "seed",
            per_input_gate=getattr(config, "input_dependent_gates", True),
        )


class Given(NamedTuple):
    """What a pass reads. `low` holds the matrices (M, h, d) in the dtype of the products, `vectors` (M, length)."""

    low: dict[str, Tensor]
    vectors: dict[str, Tensor]
    norm_Mh: Tensor
    x_Nd: Tensor
    keep_N: Tensor | None
    u_MNh: Tensor | None
    sparsity_M: Tensor
    beta_M: Tensor


class Found(NamedTuple):
    """What a pass gives, summed over tokens.

    `products`: (name, left_MNh, right_MNd), the gradient of that matrix is leftᵀ right. `pull_Mh`: the gradient of
    W_dec has this multiple of W_dec besides. `totals_M4`: Σ loss terms, Σ‖x̂ − x‖², Σ sparsity term, non-zeros.
    """

    products: list[tuple[str, Tensor, Tensor]]
    vectors: dict[str, Tensor]
    pull_Mh: Tensor | None
    totals_M4: Tensor
    fired_Mh: Tensor


def relu(form: Form, given: Given) -> Found:
    """f = relu(x̄ W_enc + b_enc); see :class:`saeopt.saes.relu.ReluSAE`."""
    centred_MNd = centre(given)
    pre_MNh = encode(centred_MNd, given.low["W_enc"]) + column(given.vectors["b_enc"])
    f_MNh = masked(torch.relu(pre_MNh), given.keep_N).to(centred_MNd.dtype)
    error_MNd = masked(decode(f_MNh, given) - given.x_Nd, given.keep_N)
    g_error = (2 * form.mse * error_MNd).to(f_MNh.dtype)
    penalty_M = given.sparsity_M * form.penalty
    g_f = torch.bmm(g_error, given.low["W_dec"].mT).to(pre_MNh.dtype)
    g_pre = torch.where(f_MNh > 0, g_f + column(penalty_M.unsqueeze(-1) * given.norm_Mh), 0.0)
    g_b_enc = g_pre.sum(1)
    g_low = g_pre.to(f_MNh.dtype)
    per_latent_Mh = f_MNh.sum(1, dtype=pre_MNh.dtype)
    squared_M = error_MNd.square().sum((1, 2))
    sparsity_M = penalty_M * (per_latent_Mh * given.norm_Mh).sum(-1)
    fired_Mh = (f_MNh != 0).sum(1, dtype=pre_MNh.dtype)
    return Found(
        [("W_dec", f_MNh, g_error), ("W_enc", g_low, centred_MNd)],
        {"b_enc": g_b_enc, "b_dec": g_error.sum(1, dtype=pre_MNh.dtype) - through(g_b_enc, given.low["W_enc"])},
        penalty_pull(form, penalty_M, per_latent_Mh, given.norm_Mh),
        torch.stack([form.mse * squared_M + sparsity_M, squared_M, sparsity_M, fired_Mh.sum(-1)], -1),
        fired_Mh,
    )


def gated(form: Form, given: Given) -> Found:
    """f = 1[π_gate > 0] ⊙ magnitude, both from one product; see :class:`saeopt.saes.gated.GatedSAE`."""
    centred_MNd = centre(given)
    shared_low = encode(centred_MNd, given.low["W_enc"])
    shared_MNh = shared_low.to(given.norm_Mh.dtype)
    gain_M1h = column(given.vectors["r_mag"].exp())
    gate_MNh = shared_MNh + column(given.vectors["b_gate"])
    inner_MNh = gain_M1h * shared_MNh + column(given.vectors["b_mag"])
    open_MNh = gate_MNh > 0
    f_MNh = masked(activation(form.magnitude, inner_MNh) * open_MNh, given.keep_N).to(centred_MNd.dtype)
    aux_MNh = masked(torch.relu(gate_MNh), given.keep_N).to(centred_MNd.dtype)
    error, squared_M, aux_squared_M = two_errors(f_MNh, aux_MNh, given)
    g_error = errors_to_gradients(form, error, f_MNh.dtype)
    g_codes = torch.bmm(g_error, given.low["W_dec"].mT).to(shared_MNh.dtype)
    g_f, g_aux = g_codes.chunk(2, 1)
    penalty_M = given.sparsity_M * form.penalty
    push_MNh = masked(column(penalty_M.unsqueeze(-1) * given.norm_Mh).expand_as(g_aux), given.keep_N)
    g_inner = g_f * open_MNh * activation_slope(form.magnitude, inner_MNh)
    g_gate = (g_aux + push_MNh) * open_MNh
    g_shared = g_gate + gain_M1h * g_inner
    per_latent_Mh = aux_MNh.sum(1, dtype=shared_MNh.dtype)
    sparsity_M = penalty_M * (per_latent_Mh * given.norm_Mh).sum(-1)
    fired_Mh = (f_MNh != 0).sum(1, dtype=shared_MNh.dtype)
    g_f_error = g_error.chunk(2, 1)[0]
    return Found(
        [("W_dec", f_MNh, g_f_error), ("W_enc", g_shared.to(f_MNh.dtype), centred_MNd)],
        {
            "b_gate": g_gate.sum(1),
            "b_mag": g_inner.sum(1),
            "r_mag": (g_inner * gain_M1h * shared_MNh).sum(1),
            "b_dec": g_f_error.sum(1, dtype=shared_MNh.dtype) - through(g_shared.sum(1), given.low["W_enc"]),
        },
        penalty_pull(form, penalty_M, per_latent_Mh, given.norm_Mh),
        torch.stack(
            [
                form.mse * squared_M + sparsity_M + form.aux * aux_squared_M,
                squared_M,
                sparsity_M,
                fired_Mh.sum(-1),
            ],
            -1,
        ),
        fired_Mh,
    )


def hard_concrete(form: Form, given: Given) -> Found:
    """f = z ⊙ magnitude; see :class:`saeopt.saes.hard_concrete.HardConcreteSAE`. `low["W_dec"]` has unit rows."""
    centred_MNd = centre(given)
    dtype = given.norm_Mh.dtype
    inner_MNh = encode(centred_MNd, given.low["W_enc"]).to(dtype) + column(given.vectors["b_enc"])
    bias_M1h = column(given.vectors["b_gate"])
    log_alpha_MNh = bias_M1h.expand_as(inner_MNh)
    if form.per_input_gate:
        log_alpha_MNh = encode(centred_MNd, given.low["W_gate"]).to(dtype) + bias_M1h
    z_MNh, slope_MNh = noisy_gate(form, given, log_alpha_MNh)
    magnitude_MNh = activation(form.magnitude, inner_MNh)
    f_MNh = masked(z_MNh * magnitude_MNh, given.keep_N).to(centred_MNd.dtype)
    error_MNd = masked(decode(f_MNh, given) - given.x_Nd, given.keep_N)
    g_error = (2 * form.mse * error_MNd).to(f_MNh.dtype)
    g_f = torch.bmm(g_error, given.low["W_dec"].mT).to(dtype)
    penalty_M, open_M, g_open = open_gates(form, given, log_alpha_MNh)
    g_inner = g_f * z_MNh * activation_slope(form.magnitude, inner_MNh)
    g_gate = g_f * magnitude_MNh * slope_MNh + g_open
    g_b_enc, g_b_gate = g_inner.sum(1), g_gate.sum(1)
    products = [("W_dec", f_MNh, g_error), ("W_enc", g_inner.to(f_MNh.dtype), centred_MNd)]
    g_b_dec = g_error.sum(1, dtype=dtype) - through(g_b_enc, given.low["W_enc"])
    if form.per_input_gate:
        products.append(("W_gate", g_gate.to(f_MNh.dtype), centred_MNd))
        g_b_dec = g_b_dec - through(g_b_gate, given.low["W_gate"])
    squared_M = error_MNd.square().sum((1, 2))
    sparsity_M = penalty_M * open_M
    fired_Mh = (f_MNh != 0).sum(1, dtype=dtype)
    totals = [form.mse * squared_M + sparsity_M, squared_M, sparsity_M, fired_Mh.sum(-1)]
    vectors = {"b_enc": g_b_enc, "b_gate": g_b_gate, "b_dec": g_b_dec}
    return Found(products, vectors, None, torch.stack(totals, -1), fired_Mh)


def gated_hard_concrete(form: Form, given: Given) -> Found:
    """f = z ⊙ magnitude; see :class:`saeopt.saes.gated_hard_concrete.GatedHardConcreteSAE`."""
    centred_MNd = centre(given)
    shared_MNh = encode(centred_MNd, given.low["W_enc"]).to(given.norm_Mh.dtype)
    gain_M1h = column(given.vectors["r_mag"].exp())
    log_alpha_MNh = shared_MNh + column(given.vectors["b_gate"])
    inner_MNh = gain_M1h * shared_MNh + column(given.vectors["b_mag"])
    magnitude_MNh = activation(form.magnitude, inner_MNh)
    z_MNh, slope_MNh = noisy_gate(form, given, log_alpha_MNh)
    f_MNh = masked(z_MNh * magnitude_MNh, given.keep_N).to(centred_MNd.dtype)
    weight_MNh = torch.ones_like(z_MNh) if form.seed_aux else torch.relu(log_alpha_MNh)
    aux_MNh = masked(z_MNh * weight_MNh, given.keep_N).to(centred_MNd.dtype)
    error, squared_M, aux_squared_M = two_errors(f_MNh, aux_MNh, given)
    g_error = errors_to_gradients(form, error, f_MNh.dtype)
    g_f, g_aux = torch.bmm(g_error, given.low["W_dec"].mT).to(shared_MNh.dtype).chunk(2, 1)
    penalty_M, open_M, g_open = open_gates(form, given, log_alpha_MNh)
    g_inner = g_f * z_MNh * activation_slope(form.magnitude, inner_MNh)
    g_gate = (g_f * magnitude_MNh + g_aux * weight_MNh) * slope_MNh + g_open
    if not form.seed_aux:
        g_gate = g_gate + g_aux * z_MNh * (log_alpha_MNh > 0)
    g_shared = g_gate + gain_M1h * g_inner
    g_f_error = g_error.chunk(2, 1)[0]
    sparsity_M = penalty_M * open_M
    fired_Mh = (f_MNh != 0).sum(1, dtype=shared_MNh.dtype)
    loss_M = form.mse * squared_M + sparsity_M + form.aux * aux_squared_M
    return Found(
        [("W_dec", f_MNh, g_f_error), ("W_enc", g_shared.to(f_MNh.dtype), centred_MNd)],
        {
            "b_gate": g_gate.sum(1),
            "b_mag": g_inner.sum(1),
            "r_mag": (g_inner * gain_M1h * shared_MNh).sum(1),
            "b_dec": g_f_error.sum(1, dtype=shared_MNh.dtype) - through(g_shared.sum(1), given.low["W_enc"]),
        },
        None,
        torch.stack([loss_M, squared_M, sparsity_M, fired_Mh.sum(-1)], -1),
        fired_Mh,
    )


PASSES: dict[str, Callable[[Form, Given], Found]] = {
    "relu": relu,
    "gated": gated,
    "hard_concrete": hard_concrete,
    "gated_hard_concrete": gated_hard_concrete,
}


# ---- pieces
def column(vector_Mh: Tensor) -> Tensor:
    """(M, h) against (M, N, h)."""
    return vector_Mh.unsqueeze(1)


def masked(rows_MNx: Tensor, keep_N: Tensor | None) -> Tensor:
    """Rows of masked tokens become 0."""
    return rows_MNx if keep_N is None else rows_MNx * keep_N[None, :, None]


def centre(given: Given) -> Tensor:
    """x̄ = x − b_dec in the dtype of the products."""
    return (given.x_Nd - column(given.vectors["b_dec"])).to(given.low["W_enc"].dtype)


def encode(centred_MNd: Tensor, matrix_Mhd: Tensor) -> Tensor:
    """x̄ W."""
    return torch.bmm(centred_MNd, matrix_Mhd.mT)


def decode(f_MNh: Tensor, given: Given) -> Tensor:
    """f W_dec + b_dec, the sum in the weights' dtype."""
    return torch.bmm(f_MNh, given.low["W_dec"]) + column(given.vectors["b_dec"])


def through(vector_Mh: Tensor, matrix_Mhd: Tensor) -> Tensor:
    """Σ_h vector_h matrix_h: what b_dec gets through the encoder, with the opposite sign."""
    return torch.bmm(vector_Mh.to(matrix_Mhd.dtype).unsqueeze(1), matrix_Mhd).squeeze(1).to(vector_Mh.dtype)


def penalty_pull(form: Form, penalty_M: Tensor, per_latent_Mh: Tensor, norm_Mh: Tensor) -> Tensor | None:
    """∂(λ Σ f ‖W_dec‖)/∂W_dec as a multiple of W_dec; none where the norm is fixed."""
    if form.unit:
        return None
    return torch.where(norm_Mh > 0, penalty_M.unsqueeze(-1) * per_latent_Mh / norm_Mh, 0.0)


def two_errors(f_MNh: Tensor, aux_MNh: Tensor, given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """Errors of the code and of the auxiliary code, one below the other, and their squares per member."""
    both = decode(torch.cat([f_MNh, aux_MNh], 1), given)
    x_2Nd = torch.cat([given.x_Nd, given.x_Nd])
    keep_2N = None if given.keep_N is None else torch.cat([given.keep_N, given.keep_N])
    error = masked(both - x_2Nd, keep_2N)
    squared_M2 = error.square().unflatten(1, (2, -1)).sum((2, 3))
    return error, squared_M2[:, 0], squared_M2[:, 1]


def errors_to_gradients(form: Form, error: Tensor, dtype: torch.dtype) -> Tensor:
    """2 · coefficient · error of both halves."""
    code, aux = error.chunk(2, 1)
    return torch.cat([2 * form.mse * code, 2 * form.aux * aux], 1).to(dtype)


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
    assert given.u_MNh is not None
    low, high = form.limits
    beta_M11 = given.beta_M[:, None, None]
    s_MNh = torch.sigmoid((given.u_MNh.log() - torch.log1p(-given.u_MNh) + log_alpha_MNh) / beta_M11)
    stretched = s_MNh * (high - low) + low
    inside = (stretched >= 0) & (stretched <= 1)
    return stretched.clamp(0, 1), torch.where(inside, (high - low) / beta_M11 * s_MNh * (1 - s_MNh), 0.0)


def open_gates(form: Form, given: Given, log_alpha_MNh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """λ, Σ P(z ≠ 0) per member, and the gradient of λ Σ P on log α."""
    shift = math.log(-form.limits[0] / form.limits[1])
    p_MNh = torch.sigmoid(log_alpha_MNh - given.beta_M[:, None, None] * shift)
    penalty_M = given.sparsity_M * form.penalty
    g_MNh = masked(penalty_M[:, None, None] * p_MNh * (1 - p_MNh), given.keep_N)
    return penalty_M, masked(p_MNh, given.keep_N).sum((1, 2)), g_MNh
