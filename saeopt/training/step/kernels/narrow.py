# mypy: disable-error-code="no-untyped-def"
"""The step of relu and jumprelu for narrow models (small d) in two Triton kernels that never write the code down.

At d = 64 the code f_MNh is 32 times as large as x: reading and writing it is what the step would wait for. The
forward kernel keeps a block of tokens and walks over the latents; the backward kernel keeps a block of latents,
computes their code again and walks over the tokens. JUMP: jumprelu's, with θ. Shape suffixes as in `dense`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(
    x_ptr, centred_ptr, keep_ptr, we_ptr, wd_ptr, b_enc_ptr, b_dec_ptr, theta_ptr, g_ptr, squares_ptr, N, H, twice_mse,
    KEEP: tl.constexpr, JUMP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    member = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    nm = n < N
    c = tl.arange(0, DP)
    cm = c < D
    mask = nm[:, None] & cm[None, :]
    rows = (member * N + n.to(tl.int64))[:, None] * D + c[None, :]
    centred = tl.load(centred_ptr + rows, mask=mask, other=0.0)
    acc = tl.zeros([BN, DP], tl.float32)
    for h0 in range(0, H, BH):
        j = h0 + tl.arange(0, BH)
        jm = j < H
        at = (member * H + j)[:, None] * D + c[None, :]
        we = tl.load(we_ptr + at, mask=jm[:, None] & cm[None, :], other=0.0)
        wd = tl.load(wd_ptr + at, mask=jm[:, None] & cm[None, :], other=0.0)
        bias = tl.load(b_enc_ptr + member * H + j, mask=jm, other=0.0)
        f = tl.dot(centred, tl.trans(we)) + bias[None, :]
        if JUMP:
            theta = tl.load(theta_ptr + member * H + j, mask=jm, other=0.0)
            f = tl.where(f > theta[None, :], f, 0.0)
        else:
            f = tl.maximum(f, 0.0)
        acc = tl.dot(f.to(wd.dtype), wd, acc)
    x = tl.load(x_ptr + n[:, None] * D + c[None, :], mask=mask, other=0.0)
    e = acc + tl.load(b_dec_ptr + member * D + c, mask=cm, other=0.0)[None, :] - x
    e = tl.where(mask, e, 0.0)
    if KEEP:
        keep = tl.load(keep_ptr + n, mask=nm, other=0.0)
        # of a masked token nothing may remain: its code is 0 and so is its error
        e = e * keep[:, None]
    tl.store(squares_ptr + member * N + n, tl.sum(e * e, 1), mask=nm)
    tl.store(g_ptr + rows, e * twice_mse, mask=mask)


@triton.jit
def _backward(
    centred_ptr, g_ptr, keep_ptr, we_ptr, wd_ptr, b_enc_ptr, push_ptr, theta_ptr, width_ptr, gwe_ptr, gwd_ptr, sums_ptr,
    N, H, M, T, KEEP: tl.constexpr, JUMP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
    BH: tl.constexpr,
):  # fmt: skip
    member = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(2).to(tl.int64)
    j = tl.program_id(0) * BH + tl.arange(0, BH)
    jm = j < H
    c = tl.arange(0, DP)
    cm = c < D
    wm = jm[:, None] & cm[None, :]
    at = (member * H + j)[:, None] * D + c[None, :]
    we = tl.load(we_ptr + at, mask=wm, other=0.0)
    wd = tl.load(wd_ptr + at, mask=wm, other=0.0)
    bias = tl.load(b_enc_ptr + member * H + j, mask=jm, other=0.0)
    push = tl.load(push_ptr + member * H + j, mask=jm, other=0.0)
    if JUMP:
        theta = tl.load(theta_ptr + member * H + j, mask=jm, other=0.0)
        half = tl.load(width_ptr + member) * 0.5
    gwe = tl.zeros([BH, DP], tl.float32)
    gwd = tl.zeros([BH, DP], tl.float32)
    g_sum = tl.zeros([BH], tl.float32)
    second = tl.zeros([BH], tl.float32)  # Σ f, or over the band around θ what its gradient is made of
    fired = tl.zeros([BH], tl.float32)
    for n0 in range(piece * T, tl.minimum((piece + 1) * T, N), BN):
        n = n0 + tl.arange(0, BN)
        nm = n < N
        mask = nm[:, None] & cm[None, :]
        rows = (member * N + n.to(tl.int64))[:, None] * D + c[None, :]
        centred = tl.load(centred_ptr + rows, mask=mask, other=0.0)
        g = tl.load(g_ptr + rows, mask=mask, other=0.0)
        alive = nm
        if KEEP:
            alive = nm & (tl.load(keep_ptr + n, mask=nm, other=0.0) > 0)
        pre = tl.dot(we, tl.trans(centred)) + bias[:, None]
        g_f = tl.dot(wd, tl.trans(g))
        if JUMP:
            f = tl.where(alive[None, :] & (pre > theta[:, None]), pre, 0.0)
            low = f.to(we.dtype)
            g_pre = tl.where(f > 0, g_f, 0.0)
            band = alive[None, :] & (tl.abs(pre - theta[:, None]) < half)
            second += tl.sum(tl.where(band, theta[:, None] * g_f + push[:, None], 0.0), 1)
        else:
            f = tl.where(alive[None, :], tl.maximum(pre, 0.0), 0.0)
            low = f.to(we.dtype)
            g_pre = tl.where(f > 0, g_f + push[:, None], 0.0)
            second += tl.sum(low.to(tl.float32), 1)
        gwd = tl.dot(low, g, gwd)
        gwe = tl.dot(g_pre.to(we.dtype), centred, gwe)
        g_sum += tl.sum(g_pre, 1)
        fired += tl.sum((f > 0).to(tl.float32), 1)
    out = ((piece * M + member) * H + j)[:, None] * D + c[None, :]
    tl.store(gwe_ptr + out, gwe, mask=wm)
    tl.store(gwd_ptr + out, gwd, mask=wm)
    vector = (piece * M + member) * H + j
    step = tl.num_programs(2).to(tl.int64) * M * H
    tl.store(sums_ptr + vector, g_sum, mask=jm)
    tl.store(sums_ptr + step + vector, second, mask=jm)
    tl.store(sums_ptr + 2 * step + vector, fired, mask=jm)


def forward(
    x_Nd: Tensor, centred_MNd: Tensor, keep_N: Tensor | None, W_enc: Tensor, W_dec: Tensor, b_enc: Tensor,
    b_dec: Tensor, mse: float, theta_Mh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """2 · mse · error (M, N, d) in the dtype of the products, and ‖error‖² (M, N)."""
    members, n, d = centred_MNd.shape
    g_error = torch.empty_like(centred_MNd)
    squares = torch.empty(members, n, device=x_Nd.device)
    padded = max(16, triton.next_power_of_2(d))
    _forward[(triton.cdiv(n, 128), members)](
        x_Nd, centred_MNd, keep_N, W_enc, W_dec, b_enc, b_dec, theta_Mh, g_error, squares, n, W_enc.shape[1], 2 * mse,
        keep_N is not None, theta_Mh is not None, d, padded, 128, 64, num_warps=4, num_stages=3,
    )  # fmt: skip
    return g_error, squares


def backward(
    centred_MNd: Tensor, g_error: Tensor, keep_N: Tensor | None, W_enc: Tensor, W_dec: Tensor, b_enc: Tensor,
    push_Mh: Tensor, theta_Mh: Tensor | None = None, width_M: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of W_enc and W_dec (M, h, d), and Σ over tokens of ∂π, of f and of 1[f > 0], (3, M, h).

    With θ and ε (jumprelu) the second sum is that of θ ∂f + push over the band, as in `jumprelu.backward`.
    """
    (members, n, d), h = centred_MNd.shape, W_enc.shape[1]
    padded = max(16, triton.next_power_of_2(d))
    block = 64
    programs = triton.cdiv(h, block) * members
    pieces = max(1, min(triton.cdiv(n, 512), triton.cdiv(512, programs)))
    tokens = triton.cdiv(triton.cdiv(n, pieces), 64) * 64
    shape = (pieces, members, h, d)
    dtype = torch.float32 if pieces > 1 else W_enc.dtype
    g_enc, g_dec = (torch.empty(shape, dtype=dtype, device=W_enc.device) for _ in range(2))
    sums = torch.empty(3, pieces, members, h, device=W_enc.device)
    _backward[(triton.cdiv(h, block), members, pieces)](
        centred_MNd, g_error, keep_N, W_enc, W_dec, b_enc, push_Mh, theta_Mh, width_M, g_enc, g_dec, sums, n, h,
        members, tokens, keep_N is not None, theta_Mh is not None, d, padded, 64, block, num_warps=4, num_stages=3,
    )  # fmt: skip
    if pieces == 1:
        return g_enc[0], g_dec[0], sums[:, 0]
    return g_enc.sum(0).to(W_enc.dtype), g_dec.sum(0).to(W_enc.dtype), sums.sum(1)
