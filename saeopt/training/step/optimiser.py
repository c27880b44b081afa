"""The optimiser's pieces: what becomes of W_dec's gradient, and Adam on the CPU (the GPU's is in `kernels.rows`)."""

from __future__ import annotations

import torch
from torch import Tensor

from saeopt.training.step.contract import StackOptions
from saeopt.training.step.storage import Store


def settle_decoder(grads: Store, W_dec_hd: Tensor, row_factor_h: Tensor | None, *, unit: bool) -> None:
    """Turn the sums over tokens into W_dec's gradient, in place.

    `pull` adds its multiple of W_dec (the penalty's part). With `row_factor_h` the decoder was used with rows
    W_dec · row_factor (fixed norm): only what is orthogonal to the row remains. `unit` takes the part along the
    row away (the spec's projection).
    """
    g_hd = grads["W_dec"]
    if "pull" in grads:
        g_hd.addcmul_(grads["pull"].unsqueeze(-1), W_dec_hd)
    if row_factor_h is not None:
        squared_h1 = W_dec_hd.square().sum(-1, keepdim=True).clamp_min(1e-24)
        g_hd.addcmul_((g_hd * W_dec_hd).sum(-1, keepdim=True) / squared_h1, W_dec_hd, value=-1)
        g_hd.mul_(row_factor_h.unsqueeze(-1))
    if unit:
        g_hd.addcmul_((g_hd * W_dec_hd).sum(-1, keepdim=True), W_dec_hd, value=-1)


def step_on_cpu(
    weights: Store, m: Store, v: Store, grads: Store, steps_before: float, lr: float, options: StackOptions
) -> None:
    """Adam (Kingma & Ba 2015) in one pass over memory per tensor: torch's own fused kernel."""
    names = list(weights)
    torch._fused_adam_(
        [weights[n] for n in names],
        [grads[n] for n in names],
        [m[n] for n in names],
        [v[n] for n in names],
        [],
        [torch.tensor(steps_before + 1) for _ in names],
        lr=lr,
        beta1=options.adam_betas[0],
        beta2=options.adam_betas[1],
        weight_decay=0.0,
        eps=options.adam_eps,
        amsgrad=False,
        maximize=False,
    )
