"""Triton kernels that decode codes of any number of latents per token, and of prefixes of the dictionary.

The entries of a code lie token after token. Latents below the first width belong to prefix 0, those below the next to
prefix 1, and so on. e_m is the error of the reconstruction from prefixes 0 … m, and E_g = Σ_{m ≥ g} e_m is what an
entry of prefix g learns from: the errors that it has a part in. With one prefix E_0 is the error.
A token is the work of one program; those with more than P entries are put together from pieces of P entries, so that no
program has much more to do than the others.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048
"""Elements (entries x columns) that a program has at a time."""


@triton.jit
def _prefix(index, widths_ptr, G: tl.constexpr):
    """Which prefix a latent belongs to."""
    prefix = index * 0
    for g in tl.static_range(G - 1):
        prefix += (index >= tl.load(widths_ptr + g)).to(tl.int32)
    return prefix


@triton.jit
def _entries(values_ptr, index_ptr, j, mask, widths_ptr, w_ptr, D: tl.constexpr, G: tl.constexpr):
    """Values, which of them are above 0, the rows of W, and the prefixes."""
    v = tl.load(values_ptr + j, mask=mask, other=0.0)
    on = v > 0
    i = tl.load(index_ptr + j, mask=on, other=0)
    return v, on, w_ptr + i.to(tl.int64) * D, _prefix(i, widths_ptr, G)


@triton.jit
def _less_input(bias_ptr, x_ptr, scale, keep, c, cm):
    """b_dec − x, which the reconstruction is added to."""
    base = tl.load(bias_ptr + c, mask=cm, other=0.0)
    base -= tl.load(x_ptr + c, mask=cm, other=0.0).to(tl.float32) * scale
    return base * keep


@triton.jit
def _short(
    begin, end, values_ptr, index_ptr, widths_ptr, w_ptr, bias_ptr, x_ptr, scale, keep, error_ptr, dots_ptr, step,
    factor, D: tl.constexpr, G: tl.constexpr, KP: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A token with at most KP entries: all E_g, the entries' dots, ‖e_last‖² and Σ ‖e_m‖².

    A piece of C columns of the entries' rows of W is read once for everything.
    """
    j = begin + tl.arange(0, KP)
    jm = j < end
    v, on, rows_ptr, prefix = _entries(values_ptr, index_ptr, j, jm, widths_ptr, w_ptr, D, G)
    dots = tl.zeros([KP], tl.float32)
    last = tl.zeros([C], tl.float32)
    every = tl.zeros([C], tl.float32)
    for c0 in range(0, D, C):
        c = c0 + tl.arange(0, C)
        cm = c < D
        w = tl.load(rows_ptr[:, None] + c[None, :], mask=on[:, None] & cm[None, :], other=0.0).to(tl.float32)
        base = _less_input(bias_ptr, x_ptr, scale, keep, c, cm)
        e = tl.where(cm, tl.sum(v[:, None] * w, 0) + base, 0.0)
        total = e
        last += e * e
        every += e * e
        tl.store(error_ptr + (G - 1) * step + c, total, mask=cm)
        if G == 1:
            dots += tl.sum(w * total[None, :], 1)
        else:
            own = tl.zeros([KP, C], tl.float32) + total[None, :]
            for back in tl.static_range(1, G):
                g = G - 1 - back
                e -= tl.sum(tl.where(prefix == g + 1, v, 0.0)[:, None] * w, 0)
                total += e
                every += e * e
                tl.store(error_ptr + g * step + c, total, mask=cm)
                own = tl.where((prefix == g)[:, None], total[None, :], own)
            dots += tl.sum(w * own, 1)
    tl.store(dots_ptr + j, tl.where(on, dots * factor, 0.0), mask=jm)
    return tl.sum(last, 0), tl.sum(every, 0)


@triton.jit
def _short_nested(
    begin, end, values_ptr, index_ptr, widths_ptr, w_ptr, bias_ptr, x_ptr, scale, keep, error_ptr, dots_ptr, step,
    factor, D: tl.constexpr, G: tl.constexpr, KP: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """`_short` for up to 8 prefixes in bfloat16, by two small matrix products instead of sums per prefix.

    Rows 0 … 7 of the first are the reconstructions from the prefixes, rows 8 … 15 what E_0, … are made of; values
    go into it as sums of two bfloat16 numbers.
    """
    j = begin + tl.arange(0, KP)
    jm = j < end
    v, on, rows_ptr, prefix = _entries(values_ptr, index_ptr, j, jm, widths_ptr, w_ptr, D, G)
    m = tl.arange(0, 16)
    own = m % 8
    real = own < G
    summed = real & (m >= 8)
    weight = tl.where(summed, G - own, 1).to(tl.float32)
    times = tl.where(m[:, None] < 8, (prefix[None, :] <= own[:, None]).to(tl.int32), 0)
    times = tl.where(m[:, None] < 8, times, G - tl.maximum(prefix[None, :], own[:, None]))
    a = tl.where(real[:, None] & on[None, :], v[None, :] * times.to(tl.float32), 0.0)
    high = a.to(tl.bfloat16)
    rest = (a - high.to(tl.float32)).to(tl.bfloat16)
    dots = tl.zeros([KP, 16], tl.float32)
    squares = tl.zeros([16, C], tl.float32)
    for c0 in range(0, D, C):
        c = c0 + tl.arange(0, C)
        cm = c < D
        w = tl.load(rows_ptr[:, None] + c[None, :], mask=on[:, None] & cm[None, :], other=0.0)
        e = tl.dot(rest, w, tl.dot(high, w))
        base = _less_input(bias_ptr, x_ptr, scale, keep, c, cm)
        e = tl.where(real[:, None] & cm[None, :], e + weight[:, None] * base[None, :], 0.0)
        squares += e * e
        low = e.to(tl.bfloat16)
        tl.store(error_ptr + own[:, None] * step + c[None, :], low, mask=summed[:, None] & cm[None, :])
        dots = tl.dot(w, tl.trans(low), dots)
    of_prefix = tl.sum(tl.where(prefix[:, None] + 8 == m[None, :], dots, 0.0), 1)
    tl.store(dots_ptr + j, tl.where(on, of_prefix * factor, 0.0), mask=jm)
    by_prefix = tl.sum(squares, 1)
    return tl.sum(tl.where(m == G - 1, by_prefix, 0.0), 0), tl.sum(tl.where(m < 8, by_prefix, 0.0), 0)


@triton.jit
def _token(
    begin, end, values_ptr, index_ptr, widths_ptr, w_ptr, bias_ptr, x_ptr, scale, keep, error_ptr, dots_ptr, step,
    factor, D: tl.constexpr, G: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """`_short`, the faster way."""
    if NESTED:
        last, every = _short_nested(
            begin, end, values_ptr, index_ptr, widths_ptr, w_ptr, bias_ptr, x_ptr, scale, keep, error_ptr, dots_ptr,
            step, factor, D, G, KP, C,
        )  # fmt: skip
    else:
        last, every = _short(
            begin, end, values_ptr, index_ptr, widths_ptr, w_ptr, bias_ptr, x_ptr, scale, keep, error_ptr, dots_ptr,
            step, factor, D, G, KP, C,
        )  # fmt: skip
    return last, every


@triton.jit
def _long(
    begin, end, part_ptr, bias_ptr, x_ptr, scale, keep, error_ptr, step,
    D: tl.constexpr, G: tl.constexpr, P: tl.constexpr, TB: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """As `_short`, without the dots, from the sums of the token's pieces."""
    last = tl.zeros([C], tl.float32)
    every = tl.zeros([C], tl.float32)
    stop = (end - 1) // P + 1
    for c0 in range(0, D, C):
        c = c0 + tl.arange(0, C)
        cm = c < D
        e = _less_input(bias_ptr, x_ptr, scale, keep, c, cm)
        for g in tl.static_range(G):
            e += _over_pieces(begin, stop, g, part_ptr, c, cm, D, G, P, TB, C)
        e = tl.where(cm, e, 0.0)
        total = e
        last += e * e
        every += e * e
        tl.store(error_ptr + (G - 1) * step + c, total, mask=cm)
        for back in tl.static_range(1, G):
            g = G - 1 - back
            e -= _over_pieces(begin, stop, g + 1, part_ptr, c, cm, D, G, P, TB, C)
            total += e
            every += e * e
            tl.store(error_ptr + g * step + c, total, mask=cm)
    return tl.sum(last, 0), tl.sum(every, 0)


@triton.jit
def _over_pieces(
    begin, stop, g, part_ptr, c, cm, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr, TB: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Columns c of Σ value · W over a token's entries of prefix g."""
    found = tl.zeros([C], tl.float32)
    for p0 in range(begin // P, stop, TB):
        p = p0 + tl.arange(0, TB)
        at = (2 * p + (p * P < begin).to(tl.int64)) * G + g
        mask = (p < stop)[:, None] & cm[None, :]
        found += tl.sum(tl.load(part_ptr + at[:, None] * D + c[None, :], mask=mask, other=0.0), 0)
    return found


@triton.jit
def _decode(
    values_ptr, index_ptr, start_ptr, part_ptr, widths_ptr, w_ptr, bias_ptr, x_ptr, scale_ptr, keep_ptr, error_ptr,
    dots_ptr, squares_ptr, N, H, E, pieces, members, factor, D: tl.constexpr, KEEP: tl.constexpr, K: tl.constexpr,
    G: tl.constexpr, P: tl.constexpr, C: tl.constexpr, SHORT: tl.constexpr, LONG: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """One token of one member. K > 0: every token has K entries, else `start` says which are its."""
    row = tl.program_id(0).to(tl.int64)
    member, n = row // N, row % N
    keep = 1.0
    if KEEP:
        keep = tl.load(keep_ptr + n)
    scale = tl.load(scale_ptr)
    values_ptr += member * E
    index_ptr += member * E
    dots_ptr += member * E
    w_ptr += member * H * D
    bias_ptr += member * D
    x_ptr += n * D
    error_ptr += (member * G * N + n) * D
    step = (n * 0 + N) * D
    squares_ptr += row
    if K > 0:
        last, every = _token(
            n * K, n * K + K, values_ptr, index_ptr, widths_ptr, w_ptr, bias_ptr, x_ptr, scale, keep, error_ptr,
            dots_ptr, step, factor, D, G, P, C, NESTED,
        )  # fmt: skip
        tl.store(squares_ptr, last)
        tl.store(squares_ptr + members * N, every)
    else:
        begin = tl.load(start_ptr + row + member).to(tl.int64)
        end = tl.load(start_ptr + row + member + 1).to(tl.int64)
        if end - begin <= P // 2:
            last, every = _token(
                begin, end, values_ptr, index_ptr, widths_ptr, w_ptr, bias_ptr, x_ptr, scale, keep, error_ptr,
                dots_ptr, step, factor, D, G, P // 2, SHORT, NESTED,
            )  # fmt: skip
            tl.store(squares_ptr, last)
            tl.store(squares_ptr + members * N, every)
        elif end - begin <= P:
            last, every = _token(
                begin, end, values_ptr, index_ptr, widths_ptr, w_ptr, bias_ptr, x_ptr, scale, keep, error_ptr,
                dots_ptr, step, factor, D, G, P, C, NESTED,
            )  # fmt: skip
            tl.store(squares_ptr, last)
            tl.store(squares_ptr + members * N, every)
        else:
            part_ptr += member * pieces * 2 * G * D
            last, every = _long(begin, end, part_ptr, bias_ptr, x_ptr, scale, keep, error_ptr, step, D, G, P, 4, LONG)
            tl.store(squares_ptr, last)
            tl.store(squares_ptr + members * N, every)


@triton.jit
def _long_rows(start_ptr, rows_ptr, member, piece, N, E, P: tl.constexpr):
    """Of a piece's first and last entry: the token, and where its entries begin and end; a long one has more than P."""
    start_ptr += member * (N + 1)
    used = tl.load(start_ptr + N).to(tl.int64)
    first = piece * P
    last = tl.minimum(first + P, used) - 1
    a = tl.load(rows_ptr + member * E + first, mask=first < used, other=0).to(tl.int64) - member * N
    b = tl.load(rows_ptr + member * E + last, mask=first < used, other=0).to(tl.int64) - member * N
    a = tl.where(first < used, a, 0)
    b = tl.where(first < used, b, 0)
    a_begin = tl.load(start_ptr + a).to(tl.int64)
    a_end = tl.load(start_ptr + a + 1).to(tl.int64)
    b_begin = tl.load(start_ptr + b).to(tl.int64)
    b_end = tl.load(start_ptr + b + 1).to(tl.int64)
    return first, used, a_begin, a_end, b_begin, b_end


@triton.jit
def _piece_sums(
    values_ptr, index_ptr, start_ptr, rows_ptr, widths_ptr, w_ptr, part_ptr, N, H, E,
    D: tl.constexpr, G: tl.constexpr, P: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Σ value · W by prefix over entries [P·piece, P·(piece + 1)) of the long tokens, WIDE columns.

    One or two of these tokens reach in here.

    Place 2·piece holds what belongs to the token of the first entry, the next one what belongs to a token that begins
    later and goes on behind the last.
    """
    member = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(0).to(tl.int64)
    first, used, a_begin, a_end, b_begin, b_end = _long_rows(start_ptr, rows_ptr, member, piece, N, E, P)
    for side in range(2):
        begin = tl.where(side == 0, a_begin, b_begin)
        end = tl.where(side == 0, a_end, b_end)
        if (first < used) & (end - begin > P) & ((side == 0) | (begin > first)):
            j = first + tl.arange(0, P)
            mask = (j >= begin) & (j < end)
            v, on, rows, prefix = _entries(
                values_ptr + member * E, index_ptr + member * E, j, mask, widths_ptr, w_ptr + member * H * D, D, G
            )
            out_ptr = part_ptr + ((member * tl.num_programs(0) + piece) * 2 + side) * G * D
            first_column = tl.program_id(2) * WIDE
            for c0 in range(first_column, first_column + WIDE, C):
                c = c0 + tl.arange(0, C)
                cm = c < D
                w = tl.load(rows[:, None] + c[None, :], mask=on[:, None] & cm[None, :], other=0.0).to(tl.float32)
                for g in tl.static_range(G):
                    own = tl.where(prefix == g, v, 0.0)
                    tl.store(out_ptr + g * D + c, tl.sum(own[:, None] * w, 0), mask=cm)


@triton.jit
def _long_dots(
    values_ptr, index_ptr, start_ptr, rows_ptr, widths_ptr, w_ptr, error_ptr, dots_ptr, N, H, E, factor,
    D: tl.constexpr, G: tl.constexpr, P: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The dots of those of B entries that belong to tokens with more than P."""
    member = tl.program_id(1).to(tl.int64)
    start_ptr += member * (N + 1)
    j = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    used = j < tl.load(start_ptr + N).to(tl.int64)
    row = tl.load(rows_ptr + member * E + j, mask=used, other=0).to(tl.int64)
    token = tl.where(used, row - member * N, 0)
    mask = used & (tl.load(start_ptr + token + 1) - tl.load(start_ptr + token) > P)
    if tl.max(mask.to(tl.int32), 0) > 0:
        _v, on, rows, prefix = _entries(
            values_ptr + member * E, index_ptr + member * E, j, mask, widths_ptr, w_ptr + member * H * D, D, G
        )
        errors = error_ptr + (row + (member * (G - 1) + prefix) * N) * D
        dots = tl.zeros([B], tl.float32)
        for c0 in range(0, D, C):
            c = c0 + tl.arange(0, C)
            at = on[:, None] & (c < D)[None, :]
            w = tl.load(rows[:, None] + c[None, :], mask=at, other=0.0).to(tl.float32)
            e = tl.load(errors[:, None] + c[None, :], mask=at, other=0.0).to(tl.float32)
            dots += tl.sum(w * e, 1)
        tl.store(dots_ptr + member * E + j, tl.where(on, dots * factor, 0.0), mask=mask)


def _most_at_once(places: int, n: int) -> int:
    """Entries from which a token is cut into pieces: more than twice as many as tokens have in the mean."""
    return min(512, max(32, triton.next_power_of_2(2 * triton.cdiv(places, n))))


def decode(
    values: Tensor, index: Tensor, rows: tuple[Tensor, Tensor] | None, widths: Tensor, W_Mhd: Tensor,
    b_dec_Md: Tensor, x_Nd: Tensor, scale: Tensor, keep_N: Tensor | None, factor: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """E_g (M, G, N, d) in W's dtype, `factor` times the entries' dots with it, and (2, M, N): ‖e_last‖², Σ ‖e_m‖².

    `values` and `index` are (M · N, k), or (M, E) where `rows` are those of a `batch.Ragged` and its starts. `widths`
    (int32) are the prefixes' ends, the last one h.
    """
    members, h, d = W_Mhd.shape
    n, g, device = len(x_Nd), len(widths), values.device
    k = 0 if rows is not None else values.shape[1]
    places = values.numel() // members
    most = max(16, triton.next_power_of_2(k)) if k else _most_at_once(places, n)
    width = triton.next_power_of_2(d)
    columns, short = min(width, max(16, _TILE // most)), min(width, max(16, 2 * _TILE // most))
    nested = 1 < g <= 8 and W_Mhd.dtype == torch.bfloat16 and columns >= 16
    error = torch.empty(members, g, n, d, dtype=W_Mhd.dtype, device=device)
    dots = torch.empty_like(values)
    squares = torch.empty(2, members, n, device=device)
    pieces = triton.cdiv(places, most)
    warps = max(1, min(8, most * columns // _TILE))
    if rows is None:
        part = places_of = start = values  # not read
    else:
        places_of, start = rows
        part = torch.empty(members, pieces, 2, g, d, device=device)
        wide = max(columns, min(width, 128))
        _piece_sums[(pieces, members, triton.cdiv(d, wide))](
            values, index, start, places_of, widths, W_Mhd, part, n, h, places, d, g, most, columns, wide,
            num_warps=warps,
        )  # fmt: skip
    _decode[(members * n,)](
        values, index, start, part, widths, W_Mhd, b_dec_Md, x_Nd, scale, keep_N, error, dots, squares, n, h, places,
        pieces, members, factor, d, keep_N is not None, k, g, most, columns, short,
        min(width, 128), nested,
        num_warps=warps,
    )  # fmt: skip
    if rows is not None:
        _long_dots[(triton.cdiv(places, 32), members)](
            values, index, start, places_of, widths, W_Mhd, error, dots, n, h, places, factor, d, g, most, 32,
            min(width, 64), num_warps=1,
        )  # fmt: skip
    return error, dots, squares
