"""What the trials of the made-up studies came to."""

from __future__ import annotations

HOOKS = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]


def evaluation(l0: float, fvu: float) -> dict[str, dict[str, float]]:
    """An evaluation of both hook points; the second is a little worse."""
    row = {"explained_variance": 1 - fvu, "ce_recovered": 1 - fvu / 2, "kl": fvu, "fraction_dead": 0.1, "mse": 2.0}
    return {hook: {"l0": l0, "fvu": fvu + 0.01 * i, **row} for i, hook in enumerate(HOOKS)}
