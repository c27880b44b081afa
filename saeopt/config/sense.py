"""What a new run would silently ignore. Run folders and studies of earlier versions may hold it, and go on loading."""

from __future__ import annotations

from saeopt.config.run import RunConfig
from saeopt.errors import UserError


def check_sense(config: RunConfig) -> None:
    """Raise :class:`UserError` for a field that has no effect because of another."""
    saes = config.saes
    if getattr(saes, "final_beta", None) is not None and not getattr(saes, "beta_annealing", True):
        raise UserError("'saes.final_beta' has no effect without 'saes.beta_annealing: true'")
