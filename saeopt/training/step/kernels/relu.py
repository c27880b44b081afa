# mypy: disable-error-code="no-untyped-def"
"""A Triton kernel for the backward stage of relu: the gradient in place and three sums over tokens, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS, _STAGES = 16, 128, 3
_PIECE = 256
"""Tokens of one program."""


@triton.jit
def _backward(
    f_ptr, g_ptr, keep_ptr, push_ptr, sums_ptr, N, H, M,
    KEEP: tl.constexpr, T: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Rows [T·program, T·(program + 1)) of one block of latents of one member."""
    member = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * BH + tl.arange(0, BH)
    cm = c < H
    push = tl.load(push_ptr + member * H + c, mask=cm, other=0.0)
    # whole tiles are added up and reduced once: a reduction per tile would cross the warps each time
    g_sum = tl.zeros([BN, BH], tl.float32)
    f_sum = tl.zeros([BN, BH], tl.float32)
    fired = tl.zeros([BN, BH], tl.float32)
    first = tl.program_id(1) * T
    for n0 in tl.range(0, T, BN, num_stages=STAGES):
        n = first + n0 + tl.arange(0, BN)
        mask = (n < N)[:, None] & cm[None, :]
        at = (member * N + n.to(tl.int64))[:, None] * H + c[None, :]
        f = tl.load(f_ptr + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if KEEP:
            f *= tl.load(keep_ptr + n, mask=n < N, other=0.0)[:, None]
        g = tl.where(f > 0, g + push[None, :], 0.0)
        tl.store(g_ptr + at, g, mask=mask)
        g_sum += g
        f_sum += f
        fired += (f > 0).to(tl.float32)
    out = (tl.program_id(1).to(tl.int64) * M + member) * H + c
    step = tl.num_programs(1).to(tl.int64) * M * H
    tl.store(sums_ptr + out, tl.sum(g_sum, 0), mask=cm)
    tl.store(sums_ptr + step + out, tl.sum(f_sum, 0), mask=cm)
    tl.store(sums_ptr + 2 * step + out, tl.sum(fired, 0), mask=cm)


def backward(f_MNh: Tensor, g_MNh: Tensor, keep_N: Tensor | None, push_Mh: Tensor) -> Tensor:
    """g becomes 1[f > 0] (g + push) on kept tokens, 0 on the others.

    Gives sums over the tokens of each piece of g, of f and of 1[f > 0], (3, pieces, M, h).
    """
    members, n, h = f_MNh.shape
    pieces = triton.cdiv(n, _PIECE)
    sums = torch.empty(3, pieces, members, h, device=f_MNh.device)
    block = min(_COLUMNS, triton.next_power_of_2(h))
    _backward[(triton.cdiv(h, block), pieces, members)](
        f_MNh, g_MNh, keep_N, push_Mh, sums, n, h, members, keep_N is not None, _PIECE, _ROWS, block, _STAGES,
        num_warps=4,
    )  # fmt: skip
    return sums
