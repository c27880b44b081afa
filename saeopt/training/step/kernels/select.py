"""Triton kernels that select the largest of relu(pre + bias) in each row; exact.

Rows are (member, token) pairs, member first. The k-th largest value is found by bisection on the bits of
non-negative floats (their order is that of the integers); ties at the threshold go to the lower index.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_SEGMENT = 8192
_GROUP, _WIDE_GROUP = 8, 16
"""Neighbours of a group, in rows up to a segment and in wider ones, where half as many groups are chosen from."""
_ROWS = 4
_SELECTABLE = 32768
"""A wider row does not fit into the registers."""
_WIDEST_ROW = 65536
"""Wider rows are selected from in segments."""


@triton.jit
def _threshold(key, top, k, ENOUGH):
    """lo, hi, count ≥ lo, count ≥ hi, with hi > lo: at least k keys are ≥ lo (at most ENOUGH, but for ties), fewer
    than k ≥ hi. `key` has at least k elements ≥ 0.

    Bisection by value first, which suits how activations are spread, then by bits, which always ends. In between
    comes lo + 1: it ends the search where fewer than k keys are above 0.
    """
    lo = top * 0
    hi = top + 1
    below = top * 0 + ENOUGH + 1
    above = top * 0
    turns = top * 0
    while (hi - lo > 1) & (below > ENOUGH):
        middle = lo + (hi - lo) // 2
        if turns < 14:
            value = 0.5 * (lo.to(tl.float32, bitcast=True) + hi.to(tl.float32, bitcast=True))
            middle = tl.minimum(tl.maximum(value.to(tl.int32, bitcast=True), lo + 1), hi - 1)
        elif turns == 14:
            middle = lo + 1
        turns += 1
        found = tl.sum((key >= middle).to(tl.int32), 0)
        if found >= k:
            lo = middle
            below = found
        else:
            hi = middle
            above = found
    return lo, hi, below, above


@triton.jit
def _places(key, lo, hi, above, k):
    """Which keys are taken and at which place: those ≥ hi, then those in [lo, hi) up to k in all."""
    sure = (key >= hi).to(tl.int32)
    tie = ((key >= lo) & (key < hi)).to(tl.int32)
    rank = tl.cumsum(sure + (tie << 16), 0)
    place = tl.where(sure > 0, (rank & 0xFFFF) - 1, above + (rank >> 16) - 1)
    # with 32768 ties the upper half wraps to a negative place; those before it fill k
    return ((sure > 0) | (tie > 0)) & (place >= 0) & (place < k), place


@triton.jit
def _code(pre_ptr, bias_ptr, keep_ptr, row, c, mask, N, W, KEEP: tl.constexpr):
    """relu(pre + bias) at columns c of a row, 0 where it is masked."""
    value = tl.load(pre_ptr + row * W + c, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias_ptr + (row // N) * W + c, mask=mask, other=0.0)
    if KEEP:
        value *= tl.load(keep_ptr + row % N)
    return tl.where(mask & (value > 0), value, 0.0)


@triton.jit
def _groups(
    pre_ptr, bias_ptr, keep_ptr, k_ptr, best_ptr, groups_ptr, N, W, blocks, total,
    KEEP: tl.constexpr, CAP: tl.constexpr, G: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """At least k (at most CAP) groups of G neighbours with the largest maxima of relu(pre + bias); −1 fills up.

    A program takes R rows of one member at a time, in pieces of C columns: one load of the bias serves R rows. Their
    maxima pass through memory that only this program uses, because a whole row in registers would fill the
    multiprocessor and leave nothing to do while it waits for the row.
    """
    number = W // G
    best_ptr += tl.program_id(0) * R * B
    for work in range(tl.program_id(0), total, tl.num_programs(0)):
        member = (work // blocks).to(tl.int64)
        first = (work % blocks) * R
        n = first + tl.arange(0, R)
        row_ptr = pre_ptr + (member * N + n)[:, None] * W
        for c0 in range(0, W, C):
            c = c0 + tl.arange(0, C)
            mask = (n < N)[:, None] & (c < W)[None, :]
            value = tl.load(row_ptr + c[None, :], mask=mask, other=float("-inf")).to(tl.float32)
            value += tl.load(bias_ptr + member * W + c, mask=c < W, other=0.0)[None, :]
            best = tl.max(tl.reshape(value, [R, C // G, G]), 2)
            group = c0 // G + tl.arange(0, C // G)
            tl.store(best_ptr + tl.arange(0, R)[:, None] * B + group[None, :], best, mask=(group < number)[None, :])
        tl.debug_barrier()
        k = tl.load(k_ptr + member)
        for r in range(min(R, N - first)):
            row = member * N + first + r
            group = tl.arange(0, B)
            best = tl.load(best_ptr + r * B + group, mask=group < number, other=0.0)
            if KEEP:
                best *= tl.load(keep_ptr + first + r)
            best = tl.where(best > 0, best, 0.0)
            key = tl.where(group < number, best.to(tl.int32, bitcast=True), -1)
            lo, hi, _, above = _threshold(key, tl.max(key, 0), k, CAP)
            taken, place = _places(key, lo, hi, above, CAP)
            tl.store(groups_ptr + row * CAP + place, group, mask=taken)
            rest = tl.arange(0, CAP)
            unused = rest >= tl.sum(taken.to(tl.int32), 0)
            tl.store(groups_ptr + row * CAP + rest, tl.full([CAP], -1, tl.int32), mask=unused)
        tl.debug_barrier()


@triton.jit
def _store(values_ptr, index_ptr, key, value, c, k, W, K: tl.constexpr, KP: tl.constexpr):
    """The k largest of a row and their columns; index W and value 0 fill up to K, and stand for what is not above 0."""
    lo, hi, _, above = _threshold(key, tl.max(key, 0), k, k)
    taken, place = _places(key, lo, hi, above, k)
    tl.store(values_ptr + place, value, mask=taken)
    tl.store(index_ptr + place, tl.where(value > 0, c, W), mask=taken)
    rest = tl.arange(0, KP)
    unused = (rest >= k) & (rest < K)
    tl.store(values_ptr + rest, tl.zeros([KP], tl.float32), mask=unused)
    tl.store(index_ptr + rest, tl.zeros([KP], tl.int32) + W, mask=unused)


@triton.jit
def _survivors(
    pre_ptr, bias_ptr, keep_ptr, k_ptr, groups_ptr, values_ptr, index_ptr, N, W,
    KEEP: tl.constexpr, K: tl.constexpr, CAP: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """The k largest of relu(pre + bias) within the groups of a row."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, CAP * G)
    group = tl.load(groups_ptr + row * CAP + j // G)
    c = group * G + j % G
    mask = group >= 0
    value = _code(pre_ptr, bias_ptr, keep_ptr, row, c, mask, N, W, KEEP)
    key = tl.where(mask, value.to(tl.int32, bitcast=True), -1)
    _store(values_ptr + row * K, index_ptr + row * K, key, value, c, tl.load(k_ptr + row // N), W, K, CAP)


@triton.jit
def _select(
    pre_ptr, bias_ptr, keep_ptr, values_ptr, found_ptr, N, W,
    KEEP: tl.constexpr, K: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The K largest of relu(pre + bias) in one segment of one row."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * B + tl.arange(0, B)
    mask = c < W
    value = _code(pre_ptr, bias_ptr, keep_ptr, row, c, mask, N, W, KEEP)
    # places past the end lose every tie
    key = tl.where(mask, value.to(tl.int32, bitcast=True), -1)
    lo, hi, _, above = _threshold(key, tl.max(key, 0), K, K)
    taken, place = _places(key, lo, hi, above, K)
    out = (row * tl.num_programs(1) + tl.program_id(1)) * K + place
    tl.store(values_ptr + out, value, mask=taken)
    tl.store(found_ptr + out, c, mask=taken)


@triton.jit
def _select_again(
    given_ptr, found_ptr, k_ptr, values_ptr, index_ptr, N, H, W, K: tl.constexpr, KP: tl.constexpr, B: tl.constexpr
):
    """The k largest of the W values that the segments of a row left, with the indices that came with them."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, B)
    mask = j < W
    value = tl.load(given_ptr + row * W + j, mask=mask, other=0.0)
    c = tl.load(found_ptr + row * W + j, mask=mask, other=0)
    key = tl.where(mask, value.to(tl.int32, bitcast=True), -1)
    _store(values_ptr + row * K, index_ptr + row * K, key, value, c, tl.load(k_ptr + row // N), H, K, KP)


@triton.jit
def _keep_largest(
    pre_ptr, bias_ptr, keep_ptr, out_ptr, N, W, KEEP: tl.constexpr, ALL: tl.constexpr, K: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """relu(pre + bias) of one row, and 0 where it is not among the K largest (ALL: all are kept)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, B)
    mask = c < W
    value = _code(pre_ptr, bias_ptr, keep_ptr, row, c, mask, N, W, KEEP)
    if not ALL:
        key = value.to(tl.int32, bitcast=True)
        lo, hi, below, above = _threshold(key, tl.max(key, 0), K, K)
        taken = key >= lo
        if below > K:  # equal values at the threshold
            tie = ((key >= lo) & (key < hi)).to(tl.int32)
            taken = (key >= hi) | ((tie > 0) & (above + tl.cumsum(tie, 0) <= K))
        value = tl.where(taken, value, 0.0)
    tl.store(out_ptr + row * W + c, value, mask=mask)


def _warps(block: int) -> int:
    return max(1, min(16, block // 1024))


def select(pre_MNh: Tensor, bias_Mh: Tensor, keep_N: Tensor | None, k_M: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values (float32) and indices (int32), (M · N, k), of each member's k_M largest of relu(pre + bias).

    `k` is the largest of k_M (int32). Places without a value above 0 hold value 0 and index h.

    Two stages: the k groups with the largest maxima hold the k largest elements. Where that saves nothing, and in
    very wide rows, per segment and then over the segments' own k largest.
    """
    members, n, h = pre_MNh.shape
    rows, device = members * n, pre_MNh.device
    capacity = triton.next_power_of_2(k)
    group = _WIDE_GROUP if h > _SEGMENT else _GROUP
    if h % group or h > _WIDEST_ROW or 2 * capacity * group > h:
        return _select_by_segment(pre_MNh, bias_Mh, keep_N, k_M, k)
    groups = torch.empty(rows, capacity, dtype=torch.int32, device=device)
    values = torch.empty(rows, k, device=device)
    index = torch.empty(rows, k, dtype=torch.int32, device=device)
    masked = keep_N is not None
    width = triton.next_power_of_2(h // group)
    warps = max(1, min(4, width // 1024))
    registers = 128 if warps > 1 else 64
    blocks = triton.cdiv(n, _ROWS)
    resident = 2048 // (warps * registers) * torch.cuda.get_device_properties(device).multi_processor_count
    programs = min(members * blocks, resident)
    best = torch.empty(programs, _ROWS, width, device=device)
    _groups[(programs,)](
        pre_MNh, bias_Mh, keep_N, k_M, best, groups, n, h, blocks, members * blocks,
        masked, capacity, group, _ROWS, 512 * warps, width, num_warps=warps, maxnreg=registers,
    )  # fmt: skip
    _survivors[(rows,)](
        pre_MNh, bias_Mh, keep_N, k_M, groups, values, index, n, h, masked, k, capacity, group,
        num_warps=max(1, min(8, capacity * group // 512)),
    )  # fmt: skip
    return values, index


def _select_by_segment(
    pre_MNh: Tensor, bias_Mh: Tensor, keep_N: Tensor | None, k_M: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    members, n, h = pre_MNh.shape
    rows, device = members * n, pre_MNh.device
    padded = triton.next_power_of_2(k)
    block = max(padded, min(_SEGMENT, triton.next_power_of_2(h)))
    segments = triton.cdiv(h, block)
    # a last segment with fewer than k elements leaves places: value 0
    values = torch.zeros(rows, segments * k, device=device)
    found = torch.zeros(rows, segments * k, dtype=torch.int32, device=device)
    _select[(rows, segments)](
        pre_MNh, bias_Mh, keep_N, values, found, n, h, keep_N is not None, k, block, num_warps=_warps(block)
    )
    best, where = torch.empty(rows, k, device=device), torch.empty(rows, k, dtype=torch.int32, device=device)
    block = triton.next_power_of_2(segments * k)
    _select_again[(rows,)](
        values, found, k_M, best, where, n, h, segments * k, k, padded, block, num_warps=_warps(block)
    )
    return best, where


def keep_largest(pre_MNC: Tensor, bias_MC: Tensor, keep_N: Tensor | None, k: int) -> Tensor:
    """relu(pre + bias) where it is among the k largest of its row, 0 elsewhere; in pre's dtype."""
    members, n, width = pre_MNC.shape
    out = torch.empty_like(pre_MNC)
    block = triton.next_power_of_2(width)
    whole = k >= width or block > _SELECTABLE
    _keep_largest[(members * n,)](
        pre_MNC, bias_MC, keep_N, out, n, width, keep_N is not None, whole, k, block,
        num_warps=max(1, min(16, block // 512)),
    )  # fmt: skip
    if k < width and whole:
        largest = out.topk(k, dim=-1, sorted=False)
        return torch.zeros_like(out).scatter_(-1, largest.indices, largest.values)
    return out
