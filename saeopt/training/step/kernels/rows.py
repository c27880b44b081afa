"""Triton kernels over the rows of stacked matrices (M, h, d): gradient norms and Adam.

One program handles a block of rows in pieces of their width, all members in one launch. Scalars of a member lie in
`scalars` (M, 4): lr / (1 − β1^t), 1 / (1 − β2^t), clip / n, and 1 where the update is to be made.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FREE, UNIT, DIRECTION, DIRECTION_UNIT = 0, 1, 2, 3
"""What the decoder's rows may do: anything; stay at norm 1; only their direction is used; both."""


@triton.jit
def _decoder_rows(
    g_ptr, w_ptr, pull_ptr, factor_ptr, coefficients_ptr, squares_ptr, rows, D,
    MODE: tl.constexpr, PULL: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * R + tl.arange(0, R)
    rm = r < rows
    base = r.to(tl.int64)[:, None] * D
    gw = tl.zeros([R], tl.float32)
    ww = tl.zeros([R], tl.float32)
    gg = tl.zeros([R], tl.float32)
    for c0 in range(0, D, C):
        c = c0 + tl.arange(0, C)
        mask = rm[:, None] & (c < D)[None, :]
        g = tl.load(g_ptr + base + c[None, :], mask=mask, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + base + c[None, :], mask=mask, other=0.0)
        gg += tl.sum(g * g, 1)
        gw += tl.sum(g * w, 1)
        ww += tl.sum(w * w, 1)
    scale = tl.full([R], 1.0, tl.float32)
    pull = tl.zeros([R], tl.float32)
    if PULL:
        pull = tl.load(pull_ptr + r, mask=rm, other=0.0)
    if MODE == 1:
        pull = -gw
    if MODE >= 2:
        scale = tl.load(factor_ptr + r, mask=rm, other=1.0)
        pull = -scale * gw / tl.maximum(ww, 1e-24)
    tl.store(coefficients_ptr + 2 * r, scale, mask=rm)
    tl.store(coefficients_ptr + 2 * r + 1, pull, mask=rm)
    total = scale * scale * gg + 2 * scale * pull * gw + pull * pull * ww
    tl.store(squares_ptr + r, tl.maximum(total, 0.0), mask=rm)


@triton.jit
def _restore_rows(
    w_ptr, low_ptr, norm_ptr, factor_ptr, row_norm_ptr, member, r, rm, base, norm, D,
    MODE: tl.constexpr, LOW: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Rows after Adam as MODE wants them, with their norms, factors and copies."""
    inverse = 1.0 / tl.maximum(norm, 1e-12)
    row_norm = 1.0
    one = tl.full([R], 1.0, tl.float32)
    if MODE >= 2:
        row_norm = tl.load(row_norm_ptr + member)
        if MODE == 3:
            tl.store(factor_ptr + r, one * row_norm, mask=rm)
            tl.store(norm_ptr + r, one, mask=rm)
        else:
            tl.store(factor_ptr + r, inverse * row_norm, mask=rm)
            tl.store(norm_ptr + r, norm, mask=rm)
    for c0 in range(0, D, C):
        c = c0 + tl.arange(0, C)
        mask = rm[:, None] & (c < D)[None, :]
        at = base + c[None, :]
        w = tl.load(w_ptr + at, mask=mask, other=0.0)
        factor = inverse * row_norm
        if MODE != 2:
            w = w * inverse[:, None]
            tl.store(w_ptr + at, w, mask=mask)
            factor = one * row_norm
        if LOW:
            tl.store(low_ptr + at, w * factor[:, None], mask=mask)


@triton.jit
def _adam(
    g_ptr, w_ptr, m_ptr, v_ptr, low_ptr, coefficients_ptr, norm_ptr, factor_ptr, row_norm_ptr, scalars_ptr,
    H, D, b1, b2, eps,
    DECODER: tl.constexpr, MODE: tl.constexpr, LOW: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    member = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * R + tl.arange(0, R)
    rm = row < H
    r = member * H + row
    rate = tl.load(scalars_ptr + member * 4)
    c2 = tl.load(scalars_ptr + member * 4 + 1)
    gain = tl.load(scalars_ptr + member * 4 + 2)
    go = tl.load(scalars_ptr + member * 4 + 3)
    if go > 0:
        base = r[:, None] * D
        if DECODER:
            scale = tl.load(coefficients_ptr + 2 * r, mask=rm, other=0.0)
            pull = tl.load(coefficients_ptr + 2 * r + 1, mask=rm, other=0.0)
        ww = tl.zeros([R], tl.float32)
        for c0 in range(0, D, C):
            c = c0 + tl.arange(0, C)
            mask = rm[:, None] & (c < D)[None, :]
            at = base + c[None, :]
            g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
            w = tl.load(w_ptr + at, mask=mask, other=0.0)
            m = tl.load(m_ptr + at, mask=mask, other=0.0)
            v = tl.load(v_ptr + at, mask=mask, other=0.0)
            if DECODER:
                g = scale[:, None] * g + pull[:, None] * w
            g = g * gain
            m = m * b1 + g * (1 - b1)
            v = v * b2 + g * g * (1 - b2)
            w = w - rate * m / (tl.sqrt(v * c2) + eps)
            tl.store(m_ptr + at, m, mask=mask)
            tl.store(v_ptr + at, v, mask=mask)
            tl.store(w_ptr + at, w, mask=mask)
            if DECODER:
                ww += tl.sum(tl.where(mask, w * w, 0.0), 1)
            if LOW and not (DECODER and MODE > 0):
                tl.store(low_ptr + at, w, mask=mask)
        if DECODER:
            norm = tl.sqrt(ww)
            if MODE == 0:
                tl.store(norm_ptr + r, norm, mask=rm)
            else:
                tl.debug_barrier()  # the rows are read again there, by other threads than those that wrote them
                _restore_rows(
                    w_ptr, low_ptr, norm_ptr, factor_ptr, row_norm_ptr, member, r, rm, base, norm, D, MODE, LOW, R, C
                )


@triton.jit
def _row_squares(g_ptr, squares_ptr, rows, D, R: tl.constexpr, C: tl.constexpr):
    r = tl.program_id(0) * R + tl.arange(0, R)
    rm = r < rows
    base = r.to(tl.int64)[:, None] * D
    gg = tl.zeros([R], tl.float32)
    for c0 in range(0, D, C):
        c = c0 + tl.arange(0, C)
        mask = rm[:, None] & (c < D)[None, :]
        g = tl.load(g_ptr + base + c[None, :], mask=mask, other=0.0).to(tl.float32)
        gg += tl.sum(g * g, 1)
    tl.store(squares_ptr + r, tl.load(squares_ptr + r, mask=rm, other=0.0) + gg, mask=rm)


def _blocks(d: int) -> tuple[int, int]:
    columns = min(256, triton.next_power_of_2(d))
    return max(1, 2048 // columns), columns


def decoder_rows(
    g_Mhd: Tensor, W_Mhd: Tensor, pull_Mh: Tensor | None, factor_Mh: Tensor | None, mode: int
) -> tuple[Tensor, Tensor]:
    """(M, h, 2) scale and multiple of W that make g the decoder's gradient, and that gradient's squares (M, h)."""
    members, h, d = W_Mhd.shape
    coefficients = torch.empty(members, h, 2, device=W_Mhd.device)
    squares_Mh = torch.empty(members, h, device=W_Mhd.device)
    rows, columns = _blocks(d)
    total = members * h
    _decoder_rows[(triton.cdiv(total, rows),)](
        g_Mhd, W_Mhd, pull_Mh, factor_Mh, coefficients, squares_Mh, total, d,
        mode, pull_Mh is not None, rows, columns,
    )  # fmt: skip
    return coefficients, squares_Mh


def add_row_squares(g_Mhd: Tensor, squares_Mh: Tensor) -> None:
    """squares += Σ_d g²."""
    d = g_Mhd.shape[-1]
    rows, columns = _blocks(d)
    total = squares_Mh.numel()
    _row_squares[(triton.cdiv(total, rows),)](g_Mhd, squares_Mh, total, d, rows, columns)


def adam_rows(
    g: Tensor, W: Tensor, m: Tensor, v: Tensor, low: Tensor | None, scalars_M4: Tensor, betas: tuple[float, float],
    eps: float, *, coefficients: Tensor | None = None, norm_Mh: Tensor | None = None,
    factor_Mh: Tensor | None = None, row_norm_M: Tensor | None = None, mode: int = FREE,
) -> None:  # fmt: skip
    """Adam on all rows of one matrix of all members, and its copy in the products' dtype.

    With `coefficients` the matrix is the decoder: its rows' norms (and under UNIT and DIRECTION the rows) follow.
    """
    members, h, d = W.shape
    rows, columns = _blocks(d)
    _adam[(triton.cdiv(h, rows), members)](
        g, W, m, v, low, coefficients, norm_Mh, factor_Mh, row_norm_M, scalars_M4, h, d, *betas, eps,
        coefficients is not None, mode, low is not None, rows, columns,
    )  # fmt: skip
