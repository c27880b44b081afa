"""Triton kernels of the topk step behind the selection: sparse decode with its error, gradients per latent.

Rows are (member, token) pairs, member first.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_DECODE_TILE = 2048
"""Elements (selected rows x columns) that a warp has at a time: one warp per token hides more than several do."""
_MANY = 2**19
"""Selected entries of a step from which programs get more to do at a time."""
_INT16 = 2**15


@triton.jit
def _decode(
    values_ptr, index_ptr, w_ptr, bias_ptr, x_ptr, scale_ptr, keep_ptr, error_ptr, dots_ptr, squares_ptr, N, H,
    factor, D: tl.constexpr, KEEP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """error = Σ_j value_j W[index_j] + bias − x · scale, ‖error‖², and factor · ⟨error, W[index_j]⟩ where value > 0.

    A program takes a row in pieces of C columns, in which the selected rows of W are read once for both.
    """
    row = tl.program_id(0).to(tl.int64)
    member = row // N
    n = row % N
    j = tl.arange(0, KP)
    v = tl.load(values_ptr + row * K + j, mask=j < K, other=0.0)
    on = v > 0
    i = tl.load(index_ptr + row * K + j, mask=on, other=0).to(tl.int64)
    w_ptr += (member * H + i) * D
    scale = tl.load(scale_ptr)
    dots = tl.zeros([KP], tl.float32)
    square = tl.zeros([C], tl.float32)
    for c0 in range(0, D, C):
        c = c0 + tl.arange(0, C)
        cm = c < D
        w = tl.load(w_ptr[:, None] + c[None, :], mask=on[:, None] & cm[None, :], other=0.0).to(tl.float32)
        e = tl.sum(v[:, None] * w, 0) + tl.load(bias_ptr + member * D + c, mask=cm, other=0.0)
        e -= tl.load(x_ptr + n * D + c, mask=cm, other=0.0).to(tl.float32) * scale
        if KEEP:
            e *= tl.load(keep_ptr + n)
        e = tl.where(cm, e, 0.0)
        tl.store(error_ptr + row * D + c, e, mask=cm)
        square += e * e
        dots += tl.sum(w * e[None, :], 1)
    tl.store(squares_ptr + row, tl.sum(square, 0))
    tl.store(dots_ptr + row * K + j, tl.where(on, dots * factor, 0.0), mask=j < K)


@triton.jit
def _in_order(
    slot_ptr, given_values_ptr, given_dots_ptr, given_rows_ptr, values_ptr, dots_ptr, rows_ptr, entries,
    K: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Entries in the order of their latents: found once here, and not by every program that has some of the columns."""
    o = tl.program_id(0) * B + tl.arange(0, B)
    mask = o < entries
    slot = tl.load(slot_ptr + o, mask=mask, other=0)
    row = (slot // K).to(tl.int32) if K > 0 else tl.load(given_rows_ptr + slot, mask=mask, other=0)
    tl.store(rows_ptr + o, row, mask=mask)
    tl.store(values_ptr + o, tl.load(given_values_ptr + slot, mask=mask, other=0.0), mask=mask)
    tl.store(dots_ptr + o, tl.load(given_dots_ptr + slot, mask=mask, other=0.0), mask=mask)


@triton.jit
def _over_tokens(
    begin, end, c, slot_ptr, values_ptr, dots_ptr, rows_ptr, error_ptr, centred_ptr, shift,
    D: tl.constexpr, K: tl.constexpr, G: tl.constexpr, TB: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Columns c of Σ value · error and Σ dot · x̄, and Σ dot and the number of firings, over entries [begin, end).

    Without `slot_ptr` the entries lie in the order of their latents.
    """
    cm = c < D
    dec = tl.zeros([C], tl.float32)
    enc = tl.zeros([C], tl.float32)
    bias = tl.zeros([TB], tl.float32)
    fired = tl.zeros([TB], tl.float32)
    for t0 in range(begin, end, TB):
        o = t0 + tl.arange(0, TB)
        om = o < end
        slot = o
        if slot_ptr is not None:
            slot = tl.load(slot_ptr + o, mask=om, other=0).to(tl.int64)
        row = slot // K if K > 0 else tl.load(rows_ptr + slot, mask=om, other=0).to(tl.int64)
        v = tl.load(values_ptr + slot, mask=om, other=0.0)
        g = tl.load(dots_ptr + slot, mask=om, other=0.0)
        mask = om[:, None] & cm[None, :]
        learns_from = row
        if G > 1:
            learns_from += shift
        e = tl.load(error_ptr + learns_from[:, None] * D + c[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(centred_ptr + row[:, None] * D + c[None, :], mask=mask, other=0.0).to(tl.float32)
        dec += tl.sum(v[:, None] * e, 0)
        enc += tl.sum(g[:, None] * x, 0)
        bias += g
        fired += (v > 0).to(tl.float32)
    return dec, enc, tl.sum(bias, 0), tl.sum(fired, 0)


@triton.jit
def _shift(latent, widths_ptr, N, H, G: tl.constexpr):
    """How far E_g of a latent's prefix g lies behind the row that member and token would have with one prefix."""
    member = latent // H
    prefix = member * (G - 1)
    for g in tl.static_range(G - 1):
        prefix += (latent % H >= tl.load(widths_ptr + g)).to(tl.int64)
    return prefix * N


@triton.jit
def _store_sums(at, c, dec, enc, bias, fired, dec_ptr, enc_ptr, bias_ptr, fired_ptr, D: tl.constexpr):
    tl.store(dec_ptr + at * D + c, dec, mask=c < D)
    tl.store(enc_ptr + at * D + c, enc, mask=c < D)
    if tl.program_id(1) == 0:
        tl.store(bias_ptr + at, bias)
        tl.store(fired_ptr + at, fired)


@triton.jit
def _pieces(
    ordered_ptr, start_ptr, slot_ptr, values_ptr, dots_ptr, rows_ptr, error_ptr, centred_ptr, widths_ptr, dec_ptr,
    enc_ptr, bias_ptr, fired_ptr, N, H, entries, latents, shift, D: tl.constexpr, K: tl.constexpr, G: tl.constexpr,
    P: tl.constexpr, TB: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Entries [P·program, P·(program + 1)) of the latents that have more than P: one or two of them reach in here.

    Place 2·program holds what belongs to the latent of the first entry, the next one what belongs to a latent that
    begins later and goes on behind the last.
    """
    piece = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
    first = piece * P
    last = tl.minimum(first + P, entries)
    for side in range(2):
        latent = tl.load(ordered_ptr + first + side * (last - 1 - first)).to(tl.int64) + shift
        if latent < latents:  # empty places lie behind all latents
            begin = tl.load(start_ptr + latent).to(tl.int64)
            end = tl.load(start_ptr + latent + 1).to(tl.int64)
            if (end - begin > P) & ((side == 0) | (begin > first)):
                dec, enc, bias, fired = _over_tokens(
                    tl.maximum(begin, first), tl.minimum(end, last), c, slot_ptr, values_ptr, dots_ptr, rows_ptr,
                    error_ptr, centred_ptr, _shift(latent, widths_ptr, N, H, G), D, K, G, TB, C,
                )  # fmt: skip
                _store_sums(2 * piece + side, c, dec, enc, bias, fired, dec_ptr, enc_ptr, bias_ptr, fired_ptr, D)


@triton.jit
def _by_latent(
    start_ptr, slot_ptr, values_ptr, dots_ptr, rows_ptr, error_ptr, centred_ptr, widths_ptr, part_dec_ptr,
    part_enc_ptr, part_bias_ptr, part_fired_ptr, g_dec_ptr, g_enc_ptr, g_bias_ptr, fired_ptr, N, H, factor,
    D: tl.constexpr, K: tl.constexpr, G: tl.constexpr, P: tl.constexpr, TB: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One latent: C columns of both matrices' gradients, from its tokens, or from its pieces where it has many."""
    latent = tl.program_id(0).to(tl.int64)
    begin = tl.load(start_ptr + latent).to(tl.int64)
    end = tl.load(start_ptr + latent + 1).to(tl.int64)
    c = tl.program_id(1) * C + tl.arange(0, C)
    if end - begin <= P:
        dec, enc, bias, fired = _over_tokens(
            begin, end, c, slot_ptr, values_ptr, dots_ptr, rows_ptr, error_ptr, centred_ptr,
            _shift(latent, widths_ptr, N, H, G), D, K, G, TB, C,
        )  # fmt: skip
    else:
        cm = c < D
        dec = tl.zeros([C], tl.float32)
        enc = tl.zeros([C], tl.float32)
        biases = tl.zeros([TB], tl.float32)
        firings = tl.zeros([TB], tl.float32)
        stop = (end - 1) // P + 1
        for p0 in range(begin // P, stop, TB):
            p = p0 + tl.arange(0, TB)
            pm = p < stop
            at = 2 * p + (p * P < begin).to(tl.int64)
            mask = pm[:, None] & cm[None, :]
            dec += tl.sum(tl.load(part_dec_ptr + at[:, None] * D + c[None, :], mask=mask, other=0.0), 0)
            enc += tl.sum(tl.load(part_enc_ptr + at[:, None] * D + c[None, :], mask=mask, other=0.0), 0)
            biases += tl.load(part_bias_ptr + at, mask=pm, other=0.0)
            firings += tl.load(part_fired_ptr + at, mask=pm, other=0.0)
        bias = tl.sum(biases, 0)
        fired = tl.sum(firings, 0)
    _store_sums(latent, c, dec * factor, enc, bias, fired, g_dec_ptr, g_enc_ptr, g_bias_ptr, fired_ptr, D)


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


def decode(
    values: Tensor, index: Tensor, W_Mhd: Tensor, b_dec_Md: Tensor, x_Nd: Tensor, scale: Tensor,
    keep_N: Tensor | None, factor: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Error (M, N, d) in W's dtype, `factor` · its dot products with the selected rows (M · N, k), squares (M, N)."""
    (rows, k), (members, h, d), n = values.shape, W_Mhd.shape, len(x_Nd)
    error = torch.empty(members, n, d, dtype=W_Mhd.dtype, device=values.device)
    dots = torch.empty(rows, k, device=values.device)
    squares = torch.empty(members, n, device=values.device)
    padded = max(16, triton.next_power_of_2(k))
    columns = min(triton.next_power_of_2(d), max(16, _DECODE_TILE // padded))
    _decode[(rows,)](
        values, index, W_Mhd, b_dec_Md, x_Nd, scale, keep_N, error, dots, squares, n, h, factor,
        d, keep_N is not None, k, padded, columns, num_warps=max(1, min(8, padded * columns // _DECODE_TILE)),
    )  # fmt: skip
    return error, dots, squares


def sort_keys(index: Tensor, members: int, h: int) -> Tensor:
    """The latent of every selected entry among all members' (empty places: behind them), in as few bits as will do.

    A stable sort by it puts the entries of a latent side by side, in the order of the tokens.
    """
    key = index.view(members, -1)
    if members > 1:
        first = torch.arange(0, members * h, h, dtype=torch.int32, device=index.device).unsqueeze(1)
        key = torch.where(key < h, key + first, members * h)
    return (key - _INT16).to(torch.int16).view(-1) if members * h < 2 * _INT16 else key.reshape(-1)


def by_latent(
    keys: Tensor, values: Tensor, dots: Tensor, error: Tensor, centred_MNd: Tensor, h: int, factor: float,
    rows: Tensor | None = None, widths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of W_dec and W_enc (M, h, d), of b_enc (M, h), and the firing counts (M, h); `keys`: `sort_keys`.

    `values` and `dots` are (M · N, k), or (M, E) where `rows` (M, E) are those of a `batch.Ragged`. `error` is
    (M, N, d), or (M, G, N, d), what latents of each prefix learn from, where `widths` are the prefixes' ends.
    Latents that fire often are cut into pieces, so that no program has much more to do than the others.
    """
    members, n, d = centred_MNd.shape
    k, device, latents, entries = 0 if rows is not None else values.shape[1], values.device, members * h, len(keys)
    prefixes = 1 if widths is None else len(widths)
    shift = _INT16 if keys.dtype == torch.int16 else 0
    ordered, slot = keys.sort(stable=True)
    bounds = torch.arange(-shift, latents + 1 - shift, dtype=keys.dtype, device=device)
    start = torch.searchsorted(ordered, bounds, out_int32=True)
    piece = 64 if entries < _MANY else 128  # a latent that fires on every token is the work of many programs
    pieces = triton.cdiv(entries, piece)
    parts = torch.empty(2, 2 * pieces, d, device=device)
    part_sums = torch.empty(2, 2 * pieces, device=device)
    g_dec = torch.empty(members, h, d, dtype=error.dtype, device=device)
    g_enc = torch.empty_like(g_dec)
    g_bias, fired = torch.empty(members, h, device=device), torch.empty(members, h, device=device)
    ordered_once = 128 < d <= 1024 and entries < _MANY
    columns = min(triton.next_power_of_2(d), 128 if d <= 1024 and not ordered_once else 256)
    at_once = 8 if columns <= 64 else 4
    taken: tuple[Tensor | None, ...] = (slot, values, dots, rows)
    if ordered_once:  # with 256 columns every thread has some of its own, and adds up entries without the others
        in_order = (*torch.empty(2, entries, device=device), torch.empty(entries, dtype=torch.int32, device=device))
        _in_order[(triton.cdiv(entries, 1024),)](*taken, *in_order, entries, k, 1024)
        taken, k, at_once = (None, *in_order), 0, 2
    read = (*taken, error, centred_MNd, widths)
    # all first columns, then all the next: what they read stays in the second-level cache meanwhile
    _pieces[(pieces, triton.cdiv(d, columns))](
        ordered, start, *read, *parts, *part_sums, n, h, entries, latents, shift,
        d, k, prefixes, piece, at_once, columns, num_warps=1,
    )  # fmt: skip
    _by_latent[(latents, triton.cdiv(d, columns))](
        start, *read, *parts, *part_sums, g_dec, g_enc, g_bias, fired, n, h, factor,
        d, k, prefixes, piece, at_once, columns, num_warps=1,
    )  # fmt: skip
    return g_dec, g_enc, g_bias, fired
