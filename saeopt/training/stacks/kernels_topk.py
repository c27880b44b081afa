"""Triton kernels of the topk step: exact selection, sparse decode with its error, gradients per latent.

Rows are (member, token) pairs, member first. Selection finds the k-th largest value by bisection on the bits of
non-negative floats (their order is that of the integers); ties at the threshold go to the lower index.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SEGMENT = 8192
_GROUP = 8
_WIDEST_ROW = 65536
"""Wider rows are selected from in segments."""


@triton.jit
def _threshold(key, top, K: tl.constexpr, ENOUGH: tl.constexpr):
    """lo, hi, count ≥ hi, with hi > lo: at least K keys are ≥ lo (at most ENOUGH, but for ties), fewer than K ≥ hi.

    Bisection by value first, which suits how activations are spread, then by bits, which always ends.
    """
    lo = top * 0
    hi = top + 1
    above = top * 0
    found = top * 0
    turns = top * 0
    while (hi - lo > 1) & ((found < K) | (found > ENOUGH)):
        middle = lo + (hi - lo) // 2
        if turns < 14:
            value = 0.5 * (lo.to(tl.float32, bitcast=True) + hi.to(tl.float32, bitcast=True))
            middle = tl.minimum(tl.maximum(value.to(tl.int32, bitcast=True), lo + 1), hi - 1)
        turns += 1
        found = tl.sum((key >= middle).to(tl.int32), 0)
        if found >= K:
            lo = middle
        else:
            hi = middle
            above = found
    return lo, hi, above


@triton.jit
def _places(key, lo, hi, above, K: tl.constexpr):
    """Which keys are taken and at which place: those ≥ hi, then those in [lo, hi) up to K in all."""
    sure = (key >= hi).to(tl.int32)
    tie = ((key >= lo) & (key < hi)).to(tl.int32)
    rank = tl.cumsum(sure + (tie << 16), 0)
    place = tl.where(sure > 0, (rank & 0xFFFF) - 1, above + (rank >> 16) - 1)
    return ((sure > 0) | (tie > 0)) & (place < K), place


@triton.jit
def _groups(
    pre_ptr, bias_ptr, keep_ptr, groups_ptr, N, W,
    KEEP: tl.constexpr, K: tl.constexpr, CAP: tl.constexpr, G: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """At least K (at most CAP) groups of G neighbours with the largest maxima of relu(pre + bias); −1 fills up."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, B)
    mask = c < W
    value = tl.load(pre_ptr + row * W + c, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias_ptr + (row // N) * W + c, mask=mask, other=0.0)
    if KEEP:
        value *= tl.load(keep_ptr + row % N)
    value = tl.where(mask & (value > 0), value, 0.0)
    best = tl.max(tl.reshape(value, [B // G, G]), 1)
    group = tl.arange(0, B // G)
    key = tl.where(group < W // G, best.to(tl.int32, bitcast=True), -1)
    lo, hi, above = _threshold(key, tl.max(key, 0), K, CAP)
    taken, place = _places(key, lo, hi, above, CAP)
    number = tl.sum(taken.to(tl.int32), 0)
    tl.store(groups_ptr + row * CAP + place, group, mask=taken)
    rest = tl.arange(0, CAP)
    tl.store(groups_ptr + row * CAP + rest, tl.full([CAP], -1, tl.int32), mask=rest >= number)


@triton.jit
def _survivors(
    pre_ptr, bias_ptr, keep_ptr, groups_ptr, values_ptr, index_ptr, N, W,
    KEEP: tl.constexpr, K: tl.constexpr, CAP: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """The K largest of relu(pre + bias) within the groups of a row."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, CAP * G)
    group = tl.load(groups_ptr + row * CAP + j // G)
    c = group * G + j % G
    mask = group >= 0
    value = tl.load(pre_ptr + row * W + c, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias_ptr + (row // N) * W + c, mask=mask, other=0.0)
    if KEEP:
        value *= tl.load(keep_ptr + row % N)
    value = tl.where(mask & (value > 0), value, 0.0)
    key = tl.where(mask, value.to(tl.int32, bitcast=True), -1)
    lo, hi, above = _threshold(key, tl.max(key, 0), K, K)
    taken, place = _places(key, lo, hi, above, K)
    tl.store(values_ptr + row * K + place, value, mask=taken)
    tl.store(index_ptr + row * K + place, c, mask=taken)


@triton.jit
def _select(
    pre_ptr, index_ptr, bias_ptr, keep_ptr, values_ptr, found_ptr, N, W,
    FIRST: tl.constexpr, KEEP: tl.constexpr, K: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The K largest of relu(pre + bias) in one segment of one row (FIRST), or of given values with indices."""
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    segments = tl.num_programs(1)
    c = segment * B + tl.arange(0, B)
    mask = c < W
    value = tl.load(pre_ptr + row * W + c, mask=mask, other=0.0).to(tl.float32)
    if FIRST:
        value += tl.load(bias_ptr + (row // N) * W + c, mask=mask, other=0.0)
        if KEEP:
            value *= tl.load(keep_ptr + row % N)
    value = tl.where(mask & (value > 0), value, 0.0)
    # places past the end lose every tie
    key = tl.where(mask, value.to(tl.int32, bitcast=True), -1)
    lo, hi, above = _threshold(key, tl.max(key, 0), K, K)
    taken, place = _places(key, lo, hi, above, K)
    out = (row * segments + segment) * K + place
    tl.store(values_ptr + out, value, mask=taken)
    if FIRST:
        tl.store(found_ptr + out, c, mask=taken)
    else:
        tl.store(found_ptr + out, tl.load(index_ptr + row * W + c, mask=taken, other=0), mask=taken)


@triton.jit
def _keep_largest(f_ptr, out_ptr, W, K: tl.constexpr, B: tl.constexpr):
    """The K largest of each row stay, the rest becomes 0."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, B)
    mask = c < W
    raw = tl.load(f_ptr + row * W + c, mask=mask, other=0.0)
    value = raw.to(tl.float32)
    key = tl.where(mask, value.to(tl.int32, bitcast=True), -1)
    lo, hi, above = _threshold(key, tl.max(key, 0), K, K)
    tie = ((key >= lo) & (key < hi)).to(tl.int32)
    taken = (key >= hi) | ((tie > 0) & (above + tl.cumsum(tie, 0) <= K))
    tl.store(out_ptr + row * W + c, tl.where(taken, raw, 0.0), mask=mask)


@triton.jit
def _decode(
    values_ptr, index_ptr, w_ptr, bias_ptr, x_ptr, scale_ptr, keep_ptr, error_ptr, dots_ptr, squares_ptr, N, H,
    factor, D: tl.constexpr, KEEP: tl.constexpr, DP: tl.constexpr, K: tl.constexpr, KB: tl.constexpr,
):  # fmt: skip
    """error = Σ_j value_j W[index_j] + bias − x · scale, ‖error‖², and factor · ⟨error, W[index_j]⟩ where value > 0."""
    row = tl.program_id(0).to(tl.int64)
    member = row // N
    n = row % N
    c = tl.arange(0, DP)
    cm = c < D
    acc = tl.zeros([DP], tl.float32)
    for j in range(0, K, KB):
        kk = j + tl.arange(0, KB)
        km = kk < K
        v = tl.load(values_ptr + row * K + kk, mask=km, other=0.0)
        i = tl.load(index_ptr + row * K + kk, mask=km, other=0).to(tl.int64)
        w = tl.load(w_ptr + (member * H + i)[:, None] * D + c[None, :], mask=km[:, None] & cm[None, :], other=0.0)
        acc += tl.sum(v[:, None] * w.to(tl.float32), 0)
    x = tl.load(x_ptr + n * D + c, mask=cm, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    e = acc + tl.load(bias_ptr + member * D + c, mask=cm, other=0.0) - x
    if KEEP:
        e *= tl.load(keep_ptr + n)
    e = tl.where(cm, e, 0.0)
    tl.store(error_ptr + row * D + c, e, mask=cm)
    tl.store(squares_ptr + row, tl.sum(e * e, 0))
    for j in range(0, K, KB):
        kk = j + tl.arange(0, KB)
        km = kk < K
        v = tl.load(values_ptr + row * K + kk, mask=km, other=0.0)
        i = tl.load(index_ptr + row * K + kk, mask=km, other=0).to(tl.int64)
        w = tl.load(w_ptr + (member * H + i)[:, None] * D + c[None, :], mask=km[:, None] & cm[None, :], other=0.0)
        dots = tl.sum(w.to(tl.float32) * e[None, :], 1) * factor
        tl.store(dots_ptr + row * K + kk, tl.where(v > 0, dots, 0.0), mask=km)


@triton.jit
def _by_latent(
    order_ptr, start_ptr, slot_ptr, values_ptr, dots_ptr, error_ptr, centred_ptr, g_dec_ptr, g_enc_ptr, g_bias_ptr,
    fired_ptr, factor, D: tl.constexpr, DP: tl.constexpr, K: tl.constexpr, TB: tl.constexpr,
):  # fmt: skip
    """One latent: the rows of both matrices' gradients from the tokens on which it was selected."""
    latent = tl.load(order_ptr + tl.program_id(0)).to(tl.int64)
    begin = tl.load(start_ptr + latent)
    end = tl.load(start_ptr + latent + 1)
    c = tl.arange(0, DP)
    cm = c < D
    dec = tl.zeros([DP], tl.float32)
    enc = tl.zeros([DP], tl.float32)
    bias = tl.zeros([TB], tl.float32)
    fired = tl.zeros([TB], tl.float32)
    for t0 in range(begin, end, TB):
        o = t0 + tl.arange(0, TB)
        om = o < end
        slot = tl.load(slot_ptr + o, mask=om, other=0).to(tl.int64)
        row = slot // K
        v = tl.load(values_ptr + slot, mask=om, other=0.0)
        g = tl.load(dots_ptr + slot, mask=om, other=0.0)
        mask = om[:, None] & cm[None, :]
        e = tl.load(error_ptr + row[:, None] * D + c[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(centred_ptr + row[:, None] * D + c[None, :], mask=mask, other=0.0).to(tl.float32)
        dec += tl.sum(v[:, None] * e, 0)
        enc += tl.sum(g[:, None] * x, 0)
        bias += g
        fired += (v > 0).to(tl.float32)
    tl.store(g_dec_ptr + latent * D + c, dec * factor, mask=cm)
    tl.store(g_enc_ptr + latent * D + c, enc, mask=cm)
    tl.store(g_bias_ptr + latent, tl.sum(bias, 0))
    tl.store(fired_ptr + latent, tl.sum(fired, 0))


@triton.jit
def _add_rows(
    places_ptr, factor_ptr, a_ptr, more_a_ptr, b_ptr, more_b_ptr, C, H, D, B: tl.constexpr
):  # fmt: skip
    member = tl.program_id(1).to(tl.int64)
    place = member * C + tl.program_id(0)
    row = tl.load(places_ptr + place)
    factor = tl.load(factor_ptr + member)
    if row >= 0:
        for c0 in range(0, D, B):
            c = c0 + tl.arange(0, B)
            mask = c < D
            at = (member * H + row) * D + c
            a = tl.load(a_ptr + at, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + at, mask=mask, other=0.0).to(tl.float32)
            a += factor * tl.load(more_a_ptr + place * D + c, mask=mask, other=0.0).to(tl.float32)
            b += factor * tl.load(more_b_ptr + place * D + c, mask=mask, other=0.0).to(tl.float32)
            tl.store(a_ptr + at, a, mask=mask)
            tl.store(b_ptr + at, b, mask=mask)


def add_rows(places_MC: Tensor, factor_M: Tensor, a: Tensor, more_a: Tensor, b: Tensor, more_b: Tensor) -> None:
    """Two matrices (M, h, d) get `factor` times rows (M, C, d) at their places; negative places are empty."""
    members, h, d = a.shape
    capacity = places_MC.shape[1]
    block = min(1024, triton.next_power_of_2(d))
    _add_rows[(capacity, members)](
        places_MC, factor_M, a, more_a, b, more_b, capacity, h, d, block, num_warps=max(1, min(4, block // 256))
    )


def _warps(block: int) -> int:
    return max(1, min(16, block // 1024))


def select(pre_MNh: Tensor, bias_Mh: Tensor, keep_N: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Values (float32) and indices (int32), (M · N, k), of the k largest of relu(pre + bias).

    Two stages: the k groups with the largest maxima hold the k largest elements. Where that saves nothing, and in
    very wide rows, per segment and then over the segments' own k largest.
    """
    members, n, h = pre_MNh.shape
    rows, device = members * n, pre_MNh.device
    block = triton.next_power_of_2(h)
    capacity = triton.next_power_of_2(k)
    capacity = 2 * capacity if h > _SEGMENT and 4 * capacity < 5 * k else capacity  # room ends the bisection early
    if h % _GROUP or h > _WIDEST_ROW or 2 * capacity * _GROUP > h:
        return _select_by_segment(pre_MNh, bias_Mh, keep_N, k)
    groups = torch.empty(rows, capacity, dtype=torch.int32, device=device)
    values = torch.empty(rows, k, device=device)
    index = torch.empty(rows, k, dtype=torch.int32, device=device)
    masked = keep_N is not None
    _groups[(rows,)](
        pre_MNh, bias_Mh, keep_N, groups, n, h, masked, k, capacity, _GROUP, block,
        num_warps=max(1, min(32, block // 2048)),
    )  # fmt: skip
    _survivors[(rows,)](
        pre_MNh, bias_Mh, keep_N, groups, values, index, n, h, masked, k, capacity, _GROUP,
        num_warps=max(1, min(8, capacity * _GROUP // 512)),
    )  # fmt: skip
    return values, index


def _select_by_segment(pre_MNh: Tensor, bias_Mh: Tensor, keep_N: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    members, n, h = pre_MNh.shape
    rows, device = members * n, pre_MNh.device
    block = max(triton.next_power_of_2(k), min(_SEGMENT, triton.next_power_of_2(h)))
    segments = triton.cdiv(h, block)
    # a last segment with fewer than k elements leaves places: value 0, index 0
    values = torch.zeros(rows, segments * k, device=device)
    index = torch.zeros(rows, segments * k, dtype=torch.int32, device=device)
    _select[(rows, segments)](
        pre_MNh, None, bias_Mh, keep_N, values, index, n, h,
        True, keep_N is not None, k, block, num_warps=_warps(block),
    )  # fmt: skip
    if segments == 1:
        return values, index
    best, where = torch.empty(rows, k, device=device), torch.empty(rows, k, dtype=torch.int32, device=device)
    block = triton.next_power_of_2(segments * k)
    _select[(rows, 1)](
        values, index, None, None, best, where, n, segments * k, False, False, k, block, num_warps=_warps(block)
    )
    return best, where


def keep_largest(f: Tensor, k: int) -> Tensor:
    """The k largest of each (non-negative) row, 0 elsewhere."""
    width = f.shape[-1]
    block = triton.next_power_of_2(width)
    if block > 16384:
        largest = f.topk(k, dim=-1, sorted=False)
        return torch.zeros_like(f).scatter_(-1, largest.indices, largest.values)
    out = torch.empty_like(f)
    _keep_largest[(f.numel() // width,)](f, out, width, k, block, num_warps=_warps(block))
    return out


def decode(
    values: Tensor, index: Tensor, W_Mhd: Tensor, b_dec_Md: Tensor, x_Nd: Tensor, scale: Tensor,
    keep_N: Tensor | None, factor: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Error (M, N, d) in W's dtype, `factor` · its dot products with the selected rows (M · N, k), squares (M, N)."""
    (rows, k), (members, h, d), n = values.shape, W_Mhd.shape, len(x_Nd)
    error = torch.empty(members, n, d, dtype=W_Mhd.dtype, device=values.device)
    dots = torch.empty(rows, k, device=values.device)
    squares = torch.empty(members, n, device=values.device)
    padded = triton.next_power_of_2(d)
    at_once = max(1, min(triton.next_power_of_2(k), 4096 // padded))
    _decode[(rows,)](
        values, index, W_Mhd, b_dec_Md, x_Nd, scale, keep_N, error, dots, squares, n, h, factor,
        d, keep_N is not None, padded, k, at_once, num_warps=max(1, min(8, padded * at_once // 1024)),
    )  # fmt: skip
    return error, dots, squares


def by_latent(
    values: Tensor, index: Tensor, dots: Tensor, error_MNd: Tensor, centred_MNd: Tensor, h: int, factor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of W_dec and W_enc (M, h, d), of b_enc (M, h), and the firing counts (M, h)."""
    members, _, d = error_MNd.shape
    k, device, latents = values.shape[1], values.device, members * h
    key = index.view(members, -1)
    if members > 1:
        key = key + torch.arange(0, latents, h, dtype=torch.int32, device=device).unsqueeze(1)
    ordered, slot = key.reshape(-1).sort(stable=True)
    start = torch.searchsorted(ordered, torch.arange(latents + 1, dtype=torch.int32, device=device), out_int32=True)
    longest_first = start.diff().sort(descending=True).indices
    g_dec = torch.empty(members, h, d, dtype=error_MNd.dtype, device=device)
    g_enc = torch.empty_like(g_dec)
    g_bias, fired = torch.empty(members, h, device=device), torch.empty(members, h, device=device)
    padded = triton.next_power_of_2(d)
    at_once = max(4, min(32, 8192 // padded))
    _by_latent[(latents,)](
        longest_first, start, slot, values, dots, error_MNd, centred_MNd, g_dec, g_enc, g_bias, fired, factor,
        d, padded, k, at_once, num_warps=max(1, min(8, padded * at_once // 2048)),
    )  # fmt: skip
    return g_dec, g_enc, g_bias, fired
