# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the jumprelu step: the code in the pre-activations' place, and the backward stage in one pass.

θ learns from pre-activations π in the band |π − θ| < ε / 2. What of them lies at or below θ has a code of 0, of which
the sign bit is set: the products do not see it, and the backward stage needs no π.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS, _STAGES = 16, 128, 3
_PIECE = 256
"""Tokens of one program."""


@triton.jit
def _code(
    pre_ptr, bias_ptr, theta_ptr, width_ptr, N, H, BN: tl.constexpr, BH: tl.constexpr
):  # fmt: skip
    """π 1[π > θ] instead of x̄ W_enc."""
    member = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * BH + tl.arange(0, BH)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    cm = c < H
    bias = tl.load(bias_ptr + member * H + c, mask=cm, other=0.0)[None, :]
    theta = tl.load(theta_ptr + member * H + c, mask=cm, other=0.0)[None, :]
    half = tl.load(width_ptr + member) * 0.5
    at = (member * N + n.to(tl.int64))[:, None] * H + c[None, :]
    mask = (n < N)[:, None] & cm[None, :]
    pre = tl.load(pre_ptr + at, mask=mask, other=0.0).to(tl.float32) + bias
    # Triton makes 0.0 of a literal -0.0
    below = ((theta - pre < half).to(tl.int32) << 31).to(tl.float32, bitcast=True)
    tl.store(pre_ptr + at, tl.where(pre > theta, pre, below), mask=mask)


@triton.jit
def _backward(
    f_ptr, g_ptr, keep_ptr, theta_ptr, width_ptr, push_ptr, sums_ptr, N, H, M,
    KEEP: tl.constexpr, T: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows [T·program, T·(program + 1)) of one block of latents of one member."""
    member = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * BH + tl.arange(0, BH)
    cm = c < H
    theta = tl.load(theta_ptr + member * H + c, mask=cm, other=0.0)[None, :]
    push = tl.load(push_ptr + member * H + c, mask=cm, other=0.0)[None, :]
    half = tl.load(width_ptr + member) * 0.5
    # whole tiles are added up and reduced once: a reduction per tile would cross the warps each time
    g_sum = tl.zeros([BN, BH], tl.float32)
    band_sum = tl.zeros([BN, BH], tl.float32)
    fired = tl.zeros([BN, BH], tl.float32)
    first = tl.program_id(1) * T
    for n0 in tl.range(0, T, BN, num_stages=STAGES):
        n = first + n0 + tl.arange(0, BN)
        mask = (n < N)[:, None] & cm[None, :]
        at = (member * N + n.to(tl.int64))[:, None] * H + c[None, :]
        code = tl.load(f_ptr + at, mask=mask, other=0.0)
        if code.dtype == tl.float32:
            marked = code.to(tl.int32, bitcast=True) < 0
        else:
            marked = code.to(tl.int16, bitcast=True) < 0
        f = code.to(tl.float32)
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
        fires = f > 0
        band = marked | (fires & (f - theta < half))
        if KEEP:
            kept = (tl.load(keep_ptr + n, mask=n < N, other=0.0) > 0)[:, None]
            fires = fires & kept
            band = band & kept
        band_sum += tl.where(band, theta * g + push, 0.0)
        g = tl.where(fires, g, 0.0)
        tl.store(g_ptr + at, g, mask=mask)
        g_sum += g
        fired += fires.to(tl.float32)
    out = (tl.program_id(1).to(tl.int64) * M + member) * H + c
    step = tl.num_programs(1).to(tl.int64) * M * H
    tl.store(sums_ptr + out, tl.sum(g_sum, 0), mask=cm)
    tl.store(sums_ptr + step + out, tl.sum(band_sum, 0), mask=cm)
    tl.store(sums_ptr + 2 * step + out, tl.sum(fired, 0), mask=cm)


def code(pre_MNh: Tensor, bias_Mh: Tensor, theta_Mh: Tensor, width_M: Tensor) -> None:
    """x̄ W_enc becomes the code; `width_M`: ε."""
    members, n, h = pre_MNh.shape
    block = min(512, triton.next_power_of_2(h))
    _code[(triton.cdiv(h, block), triton.cdiv(n, 8), members)](
        pre_MNh, bias_Mh, theta_Mh, width_M, n, h, 8, block, num_warps=4
    )


def backward(
    f_MNh: Tensor, g_MNh: Tensor, keep_N: Tensor | None, theta_Mh: Tensor, width_M: Tensor, push_Mh: Tensor
) -> Tensor:
    """g becomes 1[f > 0] g on kept tokens, 0 on the others.

    Gives sums over the tokens of each piece of g, of θ g + push in the band, and of 1[f > 0], (3, pieces, M, h).
    """
    members, n, h = f_MNh.shape
    pieces = triton.cdiv(n, _PIECE)
    sums = torch.empty(3, pieces, members, h, device=f_MNh.device)
    block = min(_COLUMNS, triton.next_power_of_2(h))
    _backward[(triton.cdiv(h, block), pieces, members)](
        f_MNh, g_MNh, keep_N, theta_Mh, width_M, push_Mh, sums, n, h, members, keep_N is not None, _PIECE, _ROWS,
        block, _STAGES, num_warps=4, maxnreg=112,
    )  # fmt: skip
    return sums
