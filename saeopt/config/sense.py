"""What a new run would silently ignore. Run folders and studies of earlier versions may hold it, and go on loading."""

from __future__ import annotations

from saeopt.config.run import RunConfig
from saeopt.errors import UserError


def check_sense(config: RunConfig) -> None:
    """Raise :class:`UserError` for a field that has no effect because of another."""
    fields, values = type(config.saes).model_fields, config.saes.model_dump()
    for field, switch in config.saes.idle().items():
        if values[field] != fields[field].get_default(call_default_factory=True):
            raise UserError(f"'saes.{field}' has no effect without {switch}")
