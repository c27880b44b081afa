"""Whether another seed finds the same latents: decoder rows of several SAEs compared, pair by pair.

Latents that fired on no held-out token are no latents here, in either SAE. With A and B the living latents of two
seeds, and cos(i, j) that of their decoder rows in raw units (|cos| where a code can be negative: a row's sign then
means nothing):

    found_again  share of all i in A with max_j cos(i, j) > 0.9, and of B in A: their mean
    pw_mcc       max over one-to-one matchings of Σ max(cos(i, match(i)), 0) / max(|A|, |B|)    without a match: 0

each the mean over all pairs of seeds; 0 where one of a pair has no living latent, NaN where both have none. PW-MCC:
Song et al. 2025, arXiv 2505.20254; that dead latents are left out, and lower it where their numbers differ, is ours.
Shape suffixes: h latents of one SAE, g of the other, e width written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from saeopt.host.pulse import pulse

ALIKE = 0.9
"""A decoder cosine above this is the same latent."""
MOST_MATCHED = 8192
"""A matching takes h² bytes times 12 and seconds that grow faster: some 7 s here, a minute and 5 GB at h = 24,576."""
_BLOCK = 2**24


@torch.no_grad()
def agreement(
    decoders: Sequence[Float[Tensor, "h e"]],
    fired: Sequence[Float[Tensor, " h"]],
    *,
    signed: bool = True,
    most: int | None = MOST_MATCHED,
) -> dict[str, float]:
    """`found_again`, and `pw_mcc` where no SAE has more than `most` living latents (None: in any case).

    Args:
        decoders: each seed's decoder, rows of norm 1 in raw units.
        fired: on how many tokens each latent fired.
        signed: a row's sign means something: codes are never negative.
    """
    rows = [rows_he[fired_h.to(rows_he.device) > 0] for rows_he, fired_h in zip(decoders, fired, strict=True)]
    pairs = list(combinations(rows, 2))
    found = {"found_again": _mean([found_again(a_he, b_ge, signed) for a_he, b_ge in pairs])}
    if most is None or max(map(len, rows)) <= most:
        found["pw_mcc"] = _mean([matched(a_he, b_ge, signed) for a_he, b_ge in pairs])
    return found


def found_again(a_he: Tensor, b_ge: Tensor, signed: bool = True) -> float:
    """The share of latents that the other has too, both ways. Rows have norm 1."""
    if min(len(a_he), len(b_ge)) == 0:
        return 0.0 if len(a_he) + len(b_ge) else math.nan
    best_g = torch.full((len(b_ge),), -1.0, dtype=b_ge.dtype, device=b_ge.device)
    again = 0
    for part_be in a_he.split(max(1, _BLOCK // len(b_ge))):
        cos_bg = _cosines(part_be, b_ge, signed)
        again += int((cos_bg.amax(1) > ALIKE).sum())
        best_g = torch.maximum(best_g, cos_bg.amax(0))
    return (again / len(a_he) + float((best_g > ALIKE).double().mean())) / 2


def matched(a_he: Tensor, b_ge: Tensor, signed: bool = True) -> float:
    """PW-MCC of two decoders whose rows have norm 1."""
    from scipy.optimize import linear_sum_assignment

    if min(len(a_he), len(b_ge)) == 0:
        return 0.0 if len(a_he) + len(b_ge) else math.nan
    pulse()
    cos_hg = _cosines(a_he, b_ge, signed).clamp_min(0).cpu().numpy()
    rows, columns = linear_sum_assignment(cos_hg, maximize=True)
    return float(cos_hg[rows, columns].sum(dtype="float64")) / max(cos_hg.shape)


def _cosines(a_he: Tensor, b_ge: Tensor, signed: bool) -> Tensor:
    cos_hg = a_he @ b_ge.T
    return cos_hg if signed else cos_hg.abs()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
