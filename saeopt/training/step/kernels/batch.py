"""Triton kernels that select the largest of relu(pre + bias) over all tokens of a micro-batch, for each member; exact.

Nothing is sorted. What reaches a floor, a little below the K-th largest of the micro-batch before, goes into a bag,
token by token; among that the K-th largest is found by counting (the order of non-negative floats is that of their
bits). Where the floor was too high or the bag has no room, all elements are looked at instead: that is slow, and the
next floor fits again. Ties go to the lower token, then to the lower latent, and what is selected lies in that order.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saeopt.training.step.kernels.bag import fill, ranks

_BLOCK = 4096
"""Elements that a program counts at a time."""
_TOKEN = 128
"""Elements of a token in the bag that a program looks at at a time."""
_ROOM = 3
"""Places in the bag for each element that is selected at most."""
_FLOOR = 0.93
"""The next floor as a share of the K-th largest. Lower, and the bag holds more; higher, and it is missed more often."""


class Ragged(NamedTuple):
    """The selection of M members: E places each, sorted by token, then latent; what is unused lies at the end.

    `values` and `latents` (M, E): above 0, and the latent (unused: 0 and h). `rows` (M, E): member · N + token (unused:
    (member + 1) · N). `start` (M, N + 1): the first place of each token, and how many places are used.
    """

    values: Tensor
    latents: Tensor
    rows: Tensor
    start: Tensor


@triton.jit
def _found_by(top_ptr, want_ptr, floor_ptr, member, room):
    """K, the least bits that are looked at, and whether all elements have to be."""
    top = tl.load(top_ptr + member)
    want = tl.load(want_ptr + member)
    floor = tl.load(floor_ptr + member)
    missed = top < want
    return want, tl.where(missed, 1, floor), (top > room) | (missed & (floor > 1))


@triton.jit
def _crossing(counts_ptr, want, BINS: tl.constexpr):
    """The last bin with at least `want` counts from there on (0 where there are fewer), and the counts behind it.

    Bin 0 may hold anything.
    """
    b = tl.arange(0, BINS)
    count = tl.load(counts_ptr + b)
    found = tl.max(tl.where((tl.cumsum(count, 0, reverse=True) >= want) & (b > 0), b, 0), 0)
    return found, tl.sum(tl.where(b > found, count, 0), 0)


@triton.jit
def _reached(counts_ptr, want, LEVELS: tl.constexpr):
    """How far above the least bits the K-th largest's bin begins, how many lie above that bin, and its width.

    A width is a power of 2, in bits' patterns. Level 0 has 128 bins of 2^14 from the least bits on, and behind them 128
    of 2^24; each further level cuts the bin that was found into up to 256.
    """
    found, above = _crossing(counts_ptr, want, 256)
    width = tl.where(found < 128, 14, 24)
    found = tl.where(found < 128, found << 14, (found - 128) << 24)
    for level in tl.static_range(1, LEVELS):  # nothing is counted where the width was 0
        width = tl.maximum(width - 8, 0)
        part, rest = _crossing(counts_ptr + 256 * level, want - above, 256)
        found += part << width
        above += rest
    return found, above, width


@triton.jit
def _digit(over, found, width, LEVEL: tl.constexpr):
    """The bin of this level, or 0, where anything may be."""
    if LEVEL == 0:
        which = tl.where(over < 1 << 21, over >> 14, 128 + (over >> 24))
        which = tl.where(over >= 0, which, 0)
    else:
        inside = (over >= found) & (over - found < (1 << width))
        which = tl.where(inside, (over - found) >> tl.maximum(width - 8, 0), 0)
    return which


@triton.jit
def _columns(pre_ptr, bias_ptr, c, H):
    """The bits of relu(pre + bias) at columns c of a token."""
    value = tl.load(pre_ptr + c, mask=c < H, other=0.0).to(tl.float32)
    value += tl.load(bias_ptr + c, mask=c < H, other=0.0)
    return tl.where((c < H) & (value > 0), value, 0.0).to(tl.int32, bitcast=True)


@triton.jit
def _count(
    pre_ptr, bias_ptr, keep_ptr, floor_ptr, want_ptr, top_ptr, bits_ptr, counts_ptr, N, H, room,
    KEEP: tl.constexpr, LEVEL: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Elements by the bits of this level, of those that agree with the K-th largest in the levels before."""
    member = tl.program_id(1).to(tl.int64)
    want, lowest, whole = _found_by(top_ptr, want_ptr, floor_ptr, member, room)
    counts_ptr += member * 1024
    found = want * 0
    width = want * 0 + 1
    if LEVEL > 0:
        found, _above, width = _reached(counts_ptr, want, LEVEL)
    if width > 0:
        counts = tl.zeros([256], tl.int32)
        if whole:
            for n in range(tl.program_id(0), N, tl.num_programs(0)):
                keep = 1.0
                if KEEP:
                    keep = tl.load(keep_ptr + n)
                if keep > 0:
                    for c0 in range(0, H, B):
                        bits = _columns(pre_ptr + (member * N + n) * H, bias_ptr + member * H, c0 + tl.arange(0, B), H)
                        counts += tl.histogram(_digit(bits - lowest, found, width, LEVEL), 256)
        else:
            top = tl.load(top_ptr + member)
            for o0 in range(tl.program_id(0) * B, top, tl.num_programs(0) * B):
                o = o0 + tl.arange(0, B)
                bits = tl.load(bits_ptr + member * room + o, mask=o < top, other=0)
                counts += tl.histogram(_digit(bits - lowest, found, width, LEVEL), 256)
        b = tl.arange(0, 256)
        tl.atomic_add(counts_ptr + 256 * LEVEL + b, counts, mask=(counts > 0) & (b > 0))


@triton.jit
def _last(counts_ptr, want_ptr, top_ptr, floor_ptr, last_ptr, room, share):
    """The K-th largest's bits, how many of its equals are selected, whether all are looked at, and the next floor."""
    member = tl.program_id(0).to(tl.int64)
    want, lowest, whole = _found_by(top_ptr, want_ptr, floor_ptr, member, room)
    found, above, _width = _reached(counts_ptr + member * 1024, want, 4)
    bits = lowest + found
    tl.store(last_ptr + 4 * member, tl.where(want > 0, bits, 0x7FFFFFFF))
    tl.store(last_ptr + 4 * member + 1, tl.where(want > 0, want - above, 0))
    tl.store(last_ptr + 4 * member + 2, whole.to(tl.int32))
    floor = (bits.to(tl.float32, bitcast=True) * share).to(tl.int32, bitcast=True)
    tl.store(floor_ptr + member, tl.maximum(floor, 1), mask=want > 0)


@triton.jit
def _count_selected(
    pre_ptr, bias_ptr, keep_ptr, bits_ptr, spans_ptr, last_ptr, found_ptr, N, H, room,
    KEEP: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """How many elements of a token lie above the K-th largest, and how many are equal to it."""
    row = tl.program_id(0).to(tl.int64)
    member = row // N
    last = tl.load(last_ptr + 4 * member)
    sure = last * 0
    tie = last * 0
    if tl.load(last_ptr + 4 * member + 2) > 0:
        keep = 1.0
        if KEEP:
            keep = tl.load(keep_ptr + row % N)
        if keep > 0:
            for c0 in range(0, H, C):
                bits = _columns(pre_ptr + row * H, bias_ptr + member * H, c0 + tl.arange(0, C), H)
                sure += tl.sum((bits > last).to(tl.int32), 0)
                tie += tl.sum((bits == last).to(tl.int32), 0)
    else:
        at = tl.load(spans_ptr + 2 * row)
        number = tl.load(spans_ptr + 2 * row + 1)
        for first in range(0, number, B):
            o = first + tl.arange(0, B)
            bits = tl.load(bits_ptr + member * room + at + o, mask=o < number, other=0)
            sure += tl.sum((bits > last).to(tl.int32), 0)
            tie += tl.sum((bits == last).to(tl.int32), 0)
    tl.store(found_ptr + 2 * row, sure)
    tl.store(found_ptr + 2 * row + 1, tie)


@triton.jit
def _running(found_ptr, last_ptr, start_ptr, ties_ptr, N, B: tl.constexpr):
    """Where each token's places begin, and how many of the K-th largest's equals lie before it."""
    member = tl.program_id(0).to(tl.int64)
    room = tl.load(last_ptr + 4 * member + 1)
    start_ptr += member * (N + 1)
    ties_ptr += member * (N + 1)
    sure_before = room * 0
    ties_before = room * 0
    tl.store(start_ptr, 0)
    tl.store(ties_ptr, 0)
    for n0 in range(0, N, B):
        n = n0 + tl.arange(0, B)
        row = member * N + n
        sure = tl.load(found_ptr + 2 * row, mask=n < N, other=0)
        tie = tl.load(found_ptr + 2 * row + 1, mask=n < N, other=0)
        ties = ties_before + tl.cumsum(tie, 0)
        tl.store(start_ptr + n + 1, sure_before + tl.cumsum(sure, 0) + tl.minimum(ties, room), mask=n < N)
        tl.store(ties_ptr + n + 1, ties, mask=n < N)
        sure_before += tl.sum(sure, 0)
        ties_before += tl.sum(tie, 0)


@triton.jit
def _put(
    bits, c, last, room, place, ties, row, member, values_ptr, index_ptr, rows_ptr, E, B: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """What is selected of B · G elements to its places; the next place for what is above the K-th largest, and ties."""
    sure = (bits > last).to(tl.int32)
    tie = (bits == last).to(tl.int32)
    rank, found = ranks(sure + (tie << 16), B, G)
    tie_rank = ties + (rank >> 16)
    at = place + (rank & 0xFFFF) + tl.minimum(tie_rank, room)
    taken = ((sure > 0) | ((tie > 0) & (tie_rank < room))) & (at < E)
    out = member * E + at
    tl.store(values_ptr + out, bits.to(tl.float32, bitcast=True), mask=taken)
    tl.store(index_ptr + out, c, mask=taken)
    tl.store(rows_ptr + out, (row + tl.zeros([B * G], tl.int64)).to(tl.int32), mask=taken)
    return place + (found & 0xFFFF), ties + (found >> 16)


@triton.jit
def _write(
    pre_ptr, bias_ptr, keep_ptr, bits_ptr, latents_ptr, spans_ptr, last_ptr, start_ptr, ties_ptr, values_ptr, index_ptr,
    rows_ptr, N, H, room, E, KEEP: tl.constexpr, B: tl.constexpr, C: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """The selected elements of a token to their places, and its share of the unused places."""
    row = tl.program_id(0).to(tl.int64)
    member = row // N
    n = (row % N).to(tl.int32)
    last = tl.load(last_ptr + 4 * member)
    equals = tl.load(last_ptr + 4 * member + 1)
    start_ptr += member * (N + 1)
    ties = tl.load(ties_ptr + row + member)
    begin = tl.load(start_ptr + n)
    if tl.load(start_ptr + n + 1) > begin:
        place = begin - tl.minimum(ties, equals)
        if tl.load(last_ptr + 4 * member + 2) > 0:
            for c0 in range(0, H, C):
                c = c0 + tl.arange(0, C)
                bits = _columns(pre_ptr + row * H, bias_ptr + member * H, c, H)
                place, ties = _put(
                    bits, c, last, equals, place, ties, row, member, values_ptr, index_ptr, rows_ptr, E, C // 16, 16
                )  # fmt: skip
        else:
            at = tl.load(spans_ptr + 2 * row)
            number = tl.load(spans_ptr + 2 * row + 1)
            for first in range(0, number, B):
                o = first + tl.arange(0, B)
                bag = member * room + at + o
                bits = tl.load(bits_ptr + bag, mask=o < number, other=0)
                c = tl.load(latents_ptr + bag, mask=o < number, other=0)
                place, ties = _put(
                    bits, c, last, equals, place, ties, row, member, values_ptr, index_ptr, rows_ptr, E, B // 4, 4
                )  # fmt: skip
    used = tl.load(start_ptr + N)
    for f0 in range(used + n * F, E, N * F):
        f = f0 + tl.arange(0, F)
        out = member * E + f
        tl.store(values_ptr + out, tl.zeros([F], tl.float32), mask=f < E)
        tl.store(index_ptr + out, tl.zeros([F], tl.int32) + H, mask=f < E)
        tl.store(rows_ptr + out, (tl.zeros([F], tl.int64) + (member + 1) * N).to(tl.int32), mask=f < E)


def _programs(device: torch.device, members: int, blocks: int, per_multiprocessor: int) -> int:
    """Of each member, as many as run at a time, or fewer, so that each has as many blocks as the others."""
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    turns = triton.cdiv(blocks * members, units * per_multiprocessor)
    return triton.cdiv(blocks, max(1, turns))


def first_floors(members: int, device: torch.device) -> Tensor:
    """What :func:`select` takes first: nothing is known yet."""
    return torch.ones(members, dtype=torch.int32, device=device)


def select(
    pre_MNh: Tensor, bias_Mh: Tensor, keep_N: Tensor | None, want_M: Tensor, places: int, floor_M: Tensor
) -> Ragged:
    """The `want_M` (int32, on the device) largest of relu(pre + bias) over the kept tokens, in `places` places.

    `want_M` must not exceed `places`. `floor_M` is what the micro-batch before left here; speed depends on it alone.
    """
    members, n, h = pre_MNh.shape
    device, masked = pre_MNh.device, keep_N is not None
    bits, latents, spans, top, room = fill(pre_MNh, bias_Mh, keep_N, floor_M, _ROOM * places, places / (n * h))
    counts = torch.zeros(members, 1024, dtype=torch.int32, device=device)
    given, shape = (pre_MNh, bias_Mh, keep_N), (n, h, room)
    programs = _programs(device, members, triton.cdiv(room, _BLOCK), 2)
    for level in range(4):
        _count[(programs, members)](
            *given, floor_M, want_M, top, bits, counts, *shape, masked, level, _BLOCK, num_warps=8
        )
    last = torch.empty(members, 4, dtype=torch.int32, device=device)
    _last[(members,)](counts, want_M, top, floor_M, last, room, _FLOOR, num_warps=8)
    found = torch.empty_like(spans)
    _count_selected[(members * n,)](*given, bits, spans, last, found, *shape, masked, _TOKEN, 1024, num_warps=1)
    start, ties = torch.empty(2, members, n + 1, dtype=torch.int32, device=device)
    block = min(4096, triton.next_power_of_2(n))
    _running[(members,)](found, last, start, ties, n, block, num_warps=max(1, block // 512))
    values = torch.empty(members, places, device=device)
    index, rows = torch.empty(2, members, places, dtype=torch.int32, device=device)
    _write[(members * n,)](
        *given, bits, latents, spans, last, start, ties, values, index, rows, *shape, places,
        masked, _TOKEN, 256, 128, num_warps=1,
    )  # fmt: skip
    return Ragged(values, index, rows, start)
