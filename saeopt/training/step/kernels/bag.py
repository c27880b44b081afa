"""Triton kernels that put what reaches a floor of relu(pre + bias) into a bag, for each member, token by token.

In one pass over the pre-activations neighbours form groups, of which a bit says whether their largest reaches the
floor; only what the bits say is looked at again.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 4, 1024
_LISTED = 512
"""Elements of listed groups that a program looks at at a time."""


class Bag(NamedTuple):
    """What reaches the floor, `room` places for each member; a token's lie side by side, its latents rising.

    `bits` and `latents` (M, room): of the activations, and whose. `spans` (M · N, 2): where a token's begin, and how
    many it has. `top` (2, M): how many there are in all, and groups; more than `room`, and the bag is not whole.
    """

    bits: Tensor
    latents: Tensor
    spans: Tensor
    top: Tensor
    room: int


@triton.jit
def _flag(
    pre_ptr, bias_ptr, keep_ptr, floor_ptr, words_ptr, N, H,
    KEEP: tl.constexpr, G: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One bit for G neighbours: whether the largest of relu(pre + bias) reaches the floor."""
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
    reaches = (best.to(tl.int32, bitcast=True) >= tl.load(floor_ptr + member)).to(tl.int32)
    bits = tl.reshape(reaches, [R, C // G // 32, 32]) << tl.arange(0, 32)[None, None, :]
    word = tl.program_id(0) * (C // G // 32) + tl.arange(0, C // G // 32)
    number = tl.cdiv(H // G, 32)
    out = words_ptr + row[:, None] * number + word[None, :]
    tl.store(out, tl.sum(bits, 2), mask=(n < N)[:, None] & (word < number)[None, :])


@triton.jit
def ranks(counted, B: tl.constexpr, G: tl.constexpr):
    """Of B · G numbers: the sum of those before each, and of all. Short sums first, which threads do by themselves."""
    by_group = tl.reshape(counted, [B, G])
    within = tl.cumsum(by_group, 1)
    groups = tl.sum(by_group, 1)
    before = tl.cumsum(groups, 0) - groups
    return tl.reshape(within + before[:, None], [B * G]) - counted, tl.sum(groups, 0)


@triton.jit
def _ones(word):
    """How many bits are set."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24) & 0xFF


@triton.jit
def _listed(groups_ptr, first, number, pre_ptr, bias_ptr, G: tl.constexpr, B: tl.constexpr):
    """The bits of relu(pre + bias) of B listed groups of a token, and the latents."""
    e = tl.arange(0, B * G)
    mask = first + e // G < number
    c = tl.load(groups_ptr + first + e // G, mask=mask, other=0).to(tl.int32) * G + e % G
    value = tl.load(pre_ptr + c, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias_ptr + c, mask=mask, other=0.0)
    return tl.where(mask & (value > 0), value, 0.0).to(tl.int32, bitcast=True), c


@triton.jit
def _place(bits, c, reaches, place, bits_ptr, latents_ptr, room):
    """What reaches the floor to its places in the bag."""
    mask = (reaches > 0) & (place < room)
    tl.store(bits_ptr + place, bits, mask=mask)
    tl.store(latents_ptr + place, c, mask=mask)


@triton.jit
def _collect(
    pre_ptr, bias_ptr, floor_ptr, words_ptr, groups_ptr, bits_ptr, latents_ptr, top_ptr, spans_ptr, N, H, members, room,
    G: tl.constexpr, W: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """What of a token reaches the floor, its latents rising, to the next places of the bag; where it lies, how much.

    `top`: how much the bag was asked to take, and the list of groups. Where either is more than `room`, the bag is.
    """
    row = tl.program_id(0).to(tl.int64)
    member = row // N
    pre_ptr += row * H
    bias_ptr += member * H
    groups_ptr += member * room
    words = tl.cdiv(H // G, 32)
    words_ptr += row * words
    w = tl.arange(0, W)
    number = tl.sum(_ones(tl.load(words_ptr + w, mask=w < words, other=0)), 0)
    count = number
    at = number * 0
    if number > 0:
        listed = tl.atomic_add(top_ptr + members + member, number)
        floor = tl.load(floor_ptr + member)
        fits = listed + number <= room
        if fits:
            groups_ptr += listed
            listed = 0 * number
            for w0 in range(0, words, 16):
                v = w0 + tl.arange(0, 16)
                word = tl.load(words_ptr + v, mask=v < words, other=0)
                flags = tl.reshape((word[:, None] >> tl.arange(0, 32)[None, :]) & 1, [16 * 32])
                rank, more = ranks(flags, 16, 32)
                tl.store(groups_ptr + listed + rank, w0 * 32 + tl.arange(0, 16 * 32), mask=flags > 0)
                listed += more
            tl.debug_barrier()
            bits, c = _listed(groups_ptr, 0, number, pre_ptr, bias_ptr, G, B)
            reaches = (bits >= floor).to(tl.int32)
            before, found = ranks(reaches, B, G)
            count = found
            for first in range(B, number, B):
                others, _c = _listed(groups_ptr, first, number, pre_ptr, bias_ptr, G, B)
                count += tl.sum((others >= floor).to(tl.int32), 0)
            at = tl.atomic_add(top_ptr + member, count)
            bits_ptr += member * room
            latents_ptr += member * room
            _place(bits, c, reaches, at + before, bits_ptr, latents_ptr, room)
            place = at + found
            for first in range(B, number, B):
                bits, c = _listed(groups_ptr, first, number, pre_ptr, bias_ptr, G, B)
                reaches = (bits >= floor).to(tl.int32)
                before, found = ranks(reaches, B, G)
                _place(bits, c, reaches, place + before, bits_ptr, latents_ptr, room)
                place += found
        else:
            at = tl.atomic_add(top_ptr + member, count)
    tl.store(spans_ptr + 2 * row, at)
    tl.store(spans_ptr + 2 * row + 1, count)


def fill(pre_MNh: Tensor, bias_Mh: Tensor, keep_N: Tensor | None, floor_M: Tensor, room: int, share: float) -> Bag:
    """What reaches `floor_M` (bits, int32) on the kept tokens; `share` of all elements are expected to."""
    members, n, h = pre_MNh.shape
    device = pre_MNh.device
    group = next(g for g in (16, 8, 4, 2, 1) if h % g == 0 and (g * share <= 0.25 or g == 1))
    words = triton.cdiv(h // group, 32)
    flags = torch.empty(members * n, words, dtype=torch.int32, device=device)
    columns = max(32 * group, min(_COLUMNS, triton.next_power_of_2(h)))
    _flag[(triton.cdiv(h, columns), triton.cdiv(n, _ROWS), members)](
        pre_MNh, bias_Mh, keep_N, floor_M, flags, n, h, keep_N is not None, group, _ROWS, columns, num_warps=4
    )
    groups = torch.empty(members, room, dtype=torch.int16 if h // group < 2**15 else torch.int32, device=device)
    bits, latents = torch.empty(2, members, room, dtype=torch.int32, device=device)
    spans = torch.empty(members * n, 2, dtype=torch.int32, device=device)
    top = torch.zeros(2, members, dtype=torch.int32, device=device)
    _collect[(members * n,)](
        pre_MNh, bias_Mh, floor_M, flags, groups, bits, latents, top, spans, n, h, members, room,
        group, triton.next_power_of_2(words), _LISTED // group, num_warps=1,
    )  # fmt: skip
    return Bag(bits, latents, spans, top, room)
