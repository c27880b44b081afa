"""What a new run would silently ignore, or could learn nothing from.

Run folders and studies of earlier versions may hold it, and go on loading.
"""

from __future__ import annotations

from saeopt.config.run import RunConfig
from saeopt.errors import UserError


def check_sense(config: RunConfig) -> None:
    """Raise :class:`UserError` for a field that has no effect because of another, and as :func:`check_selection`."""
    check_selection(config)
    fields, values = type(config.saes).model_fields, config.saes.model_dump()
    for field, switch in config.saes.idle().items():
        if values[field] != fields[field].get_default(call_default_factory=True):
            raise UserError(f"'saes.{field}' has no effect without {switch}")


def check_selection(config: RunConfig) -> None:
    """Raise :class:`UserError` where a k in the mean over a micro-batch selects none of its latents."""
    tokens = config.data.train_batch_size * config.data.context_length
    for hook in (None, *config.saes.per_hook):
        section = config.saes if hook is None else config.saes.at(hook)
        k = getattr(section, "k", None)
        if isinstance(k, float) and k * tokens < 1:
            name = "k" if section.target_l0 is None else "target_l0"
            at = "" if hook is None else f"@{hook}"
            raise UserError(
                f"'saes.{name}{at}': {k:g} per token selects nothing in a micro-batch of {tokens} tokens: at least"
                f" {1 / tokens:.3g} (1 / (data.train_batch_size · data.context_length))"
            )
