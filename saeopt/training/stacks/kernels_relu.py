# mypy: disable-error-code="no-untyped-def"
"""A Triton kernel for the backward stage of relu: the gradient in place and three sums over tokens, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _backward(
    f_ptr, g_ptr, penalty_ptr, norm_ptr, sums_ptr, N, H, M, T, BN: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Rows [T·program, T·(program + 1)) of one block of latents of one member."""
    member = tl.program_id(2).to(tl.int64)
    c = tl.program_id(0) * BH + tl.arange(0, BH)
    cm = c < H
    push = tl.load(penalty_ptr + member) * tl.load(norm_ptr + member * H + c, mask=cm, other=0.0)
    # whole tiles are added up and reduced once: a reduction per tile would cross the warps each time
    g_sum = tl.zeros([BN, BH], tl.float32)
    f_sum = tl.zeros([BN, BH], tl.float32)
    fired = tl.zeros([BN, BH], tl.float32)
    first = tl.program_id(1) * T
    for n0 in range(first, first + T, BN):
        n = n0 + tl.arange(0, BN)
        mask = (n < N)[:, None] & cm[None, :]
        at = (member * N + n.to(tl.int64))[:, None] * H + c[None, :]
        f = tl.load(f_ptr + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
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


def backward(f_MNh: Tensor, g_MNh: Tensor, penalty_M: Tensor, norm_Mh: Tensor) -> Tensor:
    """g becomes 1[f > 0] (g + penalty · norm); gives Σ over tokens of g, of f and of 1[f > 0], (3, M, h)."""
    assert f_MNh.is_contiguous()
    assert g_MNh.is_contiguous()
    members, n, h = f_MNh.shape
    tokens = 256
    pieces = triton.cdiv(n, tokens)
    sums = torch.empty(3, pieces, members, h, device=f_MNh.device)
    block = min(256, triton.next_power_of_2(h))
    _backward[(triton.cdiv(h, block), pieces, members)](
        f_MNh, g_MNh, penalty_M, norm_Mh, sums, n, h, members, tokens, 8, block
    )
    return sums.sum(1)
