"""Triton kernels that decode codes of any number of latents per token, and of prefixes of the dictionary.

The entries of a code lie token after token. Latents below the first width belong to prefix 0, those below the next to
prefix 1, and so on. e_m is the error of the reconstruction from prefixes 0 … m, and E_g = Σ_{m ≥ g} e_m is what an
entry of prefix g learns from: the errors that it has a part in. With one prefix E_0 is the error.
A token with up to P entries is the work of one program, which reads them once. A longer one is that of several, each
with some of the columns, so that none has much more to do than the others; they read it twice, a few entries at a time.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048
"""Elements (entries x columns) that a program has at a time."""
_WIDE = 128
"""Columns of a long token that a program has."""


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
    begin, end, values_ptr, index_ptr, widths_ptr, w_ptr, bias_ptr, x_ptr, scale, keep, error_ptr, dots_ptr,
    step, factor, D: tl.constexpr, G: tl.constexpr, KP: tl.constexpr, C: tl.constexpr,
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
def _of_prefix(
    begin, end, c, values_ptr, index_ptr, widths_ptr, w_ptr, D: tl.constexpr, G: tl.constexpr, PREFIX: tl.constexpr,
    B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Columns c of Σ value · W over a token's entries of one prefix (−1: of all)."""
    found = tl.zeros([B, C], tl.float32)
    for j0 in range(begin, end, B):
        j = j0 + tl.arange(0, B)
        v, on, rows_ptr, prefix = _entries(values_ptr, index_ptr, j, j < end, widths_ptr, w_ptr, D, G)
        if PREFIX >= 0:
            on = on & (prefix == PREFIX)
        w = tl.load(rows_ptr[:, None] + c[None, :], mask=on[:, None] & (c < D)[None, :], other=0.0)
        found += v[:, None] * w.to(tl.float32)
    return tl.sum(found, 0)


@triton.jit
def _long(
    begin, end, first, values_ptr, index_ptr, widths_ptr, w_ptr, bias_ptr, x_ptr, scale, keep, error_ptr, dots_ptr,
    step, factor, D: tl.constexpr, G: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`_short` for any number of entries, B at a time, of columns [first, first + WIDE)."""
    c = first + tl.arange(0, WIDE)
    cm = c < D
    e = _of_prefix(begin, end, c, values_ptr, index_ptr, widths_ptr, w_ptr, D, G, -1, B, WIDE)
    e = tl.where(cm, e + _less_input(bias_ptr, x_ptr, scale, keep, c, cm), 0.0)
    total = e
    last = e * e
    every = e * e
    tl.store(error_ptr + (G - 1) * step + c, total, mask=cm)
    for back in tl.static_range(1, G):
        e -= _of_prefix(begin, end, c, values_ptr, index_ptr, widths_ptr, w_ptr, D, G, G - back, B, WIDE)
        total += e
        every += e * e
        tl.store(error_ptr + (G - 1 - back) * step + c, total, mask=cm)
    if G > 1:
        tl.debug_barrier()  # the errors are read again there
    for j0 in range(begin, end, B):
        j = j0 + tl.arange(0, B)
        _v, on, rows_ptr, prefix = _entries(values_ptr, index_ptr, j, j < end, widths_ptr, w_ptr, D, G)
        at = on[:, None] & cm[None, :]
        w = tl.load(rows_ptr[:, None] + c[None, :], mask=at, other=0.0).to(tl.float32)
        if G == 1:
            dots = tl.sum(w * total[None, :], 1)
        else:
            own = tl.load(error_ptr + prefix[:, None] * step + c[None, :], mask=at, other=0.0)
            dots = tl.sum(w * own.to(tl.float32), 1)
        tl.store(dots_ptr + j, tl.where(on, dots * factor, 0.0), mask=j < end)
    return tl.sum(last, 0), tl.sum(every, 0)


@triton.jit
def _times(v, on, prefix, m, G: tl.constexpr):
    """What the entries' rows of W are multiplied by, as sums of two bfloat16 numbers.

    Rows 0 … 7 give the reconstructions from the prefixes, rows 8 … 15 what E_0, … are made of.
    """
    own = m % 8
    times = tl.where(m[:, None] < 8, (prefix[None, :] <= own[:, None]).to(tl.int32), 0)
    times = tl.where(m[:, None] < 8, times, G - tl.maximum(prefix[None, :], own[:, None]))
    a = tl.where((own < G)[:, None] & on[None, :], v[None, :] * times.to(tl.float32), 0.0)
    high = a.to(tl.bfloat16)
    return high, (a - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _less_inputs(e, m, c, bias_ptr, x_ptr, scale, keep, D: tl.constexpr, G: tl.constexpr):
    """The errors from the reconstructions, and E_0, … from what they are made of."""
    cm = c < D
    weight = tl.where(m >= 8, G - m % 8, 1).to(tl.float32)
    base = _less_input(bias_ptr, x_ptr, scale, keep, c, cm)
    return tl.where((m % 8 < G)[:, None] & cm[None, :], e + weight[:, None] * base[None, :], 0.0)


@triton.jit
def _nested(
    begin, end, first, values_ptr, index_ptr, widths_ptr, w_ptr, bias_ptr, x_ptr, scale, keep, error_ptr, dots_ptr,
    step, factor, D: tl.constexpr, G: tl.constexpr, KP: tl.constexpr, C: tl.constexpr,
    SHORT: tl.constexpr,
):  # fmt: skip
    """`_short` (SHORT) or `_long` for up to 8 prefixes in bfloat16, by small matrix products instead of sums."""
    m = tl.arange(0, 16)
    real = m % 8 < G
    summed = real & (m >= 8)
    j = begin + tl.arange(0, KP)
    by_prefix = tl.zeros([16], tl.float32)
    if SHORT:
        v, on, rows_ptr, prefix = _entries(values_ptr, index_ptr, j, j < end, widths_ptr, w_ptr, D, G)
        high, rest = _times(v, on, prefix, m, G)
        dots = tl.zeros([KP, 16], tl.float32)
        squares = tl.zeros([16, C], tl.float32)
        for c0 in range(0, D, C):
            c = c0 + tl.arange(0, C)
            cm = c < D
            w = tl.load(rows_ptr[:, None] + c[None, :], mask=on[:, None] & cm[None, :], other=0.0)
            e = _less_inputs(tl.dot(rest, w, tl.dot(high, w)), m, c, bias_ptr, x_ptr, scale, keep, D, G)
            squares += e * e
            low = e.to(tl.bfloat16)
            tl.store(error_ptr + (m % 8)[:, None] * step + c[None, :], low, mask=summed[:, None] & cm[None, :])
            dots = tl.dot(w, tl.trans(low), dots)
        of_prefix = tl.sum(tl.where(prefix[:, None] + 8 == m[None, :], dots, 0.0), 1)
        tl.store(dots_ptr + j, tl.where(on, of_prefix * factor, 0.0), mask=j < end)
        by_prefix = tl.sum(squares, 1)
    else:
        c = first + tl.arange(0, C)
        cm = c < D
        e = tl.zeros([16, C], tl.float32)
        for j0 in range(begin, end, KP):
            j = j0 + tl.arange(0, KP)
            v, on, rows_ptr, prefix = _entries(values_ptr, index_ptr, j, j < end, widths_ptr, w_ptr, D, G)
            high, rest = _times(v, on, prefix, m, G)
            w = tl.load(rows_ptr[:, None] + c[None, :], mask=on[:, None] & cm[None, :], other=0.0)
            e = tl.dot(rest, w, tl.dot(high, w, e))
        e = _less_inputs(e, m, c, bias_ptr, x_ptr, scale, keep, D, G)
        low = e.to(tl.bfloat16)
        tl.store(error_ptr + (m % 8)[:, None] * step + c[None, :], low, mask=summed[:, None] & cm[None, :])
        for j0 in range(begin, end, KP):
            j = j0 + tl.arange(0, KP)
            v, on, rows_ptr, prefix = _entries(values_ptr, index_ptr, j, j < end, widths_ptr, w_ptr, D, G)
            w = tl.load(rows_ptr[:, None] + c[None, :], mask=on[:, None] & cm[None, :], other=0.0)
            dots = tl.dot(w, tl.trans(low))
            of_prefix = tl.sum(tl.where(prefix[:, None] + 8 == m[None, :], dots, 0.0), 1)
            tl.store(dots_ptr + j, tl.where(on, of_prefix * factor, 0.0), mask=j < end)
        by_prefix = tl.sum(e * e, 1)
    return tl.sum(tl.where(m == G - 1, by_prefix, 0.0), 0), tl.sum(tl.where(m < 8, by_prefix, 0.0), 0)


@triton.jit
def _token(
    begin, end, first, values_ptr, index_ptr, widths_ptr, w_ptr, bias_ptr, x_ptr, scale, keep, error_ptr, dots_ptr,
    step, factor, D: tl.constexpr, G: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, SHORT: tl.constexpr,
    NESTED: tl.constexpr,
):  # fmt: skip
    """A token with at most KP entries, C columns at a time (SHORT), or C columns of one, KP entries at a time."""
    if NESTED:
        last, every = _nested(
            begin, end, first, values_ptr, index_ptr, widths_ptr, w_ptr, bias_ptr, x_ptr, scale, keep, error_ptr,
            dots_ptr, step, factor, D, G, KP, C, SHORT,
        )  # fmt: skip
    elif SHORT:
        last, every = _short(
            begin, end, values_ptr, index_ptr, widths_ptr, w_ptr, bias_ptr, x_ptr, scale, keep, error_ptr, dots_ptr,
            step, factor, D, G, KP, C,
        )  # fmt: skip
    else:
        last, every = _long(
            begin, end, first, values_ptr, index_ptr, widths_ptr, w_ptr, bias_ptr, x_ptr, scale, keep, error_ptr,
            dots_ptr, step, factor, D, G, KP, C,
        )  # fmt: skip
    return last, every


@triton.jit
def _decode(
    values_ptr, index_ptr, start_ptr, widths_ptr, w_ptr, bias_ptr, x_ptr, scale_ptr, keep_ptr, error_ptr,
    dots_ptr, squares_ptr, N, H, E, members, factor, D: tl.constexpr, KEEP: tl.constexpr, K: tl.constexpr,
    G: tl.constexpr, P: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """One token of one member, or WIDE columns of a long one. K > 0: tokens have K entries, else `start` says which."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * WIDE
    member, n = row // N, row % N
    keep = 1.0
    if KEEP:
        keep = tl.load(keep_ptr + n)
    scale = tl.load(scale_ptr)
    values_ptr += member * E
    index_ptr += member * E
    dots_ptr += (tl.program_id(1).to(tl.int64) * members + member) * E
    w_ptr += member * H * D
    bias_ptr += member * D
    x_ptr += n * D
    error_ptr += (member * G * N + n) * D
    step = (n * 0 + N) * D
    if K > 0:
        begin = n * K
        end = begin + K
    else:
        begin = tl.load(start_ptr + row + member).to(tl.int64)
        end = tl.load(start_ptr + row + member + 1).to(tl.int64)
    last = 0.0
    every = 0.0
    if (end - begin <= P) & (first > 0):  # the program of the first columns has them all
        j = begin + tl.arange(0, P)
        tl.store(dots_ptr + j, tl.zeros([P], tl.float32), mask=j < end)
    elif end - begin <= P // 2:
        last, every = _token(
            begin, end, first, values_ptr, index_ptr, widths_ptr, w_ptr, bias_ptr, x_ptr, scale, keep, error_ptr,
            dots_ptr, step, factor, D, G, P // 2, min(WIDE // 2, max(16, 2 * TILE // P)), True, NESTED,
        )  # fmt: skip
    elif end - begin <= P:
        last, every = _token(
            begin, end, first, values_ptr, index_ptr, widths_ptr, w_ptr, bias_ptr, x_ptr, scale, keep, error_ptr,
            dots_ptr, step, factor, D, G, P, min(WIDE // 2, max(16, TILE // P)), True, NESTED,
        )  # fmt: skip
    else:
        last, every = _token(
            begin, end, first, values_ptr, index_ptr, widths_ptr, w_ptr, bias_ptr, x_ptr, scale, keep, error_ptr,
            dots_ptr, step, factor, D, G, max(16 if NESTED else 1, TILE // WIDE), WIDE, False, NESTED,
        )  # fmt: skip
    squares_ptr += (member * tl.num_programs(1) + tl.program_id(1)) * N + n
    tl.store(squares_ptr, last)
    tl.store(squares_ptr + tl.num_programs(1).to(tl.int64) * members * N, every)


def _most_at_once(places: int, n: int) -> int:
    """Entries of a token that are read once: up to more than twice as many as tokens have in the mean."""
    return min(512, max(32, triton.next_power_of_2(2 * triton.cdiv(places, n))))


def decode(
    values: Tensor, index: Tensor, start: Tensor | None, widths: Tensor, W_Mhd: Tensor,
    b_dec_Md: Tensor, x_Nd: Tensor, scale: Tensor, keep_N: Tensor | None, factor: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """E_g (M, G, N, d) in W's dtype, `factor` times the entries' dots with it, and ‖e_last‖² and Σ ‖e_m‖².

    Those two are (2, M, S, N), sums over S parts of the columns. `values` and `index` are (M · N, k), or (M, E) where
    `start` is that of a `batch.Ragged`. `widths` (int32) are the prefixes' ends, the last one h.
    """
    members, h, d = W_Mhd.shape
    n, g, device = len(x_Nd), len(widths), values.device
    k = 0 if start is not None else values.shape[1]
    places = values.numel() // members
    most = max(32, triton.next_power_of_2(k)) if k else _most_at_once(places, n)
    nested = 1 < g <= 8 and W_Mhd.dtype == torch.bfloat16
    wide = max(32, min(triton.next_power_of_2(d), _WIDE))
    parts = triton.cdiv(d, wide)
    registers = 255 if W_Mhd.dtype != torch.bfloat16 else 168 if nested else 128
    error = torch.empty(members, g, n, d, dtype=W_Mhd.dtype, device=device)
    dots = torch.empty(parts, *values.shape, device=device)
    squares = torch.empty(2, members, parts, n, device=device)
    _decode[(members * n, parts)](
        values, index, start, widths, W_Mhd, b_dec_Md, x_Nd, scale, keep_N, error, dots, squares, n, h, places,
        members, factor, d, keep_N is not None, k, g, most, wide, _TILE, nested,
        num_warps=max(1, min(8, most * 16 // _TILE)), maxnreg=registers,
    )  # fmt: skip
    return error, dots[0] if parts == 1 else dots.sum(0), squares
