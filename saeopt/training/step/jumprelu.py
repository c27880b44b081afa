"""The stages of jumprelu's dense pass, see `saeopt.saes.jumprelu`. Shape suffixes as in `dense`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saeopt.training.step.dense import Architecture, Back, Given, column, masked
from saeopt.training.step.forms import Form


class Cost(NamedTuple):
    """What the penalties give: loss terms that count as sparsity and others, and gradients.

    `push_Mh`: of an open latent, which reaches θ alone; `g_f`, `g_below`: of the code and of what lies below θ;
    `by_norm_Mh`: of ‖W_dec‖.
    """

    sparsity_M: Tensor
    push_Mh: Tensor
    more_M: Tensor | float = 0.0
    g_f: Tensor | float = 0.0
    g_below: Tensor | None = None
    by_norm_Mh: Tensor | None = None


def jumprelu_codes(form: Form, given: Given, pres: list[Tensor]) -> list[Tensor]:
    """f = π 1[π > θ]."""
    pre_MNh = pre_activation(given, pres)
    return [masked(pre_MNh * (pre_MNh > column(given.vectors["threshold"])), given.keep_N).to(pres[0].dtype)]


def jumprelu_back(form: Form, given: Given, pres: list[Tensor], codes: list[Tensor], g_codes: list[Tensor]) -> Back:
    """∂π = 1[π > θ] ∂f, and over the band around θ ∂θ = −Σ (θ ∂f + what an open latent costs) / ε."""
    pre_MNh, theta_M1h = pre_activation(given, pres), column(given.vectors["threshold"])
    open_MNh = masked((pre_MNh > theta_M1h).to(pre_MNh.dtype), given.keep_N)
    fired_Mh, width_M11 = open_MNh.sum(1), given.numbers["bandwidth"][:, None, None]
    push_Mh = push(form, given)
    if form.tanh:
        cost = tanh_cost(form, given, pre_MNh, open_MNh)
    else:
        cost = Cost(counted(form, given, push_Mh, fired_Mh), push_Mh)
    g_f = g_codes[0].to(pre_MNh.dtype) + cost.g_f
    near_MNh = masked(((pre_MNh - theta_M1h).abs() < width_M11 / 2).to(pre_MNh.dtype), given.keep_N)
    g_pre = g_f * open_MNh
    g_theta_Mh = -((theta_M1h * g_f + column(cost.push_Mh)) * near_MNh / width_M11).sum(1)
    if cost.g_below is not None:
        g_pre, g_theta_Mh = g_pre - cost.g_below, g_theta_Mh + cost.g_below.sum(1)
    g_b_enc, norm_Mh = g_pre.sum(1), given.norm_Mh
    pull_Mh = None
    if cost.by_norm_Mh is not None and not form.unit:
        pull_Mh = torch.where(norm_Mh > 0, cost.by_norm_Mh / norm_Mh, 0.0)
    vectors = {"b_enc": g_b_enc, "threshold": g_theta_Mh}
    return Back([g_pre.to(codes[0].dtype)], vectors, [g_b_enc], pull_Mh, cost.sparsity_M, fired_Mh, None, cost.more_M)


def pre_activation(given: Given, pres: list[Tensor]) -> Tensor:
    """π."""
    return pres[0] + column(given.vectors["b_enc"])


def weight(form: Form, given: Given) -> Tensor:
    """λ's factor per latent (M, h): larger for those that fire too often."""
    if not form.max_density:
        return torch.ones_like(given.vectors["threshold"])
    return 1 + form.density_coeff * (given.buffers["density"] / form.max_density - 1).clamp_min(0)


def excess(form: Form, given: Given) -> Tensor:
    """L0 / L0* − 1 in the window before, per member."""
    return given.buffers["last_l0"] / form.l0_target - 1


def push(form: Form, given: Given) -> Tensor:
    """What an open latent costs θ (M, h)."""
    slope_M = given.numbers["sparsity_coeff"] * form.penalty
    if form.l0_target:
        slope_M = slope_M * 2 * excess(form, given) / form.l0_target
    return slope_M.unsqueeze(-1) * weight(form, given)


def counted(form: Form, given: Given, push_Mh: Tensor, fired_Mh: Tensor) -> Tensor:
    """The sparsity term of L0: `step`, or `quadratic` with the L0 of the window before."""
    if not form.l0_target:
        return (push_Mh * fired_Mh).sum(-1)
    n = len(given.x_Nd) if given.keep_N is None else given.keep_N.sum()
    return given.numbers["sparsity_coeff"] * form.penalty * n * excess(form, given).square()


def tanh_cost(form: Form, given: Given, pre_MNh: Tensor, open_MNh: Tensor) -> Cost:
    """Σ tanh(4 f ‖W_dec‖), and what draws dead latents back."""
    weight_Mh, norm_Mh = push(form, given), given.norm_Mh
    tanh_MNh = torch.tanh(4 * pre_MNh * open_MNh * column(norm_Mh))
    slope_MNh = 4 * column(weight_Mh) * (1 - tanh_MNh.square())
    dead_Mh = given.buffers["tokens_since_fired"] >= form.dead_after
    drawn_Mh = form.pre_activation * dead_Mh.to(norm_Mh.dtype)
    below_MNh = masked((column(given.vectors["threshold"]) - pre_MNh).clamp_min(0), given.keep_N)
    below_Mh = below_MNh.sum(1) * drawn_Mh
    by_norm_Mh = (slope_MNh * pre_MNh * open_MNh).sum(1) + below_Mh
    return Cost(
        (weight_Mh * tanh_MNh.sum(1)).sum(-1),
        torch.zeros_like(weight_Mh),
        (below_Mh * norm_Mh).sum(-1),
        slope_MNh * column(norm_Mh),
        (below_MNh > 0) * column(drawn_Mh * norm_Mh),
        by_norm_Mh,
    )


JUMPRELU = Architecture(jumprelu_codes, jumprelu_back)
