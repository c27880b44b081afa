"""What a trial costs by itself, whatever it shared a pack with."""

from __future__ import annotations

from saeopt.activations.source import Source
from saeopt.config.run import RunConfig
from saeopt.console import log
from saeopt.errors import UserError
from saeopt.training.runtime import Runtime


def cost_of(config: RunConfig, model: Source, runtime: Runtime) -> dict[str, float]:
    """`parameters` of its SAEs, one seed of each, and `memory_gib`: the estimate of its training alone here.

    Empty where the model's structure cannot be read any more.
    """
    from saeopt.activations.language_model import lm_dtype
    from saeopt.training.dry_run import shapes
    from saeopt.training.memory import estimate

    try:
        members, lm = shapes(config, model), runtime.model_shape(config)
    except (UserError, OSError, ValueError) as error:
        log.warning("parameters and memory of a trial are not known: %s", " ".join(str(error).split())[:200])
        return {}
    device = runtime.device
    needed = estimate(config, members, lm, lm_dtype(config.lm_dtype, device).itemsize, device.type)
    parameters = sum(member.n_parameters for member in members) // config.seeds
    return {"parameters": parameters, "memory_gib": sum(needed.values()) / 2**30}
