"""What the decoder's rows say of L0, whatever the code (Chanin & Garriga-Alonso 2025, arXiv 2508.16560).

Where L0 is too low or too high, a row mixes several features: rows then point along each other, and along activations
that they have nothing to do with. Shape suffixes: N tokens, e width written, h dictionary width. Rows have norm 1 here.

    c_dec  Σ_{i<j} |cos(W_dec,i, W_dec,j)| / (h (h − 1) / 2)          the paper's (50); dead latents count
    s_dec  the (n · N)-th largest of all N · h numbers (y − b_dec) · W_dec,i      the paper's s_n^dec, (59)

in raw units, with n = h // 4: the paper asks for an n well above L0 and below h / 2, near which it is 0 for any SAE.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saeopt.saes.base import SAE

_BLOCK = 2**24
"""Numbers that are held at once."""
_PER_OCTAVE, _LEAST, _MOST = 64, -40, 40
"""Bins of a projection's size: 2^-40 … 2^40, each 1.1 % wide; smaller ones count as 0."""
_SIDE = (_MOST - _LEAST) * _PER_OCTAVE
EVERY, LONG = 8, 64
"""Of samples of so many tokens every eighth is projected: a quantile of so many numbers needs no more."""


@torch.no_grad()
def mean_cosine(rows_he: Float[Tensor, "h e"]) -> float:
    """c_dec, exactly: h² e multiplications, in blocks that never hold all h² cosines; NaN for one row."""
    h = len(rows_he)
    step, total = max(1, _BLOCK // h), torch.zeros((), dtype=torch.float64, device=rows_he.device)
    for at in range(0, h, step):
        cos_bh = (rows_he[at : at + step] @ rows_he[at:].T).abs()
        # the pairs inside of the block stand twice in it, each row beside itself once
        inside_bb = cos_bh[:, : len(cos_bh)]
        own = inside_bb.diagonal().sum(dtype=torch.float64)
        total += cos_bh.sum(dtype=torch.float64) - (inside_bb.sum(dtype=torch.float64) + own) / 2
    return float(total) / (h * (h - 1) / 2) if h > 1 else math.nan


def some_positions(shape_BT: torch.Size, device: torch.device) -> Bool[Tensor, "B T"]:
    """Which positions are projected."""
    every = EVERY if shape_BT[1] >= LONG else 1
    return (torch.arange(shape_BT[1], device=device) % every == every - 1).expand(shape_BT)


class Projections:
    """Counts of projections on the decoder by their size. `sums` adds up, also over ranks.

    `rows_he` are the decoder's, of norm 1 in raw units.
    """

    def __init__(self, sae: SAE) -> None:
        unit = sae.unit_decoder()
        self.rows_he, self.bias_e, self.h = unit.W_dec.detach().float(), unit.b_dec.detach().float(), sae.h
        self.sums = torch.zeros(2 * _SIDE + 1, dtype=torch.float64, device=self.rows_he.device)

    @torch.no_grad()
    def update(self, y_Ne: Float[Tensor, "N e"]) -> None:
        """Add tokens, all of which count."""
        centred_Ne = y_Ne.float() - self.bias_e
        for part_be in centred_Ne.split(max(1, _BLOCK // self.h)):
            z = (part_be @ self.rows_he.T).flatten()
            size = ((z.abs().log2() - _LEAST) * _PER_OCTAVE).nan_to_num(nan=-1.0).clamp(-1, _SIDE - 1).floor().long()
            self.sums += torch.bincount(_SIDE + torch.where(z < 0, -1, 1) * (size + 1), minlength=2 * _SIDE + 1)

    def result(self) -> dict[str, float]:
        """The metrics; `s_dec` is exact within half a bin, and NaN where there is no token."""
        return {"c_dec": mean_cosine(self.rows_he), "s_dec": self._nth_largest()}

    def _nth_largest(self) -> float:
        count = self.sums.cpu()
        tokens = float(count.sum()) / self.h
        rank = (self.h // 4) * tokens
        if tokens == 0:
            return math.nan
        above = count.flip(0).cumsum(0)  # so many are in this bin or in one of larger numbers
        at = 2 * _SIDE - int((above <= rank).sum())
        size = abs(at - _SIDE) - 1
        return 0.0 if size < 0 else math.copysign(2.0 ** (_LEAST + (size + 0.5) / _PER_OCTAVE), at - _SIDE)
