"""The optimiser on a CUDA device: kernels over the rows of the matrices, one compiled function for what is small.

Shape suffixes: M members, h dictionary width, V vectors end to end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saeopt.training.step.books import Books, count, judge, kept
from saeopt.training.step.compiled import compiled
from saeopt.training.step.contract import Optimiser, Parts, StackOptions, Store
from saeopt.training.step.forms import Form
from saeopt.training.step.kernels import rows as kernels_rows
from saeopt.training.step.numbers import Table
from saeopt.training.step.optimiser import PULL
from saeopt.training.step.storage import VECTORS, Packed


class GpuOptimiser(Optimiser):
    """All members at once; nothing waits for the device."""

    def __init__(self, storage: Packed, table: Table, books: Books, options: StackOptions, *, compiling: bool) -> None:
        self.storage, self.table, self.books = storage, table, books
        self.finish_small = compiled(finish_small, compiling)
        self.mode = row_mode(storage.form)
        at = table.names
        self.rules = rules_of(storage)
        self.fixed = Fixed(options.adam_betas, options.adam_eps, at["lr"], at["max_grad_norm"])

    def finish(self, parts: Parts, aux_M: Tensor) -> Tensor:
        """As the contract says."""
        storage, books, grads = self.storage, self.books, parts.grads
        weights, m, v, factor_Mh = storage.weights, storage.m, storage.v, storage.factor_Mh
        coefficients, squares_Mh = kernels_rows.decoder_rows(
            grads["W_dec"], weights["W_dec"], grads.get(PULL), factor_Mh, self.mode
        )
        for name in storage.matrices:
            if name != "W_dec":
                kernels_rows.add_row_squares(grads[name], squares_Mh)
        scalars = self.finish_small(
            squares_Mh,
            aux_M,
            (weights[VECTORS], m[VECTORS], v[VECTORS], grads[VECTORS]),
            parts.window,
            books.flags,
            books.pending,
            storage.since_Mh,
            self.table.on_device,
            self.rules,
            self.fixed,
        )
        for name in storage.matrices:
            decoder = name == "W_dec"
            kernels_rows.adam_rows(
                grads[name],
                weights[name],
                m[name],
                v[name],
                None if storage.shares(name) else storage.low[name],
                scalars,
                self.fixed.betas,
                self.fixed.eps,
                coefficients=coefficients if decoder else None,
                norm_Mh=storage.norm_Mh if decoder else None,
                factor_Mh=factor_Mh if decoder else None,
                row_norm_M=storage.buffers.get("row_norm") if decoder else None,
                mode=self.mode if decoder else kernels_rows.FREE,
            )
        return books.flags["finite"]


class Fixed(NamedTuple):
    """What compiled code is specialised on: Adam's constants, and the columns of the numbers."""

    betas: tuple[float, float]
    eps: float
    lr: int
    max_grad_norm: int


def rules_of(storage: Packed) -> tuple[Tensor, Tensor] | None:
    """Learning-rate factors and least values (V) of the vectors, where some are stepped in a way of their own."""
    if not storage.rules:
        return None
    factor_V = torch.ones_like(storage.weights[VECTORS][0])
    least_V = torch.full_like(factor_V, -torch.inf)
    for part, rule in storage.rules:
        factor_V[part], least_V[part] = rule.lr_factor, rule.least
    return factor_V, least_V


def row_mode(form: Form) -> int:
    """What the decoder's rows may do, in the kernels' words."""
    if form.directions:
        return kernels_rows.DIRECTION_UNIT if form.unit else kernels_rows.DIRECTION
    return kernels_rows.UNIT if form.unit else kernels_rows.FREE


def finish_small(
    squares_Mh: Tensor,
    aux_M: Tensor,
    vectors: tuple[Tensor, Tensor, Tensor, Tensor],
    window: Store,
    flags: Store,
    pending: Store,
    since_Mh: Tensor,
    numbers: Tensor,
    rules: tuple[Tensor, Tensor] | None,
    fixed: Fixed,
) -> Tensor:
    """Norm, clip and health of every member, Adam on the vectors, the books; gives the kernels' scalars (M, 4)."""
    (weights, m, v, g), (betas, eps, lr, most) = vectors, fixed
    n = kept(window).clamp_min(1)
    norm_M = (squares_Mh.sum(1).double() + g.square().sum(1).double()).sqrt() / n
    go_M, clip_M = judge(norm_M, window, flags, numbers[:, lr], numbers[:, most])
    step_M = flags["step"] + 1
    rate_M, c2_M, gain_M = numbers[:, lr] / (1 - betas[0] ** step_M), 1 / (1 - betas[1] ** step_M), clip_M / n
    scalars = torch.stack([rate_M, c2_M, gain_M, go_M.double()], -1).to(torch.float32)
    rate, c2, gain, go = (column.to(g.dtype).unsqueeze(1) for column in (rate_M, c2_M, gain_M, go_M))
    g = g * gain
    m_new, v_new = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
    if rules is not None:
        rate = rate * rules[0]
    stepped = weights - rate * m_new / ((v_new * c2).sqrt() + eps)
    if rules is not None:
        stepped = torch.maximum(stepped, rules[1])
    for old, new in ((weights, stepped), (m, m_new), (v, v_new)):
        old.copy_(torch.where(go > 0, new, old))
    count(go_M, norm_M, aux_M, window, flags, pending, since_Mh)
    return scalars
