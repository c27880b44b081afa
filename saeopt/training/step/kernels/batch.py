"""Triton kernels that select the largest of relu(pre + bias) over all tokens of a micro-batch, for each member.

Nothing is sorted. Neighbours form groups. The K largest lie in groups whose maximum is at least the K-th
largest maximum; its leading bits, found by counting, leave little more than K groups. Among their elements the K-th
largest is found by counting too (the order of non-negative floats is that of their bits). Ties go to the lower token,
then to the lower latent, and what is selected lies in that order.
Exact but for one case: of more than K groups that share those leading bits only the first are looked into, and what is
selected instead of the others' elements is smaller by less than a hundredth.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_GROUP = 16
"""Neighbours of a group: in bfloat16 the 32 bytes that memory gives at a time."""
_ROWS, _COLUMNS = 4, 1024
_KEYS = 4096
"""Group maxima that a program counts at a time."""
_LISTED = 128
"""Groups of which a program looks at the elements at a time."""


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
def _maxima(
    pre_ptr, bias_ptr, keep_ptr, keys_ptr, N, H,
    KEEP: tl.constexpr, G: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The 15 leading bits of the maximum of relu(pre + bias) over G neighbours; 0 only where that is 0."""
    member = tl.program_id(2).to(tl.int64)
    n = tl.program_id(1) * R + tl.arange(0, R)
    c = tl.program_id(0) * C + tl.arange(0, C)
    row = member * N + n.to(tl.int64)
    mask = (n < N)[:, None] & (c < H)[None, :]
    value = tl.load(pre_ptr + row[:, None] * H + c[None, :], mask=mask, other=float("-inf")).to(tl.float32)
    value += tl.load(bias_ptr + member * H + c, mask=c < H, other=0.0)[None, :]
    best = tl.max(tl.reshape(value, [R, C // G, G]), 2)
    if KEEP:
        keep = tl.load(keep_ptr + n, mask=n < N, other=0.0)
        best = tl.where(keep[:, None] > 0, best, 0.0)
    best = tl.where(best > 0, best, 0.0)
    key = tl.where(best > 0, tl.maximum(best.to(tl.int32, bitcast=True) >> 16, 1), 0)
    group = tl.program_id(0) * (C // G) + tl.arange(0, C // G)
    number = H // G
    out = keys_ptr + row[:, None] * number + group[None, :]
    tl.store(out, key.to(tl.int16), mask=(n < N)[:, None] & (group < number)[None, :])


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
def _count_keys(
    keys_ptr, want_ptr, counts_ptr, total, members, FINE: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """Group maxima by their 8 leading bits, or (FINE) by the next 7 where the first are those of the K-th largest."""
    member = tl.program_id(1).to(tl.int64)
    out_ptr = counts_ptr + member * 256
    if FINE:
        first, _above = _crossing(out_ptr, tl.load(want_ptr + member), 256)
        out_ptr += members * 256
    b = tl.arange(0, 256)
    counts = tl.zeros([256], tl.int32)
    for block in range(tl.program_id(0), tl.cdiv(total, B), tl.num_programs(0)):
        o = block * B + tl.arange(0, B)
        key = tl.load(keys_ptr + member * total + o, mask=o < total, other=0).to(tl.int32)
        if FINE:
            counts += tl.histogram(tl.where(key >> 7 == first, key & 127, 0), 256)
        else:
            counts += tl.histogram(key >> 7, 256)
    tl.atomic_add(out_ptr + b, counts, mask=counts > 0)


@triton.jit
def _least_key(counts_ptr, want_ptr, least_ptr, members):
    """The least key that is followed, above 0, from the counts of both levels."""
    member = tl.program_id(0).to(tl.int64)
    want = tl.load(want_ptr + member)
    first, above = _crossing(counts_ptr + member * 256, want, 256)
    second, _more = _crossing(counts_ptr + (members + member) * 256, want - above, 256)
    tl.store(least_ptr + 2 * member, tl.maximum(first * 128 + second, 1))


@triton.jit
def _count_groups(keys_ptr, least_ptr, found_ptr, total, members, B: tl.constexpr):
    """How many keys of a block lie above the least one that is followed, and how many are equal to it."""
    member = tl.program_id(1).to(tl.int64)
    least = tl.load(least_ptr + 2 * member)
    o = tl.program_id(0) * B + tl.arange(0, B)
    key = tl.load(keys_ptr + member * total + o, mask=o < total, other=0).to(tl.int32)
    out = member * tl.num_programs(0) + tl.program_id(0)
    tl.store(found_ptr + out, tl.sum((key > least).to(tl.int32), 0))
    tl.store(found_ptr + members * tl.num_programs(0) + out, tl.sum((key == least).to(tl.int32), 0))


@triton.jit
def _before(found_ptr, member, block, blocks, members):
    """From inclusive sums over blocks: of both kinds, how many lie before this block and how many there are."""
    sure_ptr = found_ptr + member * blocks
    tie_ptr = found_ptr + (members + member) * blocks
    sure = tl.load(sure_ptr + block - 1, mask=block > 0, other=0)
    tie = tl.load(tie_ptr + block - 1, mask=block > 0, other=0)
    return sure, tie, tl.load(sure_ptr + blocks - 1), tl.load(tie_ptr + blocks - 1)


@triton.jit
def _ranks(counted, B: tl.constexpr, G: tl.constexpr):
    """Of B · G numbers: the sum of those before each, and of all. Short sums first, which threads do by themselves."""
    by_group = tl.reshape(counted, [B, G])
    within = tl.cumsum(by_group, 1)
    groups = tl.sum(by_group, 1)
    before = tl.cumsum(groups, 0) - groups
    return tl.reshape(within + before[:, None], [B * G]) - counted, tl.sum(groups, 0)


@triton.jit
def _list_groups(keys_ptr, found_ptr, listed_ptr, least_ptr, total, members, capacity, B: tl.constexpr):
    """The numbers of the groups that are followed, in order: all above the least key, and ties while there is room."""
    member = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    least = tl.load(least_ptr + 2 * member)
    o = block * B + tl.arange(0, B)
    key = tl.load(keys_ptr + member * total + o, mask=o < total, other=0).to(tl.int32)
    sure = (key > least).to(tl.int32)
    tie = (key == least).to(tl.int32)
    rank, _all = _ranks(sure + (tie << 16), B // 16, 16)
    sure_before, tie_before, all_sure, all_ties = _before(found_ptr, member, block, tl.num_programs(0), members)
    sure_rank = sure_before + (rank & 0xFFFF)
    tie_rank = tie_before + (rank >> 16)
    room = capacity - all_sure
    place = sure_rank + tl.minimum(tie_rank, room)
    taken = (sure > 0) | ((tie > 0) & (tie_rank < room))
    tl.store(listed_ptr + member * capacity + place, o, mask=taken & (place < capacity))
    if block == 0:
        tl.store(least_ptr + 2 * member + 1, tl.minimum(all_sure + all_ties, capacity))


@triton.jit
def _elements(
    block, pre_ptr, bias_ptr, listed_ptr, member, number, N, H, capacity, G: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """relu(pre + bias) of the elements of B listed groups, as bits too, the group's number and the latent."""
    e = tl.arange(0, B * G)
    at = block * B + e // G
    mask = at < number
    group = tl.load(listed_ptr + member * capacity + at, mask=mask, other=0).to(tl.int64)
    per_row = H // G
    c = (group % per_row).to(tl.int32) * G + e % G
    value = tl.load(pre_ptr + member * N * H + group * G + e % G, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias_ptr + member * H + c, mask=mask, other=0.0)
    value = tl.where(mask & (value > 0), value, 0.0)
    return value, value.to(tl.int32, bitcast=True), group // per_row, c


@triton.jit
def _threshold(counts_ptr, want, LEVELS: tl.constexpr):
    """How far above the least key's bits the K-th largest lies, as far as it is known, and how many lie above it.

    Counts are kept of 2048 bins, 2^20 bits wide, then of the 1024 in one of them, then of single bits' patterns.
    """
    found, above = _crossing(counts_ptr, want, 2048)
    if LEVELS > 1:
        second, more = _crossing(counts_ptr + 2048, want - above, 1024)
        found = found * 1024 + second
        above += more
    if LEVELS > 2:
        third, rest = _crossing(counts_ptr + 3072, want - above, 1024)
        found = found * 1024 + third
        above += rest
    return found, above


@triton.jit
def _gather(
    pre_ptr, bias_ptr, listed_ptr, least_ptr, bag_ptr, bagged_ptr, N, H, capacity, room,
    G: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The bits of the elements that reach the least key, above it, into a bag in no order, and how many there are."""
    member = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    number = tl.load(least_ptr + 2 * member + 1)
    lowest = tl.load(least_ptr + 2 * member) << 16
    if block * B < number:
        _value, bits, _n, _c = _elements(block, pre_ptr, bias_ptr, listed_ptr, member, number, N, H, capacity, G, B)
        over = bits - lowest
        reaches = (over >= 0).to(tl.int32)
        rank, count = _ranks(reaches, B, G)
        place = tl.atomic_add(bagged_ptr + member, count) + rank
        tl.store(bag_ptr + member * room + place, over, mask=(reaches > 0) & (place < room))


@triton.jit
def _digit(over, found, LEVEL: tl.constexpr):
    """The bin of this level, or 0, where anything may be."""
    if LEVEL == 0:
        which = tl.where(over >= 0, over >> 20, 0)
    elif LEVEL == 1:
        which = tl.where((over >= 0) & (over >> 20 == found), (over >> 10) & 1023, 0)
    else:
        which = tl.where((over >= 0) & (over >> 10 == found), over & 1023, 0)
    return which


@triton.jit
def _count_elements(
    pre_ptr, bias_ptr, listed_ptr, least_ptr, bag_ptr, bagged_ptr, want_ptr, counts_ptr, N, H, capacity, room,
    LEVEL: tl.constexpr, G: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Elements by the bits of this level, of those that agree with the K-th largest in the levels before.

    From the bag, or from all listed groups where the bag had no room.
    """
    member = tl.program_id(1).to(tl.int64)
    bagged = tl.load(bagged_ptr + member)
    lowest = tl.load(least_ptr + 2 * member) << 16
    counts_ptr += member * 4096
    BINS: tl.constexpr = 2048 if LEVEL == 0 else 1024
    found = lowest * 0
    if LEVEL > 0:
        found, _above = _threshold(counts_ptr, tl.load(want_ptr + member), LEVEL)
    counts = tl.zeros([BINS], tl.int32)
    if bagged <= room:
        for block in range(tl.program_id(0), tl.cdiv(bagged, B * G), tl.num_programs(0)):
            o = block * B * G + tl.arange(0, B * G)
            over = tl.load(bag_ptr + member * room + o, mask=o < bagged, other=-1)
            counts += tl.histogram(_digit(over, found, LEVEL), BINS)
    else:
        number = tl.load(least_ptr + 2 * member + 1)
        for block in range(tl.program_id(0), tl.cdiv(number, B), tl.num_programs(0)):
            _value, bits, _n, _c = _elements(block, pre_ptr, bias_ptr, listed_ptr, member, number, N, H, capacity, G, B)
            counts += tl.histogram(_digit(bits - lowest, found, LEVEL), BINS)
    b = tl.arange(0, BINS)
    shift: tl.constexpr = 0 if LEVEL == 0 else 1024 + 1024 * LEVEL
    tl.atomic_add(counts_ptr + shift + b, counts, mask=(counts > 0) & (b > 0))


@triton.jit
def _last(counts_ptr, want_ptr, least_ptr, last_ptr):
    """The bits of the K-th largest, and how many of those that are equal to it are selected."""
    member = tl.program_id(0).to(tl.int64)
    want = tl.load(want_ptr + member)
    found, above = _threshold(counts_ptr + member * 4096, want, 3)
    tl.store(last_ptr + 2 * member, (tl.load(least_ptr + 2 * member) << 16) + found)
    tl.store(last_ptr + 2 * member + 1, want - above)


@triton.jit
def _count_selected(
    pre_ptr, bias_ptr, listed_ptr, least_ptr, found_ptr, last_ptr, N, H, capacity, members,
    G: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """How many elements of a block lie above the K-th largest, and how many are equal to it."""
    member = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    number = tl.load(least_ptr + 2 * member + 1)
    threshold = tl.load(last_ptr + 2 * member)
    sure = number * 0
    tie = number * 0
    if block * B < number:
        value, bits, _n, _c = _elements(block, pre_ptr, bias_ptr, listed_ptr, member, number, N, H, capacity, G, B)
        sure = tl.sum(((bits > threshold) & (value > 0)).to(tl.int32), 0)
        tie = tl.sum(((bits == threshold) & (value > 0)).to(tl.int32), 0)
    out = member * tl.num_programs(0) + block
    tl.store(found_ptr + out, sure)
    tl.store(found_ptr + members * tl.num_programs(0) + out, tie)


@triton.jit
def _write(
    pre_ptr, bias_ptr, listed_ptr, least_ptr, found_ptr, last_ptr, values_ptr, index_ptr, rows_ptr, N, H, capacity,
    members, E, G: tl.constexpr, B: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """The selected elements of a block to their places, and this block's share of the unused places."""
    member = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    number = tl.load(least_ptr + 2 * member + 1)
    threshold = tl.load(last_ptr + 2 * member)
    room = tl.load(last_ptr + 2 * member + 1)
    sure_before, tie_before, all_sure, all_ties = _before(found_ptr, member, block, tl.num_programs(0), members)
    if block * B < number:
        value, bits, n, c = _elements(block, pre_ptr, bias_ptr, listed_ptr, member, number, N, H, capacity, G, B)
        sure = ((bits > threshold) & (value > 0)).to(tl.int32)
        tie = ((bits == threshold) & (value > 0)).to(tl.int32)
        rank, _all = _ranks(sure + (tie << 16), B, G)
        tie_rank = tie_before + (rank >> 16)
        place = sure_before + (rank & 0xFFFF) + tl.minimum(tie_rank, room)
        taken = ((sure > 0) | ((tie > 0) & (tie_rank < room))) & (place < E)
        out = member * E + place
        tl.store(values_ptr + out, value, mask=taken)
        tl.store(index_ptr + out, c, mask=taken)
        tl.store(rows_ptr + out, (member * N + n).to(tl.int32), mask=taken)
    used = all_sure + tl.minimum(all_ties, room)
    for f0 in range(block * F, E, tl.num_programs(0) * F):
        f = f0 + tl.arange(0, F)
        unused = (f >= used) & (f < E)
        tl.store(values_ptr + member * E + f, tl.zeros([F], tl.float32), mask=unused)
        tl.store(index_ptr + member * E + f, tl.zeros([F], tl.int32) + H, mask=unused)
        tl.store(rows_ptr + member * E + f, (tl.zeros([F], tl.int64) + (member + 1) * N).to(tl.int32), mask=unused)


def _programs(keys_Mx: Tensor, blocks: int, per_multiprocessor: int) -> int:
    """Of each member, as many as run at a time, or fewer, so that each has as many blocks as the others."""
    units = torch.cuda.get_device_properties(keys_Mx.device).multi_processor_count if keys_Mx.is_cuda else 1
    turns = triton.cdiv(blocks * len(keys_Mx), units * per_multiprocessor)
    return triton.cdiv(blocks, max(1, turns))


def select(pre_MNh: Tensor, bias_Mh: Tensor, keep_N: Tensor | None, want_M: Tensor, places: int) -> Ragged:
    """The `want_M` (int32, on the device) largest of relu(pre + bias) over the kept tokens, in `places` places.

    `want_M` must not exceed `places`.
    """
    members, n, h = pre_MNh.shape
    device = pre_MNh.device
    group = next(g for g in (_GROUP, 8, 4, 2, 1) if h % g == 0)
    total = n * (h // group)
    keys = torch.empty(members, total, dtype=torch.int16, device=device)
    columns = min(_COLUMNS, max(group, triton.next_power_of_2(h)))
    _maxima[(triton.cdiv(h, columns), triton.cdiv(n, _ROWS), members)](
        pre_MNh, bias_Mh, keep_N, keys, n, h, keep_N is not None, group, _ROWS, columns, num_warps=4
    )
    listed, least = _followed(keys, want_M, min(total, 2 * places))
    given = (pre_MNh, bias_Mh, listed, least)
    capacity = listed.shape[1]
    shape = (n, h, capacity)
    counts = torch.zeros(members, 4096, dtype=torch.int32, device=device)
    blocks, room = triton.cdiv(capacity, _LISTED), 4 * places
    bag = torch.empty(members, room, dtype=torch.int32, device=device)
    bagged = torch.zeros(members, dtype=torch.int32, device=device)
    _gather[(blocks, members)](*given, bag, bagged, *shape, room, group, _LISTED, num_warps=4)
    for level in range(3):
        _count_elements[(_programs(keys, blocks, 2), members)](
            *given, bag, bagged, want_M, counts, *shape, room, level, group, _LISTED, num_warps=4
        )
    found = torch.empty(2, members, blocks, dtype=torch.int32, device=device)
    last = torch.empty(members, 2, dtype=torch.int32, device=device)
    _last[(members,)](counts, want_M, least, last, num_warps=4)
    _count_selected[(blocks, members)](*given, found, last, *shape, members, group, _LISTED, num_warps=4)
    values = torch.empty(members, places, device=device)
    index, rows = torch.empty(2, members, places, dtype=torch.int32, device=device)
    _write[(blocks, members)](
        *given, found.cumsum(-1, dtype=torch.int32), last, values, index, rows, *shape, members, places,
        group, _LISTED, 128, num_warps=4,
    )  # fmt: skip
    tokens = torch.arange(members, dtype=torch.int32, device=device).unsqueeze(1) * n
    tokens = tokens + torch.arange(n + 1, dtype=torch.int32, device=device)
    return Ragged(values, index, rows, torch.searchsorted(rows, tokens, out_int32=True))


def _followed(keys: Tensor, want_M: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """The groups in which the selected elements lie (M, capacity), and (M, 2) their least key and their number."""
    members, total = keys.shape
    counts = torch.zeros(2, members, 256, dtype=torch.int32, device=keys.device)
    blocks = triton.cdiv(total, _KEYS)
    for fine in (False, True):
        _count_keys[(_programs(keys, blocks, 8), members)](
            keys, want_M, counts, total, members, fine, _KEYS, num_warps=4
        )
    found = torch.empty(2, members, blocks, dtype=torch.int32, device=keys.device)
    listed = torch.empty(members, capacity, dtype=torch.int32, device=keys.device)
    least = torch.empty(members, 2, dtype=torch.int32, device=keys.device)
    _least_key[(members,)](counts, want_M, least, members, num_warps=4)
    _count_groups[(blocks, members)](keys, least, found, total, members, _KEYS, num_warps=4)
    _list_groups[(blocks, members)](
        keys, found.cumsum(-1, dtype=torch.int32), listed, least, total, members, capacity, _KEYS, num_warps=4
    )
    return listed, least
