"""When an SAE counts as collapsed: a study's own rule, the same for its workers, its sampler and everything shown."""

from __future__ import annotations

import math
from collections.abc import Mapping

from saeopt.config.stopping import Collapse
from saeopt.config.study import StudySpec
from saeopt.metrics import value_of
from saeopt.search.objectives import Evaluation
from saeopt.spread import N_SEEDS, worst

COLLAPSED = "collapsed"
"""First word of the reason of a trial that was ended for it."""
DIVERGED = "NaN or Inf"
"""How the reason of a trial begins that diverged."""


def is_hopeless(reason: str) -> bool:
    """Whether a trial was ended for what it had become by itself, and not because others are better."""
    return reason.startswith((COLLAPSED, DIVERGED))


def rule_of(spec: StudySpec) -> Collapse:
    """The study's rule; where it stops no trial for a collapse, the default still says what has collapsed."""
    return spec.early_stopping.collapse or Collapse()


def why_collapsed(rule: Collapse, row: Mapping[str, float]) -> str | None:
    """Why an SAE with these metrics has collapsed; None: it has not.

    Of several seeds one is enough: a mean over SAEs that have collapsed and others is that of neither.
    """
    if (why := _why(rule, worst(row))) is None:
        return None
    return f"{why} in one of {row[N_SEEDS]:.0f} seeds or more" if N_SEEDS in row else why


def _why(rule: Collapse, row: Mapping[str, float]) -> str | None:
    l0, fvu, dead = (value_of(row, name) for name in ("l0", "fvu", "fraction_dead"))
    if l0 is not None and math.isfinite(l0) and l0 < rule.min_l0:
        return f"L0 {l0:.3g} is below {rule.min_l0:g}"
    if fvu is not None and math.isfinite(fvu) and fvu >= rule.max_fvu:
        return f"FVU {fvu:.3g} has reached {rule.max_fvu:g}"
    if dead is not None and dead >= 1.0:
        return "all latents are dead"
    if l0 is None or fvu is None or not math.isfinite(l0 + fvu):
        return "L0 or FVU is missing, NaN or Inf"
    return None


def why_all_collapsed(rule: Collapse, evaluation: Evaluation) -> str | None:
    """Why every SAE of a trial has collapsed; None if one has not."""
    reasons = [(hook, why_collapsed(rule, row)) for hook, row in evaluation.items()]
    if not reasons or any(reason is None for _, reason in reasons):
        return None
    return f"{COLLAPSED}: " + "; ".join(f"{hook}: {reason}" for hook, reason in reasons)


def violations(rule: Collapse, evaluation: Evaluation) -> dict[str, float]:
    """How far the best SAE of a trial is from not having collapsed; both at most 0: it has not.

    L0 is compared on a logarithmic scale, so that both numbers are of order 1.
    """
    rows = [_excess(rule, row) for row in evaluation.values()]
    if not rows:
        return {}
    low, high = min(rows, key=lambda r: max(r[0], 0.0) + max(r[1], 0.0))
    return {"min_l0": low, "max_fvu": high}


def _excess(rule: Collapse, row: Mapping[str, float]) -> tuple[float, float]:
    l0, fvu = (math.nan if (v := value_of(worst(row), name)) is None else v for name in ("l0", "fvu"))
    low = _log_ratio(rule.min_l0, l0)
    high = min(fvu - rule.max_fvu, 10.0) if math.isfinite(fvu) else 10.0
    if max(low, high) <= 0.0 and why_collapsed(rule, row):
        high = 1e-6  # the bound itself, or all latents dead
    return low, high


def _log_ratio(bound: float, l0: float) -> float:
    if not math.isfinite(l0):
        return 10.0
    if bound <= 0:
        return -1.0
    return max(-10.0, min(10.0, math.log(bound / max(l0, 1e-9))))
