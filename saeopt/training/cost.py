"""What a trial costs by itself, whatever it shared a pack with."""

from __future__ import annotations

import torch

from saeopt.activations.source import Source
from saeopt.config.run import RunConfig
from saeopt.console import log
from saeopt.errors import UserError


def cost_of(config: RunConfig, model: Source, device: torch.device) -> dict[str, float]:
    """`parameters` of its SAEs, one seed of each, and `memory_gib`: the estimate of its training alone on a device.

    Empty where the model's structure cannot be read any more.
    """
    from saeopt.activations.language_model import lm_dtype
    from saeopt.training.dry_run import shapes, weightless
    from saeopt.training.memory import estimate

    try:
        members, lm = shapes(config, model), weightless(config)[1]
    except (UserError, OSError, ValueError) as error:
        log.warning("parameters and memory of a trial are not known: %s", " ".join(str(error).split())[:200])
        return {}
    needed = estimate(config, members, lm, lm_dtype(config.lm_dtype, device).itemsize, device.type)
    parameters = sum(member.n_parameters for member in members) // config.seeds
    return {"parameters": parameters, "memory_gib": sum(needed.values()) / 2**30}
