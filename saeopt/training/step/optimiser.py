"""The fused optimiser on the CPU, and what becomes of W_dec's gradient (the GPU's is in `gpu.optimiser`)."""

from __future__ import annotations

import torch
from torch import Tensor

from saeopt.training.step.books import Books, count, judge, kept
from saeopt.training.step.contract import Parts, StackOptions, Store
from saeopt.training.step.numbers import Table
from saeopt.training.step.storage import VECTORS, Packed

PULL = "pull"
"""The multiple of W_dec that its gradient has besides (the penalty's part)."""


def settle_decoder(grads: Store, W_dec_hd: Tensor, row_factor_h: Tensor | None, *, unit: bool) -> None:
    """Turn the sums over tokens into W_dec's gradient, in place.

    With `row_factor_h` the decoder was used with rows W_dec · row_factor (fixed norm): only what is orthogonal to
    the row remains. `unit` takes the part along the row away (the spec's projection).
    """
    g_hd = grads["W_dec"]
    if PULL in grads:
        g_hd.addcmul_(grads[PULL].unsqueeze(-1), W_dec_hd)
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


class CpuOptimiser:
    """One member after another, where a decision on the host costs nothing."""

    def __init__(self, storage: Packed, table: Table, books: Books) -> None:
        self.storage, self.table, self.books = storage, table, books

    def finish(self, parts: Parts, aux_M: Tensor) -> Tensor:
        """As the contract says."""
        books, numbers, window = self.books, self.table.column, parts.window
        n = kept(window).clamp_min(1)
        norm_M = torch.stack([self._norm(i, parts.grads) for i in range(len(aux_M))]) / n
        go_M, clip_M = judge(norm_M, window, books.flags, numbers("lr"), numbers("max_grad_norm"))
        for i in go_M.nonzero().flatten().tolist():
            self._step(i, parts.grads, float(clip_M[i]) / float(n), float(numbers("lr")[i]))
        count(go_M, norm_M, aux_M, window, books.flags, books.pending, self.storage.since_Mh)
        self.storage.refresh()
        return go_M

    def _norm(self, member: int, grads: Store) -> Tensor:
        """Of the window's sums, once they are gradients."""
        storage, form = self.storage, self.storage.form
        own = {name: grads[name][member] for name in (*storage.weights, PULL) if name in grads}
        row_factor_h = storage.row_factor()[member] if form.directions else None
        settle_decoder(own, storage.weights["W_dec"][member], row_factor_h, unit=form.unit)
        return torch.stack([own[n].double().square().sum() for n in own if n != PULL]).sum().sqrt()

    def _step(self, member: int, grads: Store, gain: float, lr: float) -> None:
        storage, names = self.storage, list(self.storage.weights)
        own, weights, m, v = (
            {name: store[name][member] for name in names} for store in (grads, storage.weights, storage.m, storage.v)
        )
        for gradient in own.values():
            gradient.mul_(gain)
        before_V = weights[VECTORS].clone() if storage.rules else weights[VECTORS]
        step_on_cpu(weights, m, v, own, float(self.books.flags["step"][member]), lr, self.books.options)
        for part, rule in storage.rules:
            stepped = weights[VECTORS][part]
            stepped.copy_(before_V[part].lerp(stepped, rule.lr_factor).clamp_(min=rule.least))
        if storage.form.unit:
            W_dec = weights["W_dec"]
            W_dec.div_(W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12))
