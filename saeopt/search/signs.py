"""The L0 that the decoder's own signs favour, read from SAEs that differ in nothing but their L0.

Chanin & Garriga-Alonso (arXiv 2508.16560): c_dec, the mean |cosine| of decoder rows, is least near the right L0, and so
is s_n^dec (`evaluation.decoder`). The rule here: c_dec leads, being their first sign and exact; among the SAEs whose
c_dec is within a tenth of its range of the least, where it hardly tells them apart, s_dec decides.

Rows of dead latents are as they started, as good as random, and pull c_dec down: SAEs with more than a quarter of dead
latents are left out as long as three others remain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from saeopt.config.normalise import FEWEST

MOST_DEAD, LEVEL = 0.25, 0.1
"""The share of dead latents up to which rows say something, and the part of c_dec's range that says nothing."""


@dataclass(frozen=True)
class Sign:
    """What an SAE's decoder says."""

    trial: int
    l0: float
    """As held-out text has it: a target may have been missed."""
    c_dec: float
    s_dec: float
    dead: float


@dataclass(frozen=True)
class Favoured:
    """What a curve recommends."""

    l0: int
    trial: int
    at_edge: bool
    """It is the smallest or the largest that was tried: the right one may lie beyond."""


def first_targets(d: int, h: int) -> list[int]:
    """Five L0s, each twice the one before, up to a quarter of the width d.

    With d latents per token a code is sparse no more. And L0 stays below h / 8, since s_dec, the (h / 4)-th
    projection, tells something only of an L0 well below h / 4.
    """
    top = min(d / 4, h / 8)
    return sorted({max(1, round(top / 2**i)) for i in range(5)})


def usable(signs: Iterable[Sign]) -> list[Sign]:
    """The curve by rising L0, without SAEs whose rows say nothing."""
    finite = [s for s in signs if math.isfinite(s.c_dec) and s.l0 > 0]
    living = [s for s in finite if s.dead <= MOST_DEAD]
    return sorted(living if len(living) >= FEWEST else finite, key=lambda s: s.l0)


def favoured(signs: Iterable[Sign]) -> Favoured | None:
    """What the signs favour; None where there are too few."""
    curve = usable(signs)
    if len(curve) < FEWEST:
        return None
    least, most = min(s.c_dec for s in curve), max(s.c_dec for s in curve)
    level = [s for s in curve if s.c_dec <= least + LEVEL * (most - least)]
    best = min(level, key=lambda s: (math.inf if math.isnan(s.s_dec) else s.s_dec, s.c_dec))
    return Favoured(max(1, round(best.l0)), best.trial, best in (curve[0], curve[-1]))


def around(signs: Iterable[Sign], tried: Sequence[int]) -> list[int]:
    """Up to three L0s around the favoured one that nobody has tried.

    The geometric means with its neighbours and the middle of both; beyond an end of the curve a step of the same
    factor and half of it.
    """
    curve = usable(signs)
    found = favoured(curve)
    if found is None:
        return []
    at = next(i for i, s in enumerate(curve) if s.trial == found.trial)
    best = curve[at].l0
    below, above = curve[at - 1].l0 if at else None, curve[at + 1].l0 if at + 1 < len(curve) else None
    if below is None or above is None:
        inner = above or below
        assert inner is not None
        wanted = [math.sqrt(best * inner), best * math.sqrt(best / inner), best * best / inner]
    else:
        wanted = [math.sqrt(best * below), math.sqrt(below * above), math.sqrt(best * above)]
    whole = sorted({max(1, round(value)) for value in wanted})
    return [value for value in whole if value not in tried]
