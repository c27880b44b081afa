"""What `accelerate launch` and the environment ask for: taken over and said, or refused in one line. Needs no torch."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Literal, cast

from saeopt.config import RunConfig, load_run_config
from saeopt.errors import UserError
from saeopt.host.launcher import launched
from saeopt.runs.names import CONFIG
from saeopt.training.plan import TrialPlan

Precision = Literal["no", "bf16", "fp16"]
_REPLICATED = "every process holds all SAEs here (accelerate launch --multi_gpu)"
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": f"DeepSpeed is not supported: {_REPLICATED}",
    "ACCELERATE_USE_FSDP": f"FSDP is not supported: {_REPLICATED}",
    "ACCELERATE_USE_MEGATRON_LM": f"Megatron-LM is not supported: {_REPLICATED}",
    "ACCELERATE_USE_PARALLELISM_CONFIG": f"a parallelism config is not supported: {_REPLICATED}",
}
_FROM = "accelerate launch, its config file (accelerate config) or the environment"


def check_environment() -> None:
    """Refuse what Accelerate offers and SAEs are not trained with.

    Raises:
        UserError: naming the variable, which `accelerate launch` sets from its flags and its config file.
    """
    for name, problem in _REFUSED.items():
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "y", "on", "t"):
            raise UserError(f"{name}: {problem}; {_FROM} asks for it")
    dynamo = os.environ.get("ACCELERATE_DYNAMO_BACKEND") or "no"
    if dynamo.lower() != "no":
        raise UserError(
            f"ACCELERATE_DYNAMO_BACKEND={dynamo}: 'performance.compile' says what is compiled here; {_FROM} asks for it"
        )
    precision = _launched_precision()
    if precision not in ("no", "bf16", "fp16"):
        raise UserError(
            f"ACCELERATE_MIXED_PRECISION={precision}: SAEs are trained in no, bf16 or fp16 ('mixed_precision');"
            f" {_FROM} asks for it"
        )


def check_accumulation(config: RunConfig) -> None:
    """Refuse an accumulation that differs from the config's, which is the one that counts."""
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    asked = os.environ.get(name) or "auto"
    if asked not in ("auto", str(config.gradient_accumulation_steps)):
        raise UserError(
            f"{name}={asked}, but 'gradient_accumulation_steps' is {config.gradient_accumulation_steps}: the config's"
            f" is used; {_FROM} asks for the other"
        )


def check_joined(world: int) -> None:
    """Refuse processes that were started together and train apart, each the whole run.

    Raises:
        UserError: saying how processes are launched on the CPU.
    """
    started = launched().size
    if started != world:
        joined = "each is alone" if world == 1 else f"{world} joined"
        raise UserError(
            f"{started} processes were started (WORLD_SIZE), but {joined}:"
            " no GPU is visible to them; on the CPU:"
            f" ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {started} …"
        )


def check_gpus(visible: int) -> None:
    """Refuse more processes than GPUs: two on one would deadlock."""
    here = launched().here
    if 0 < visible < here:
        raise UserError(f"{here} processes were started, {visible} GPUs are visible: one process per GPU")


def _launched_precision() -> str:
    return (os.environ.get("ACCELERATE_MIXED_PRECISION") or "no").lower()


def precision(config: RunConfig, device_type: str) -> tuple[Precision, str]:
    """The precision of the SAEs' matrix products, and who decided: the config, Accelerate, or the device."""
    if config.mixed_precision != "auto":
        return config.mixed_precision, "config"
    launched = _launched_precision()
    if launched in ("bf16", "fp16"):
        return cast(Precision, launched), "ACCELERATE_MIXED_PRECISION"
    return "bf16" if device_type == "cuda" else "no", f"auto on {device_type}"


def going_on(config: RunConfig, before: RunConfig) -> RunConfig:
    """The config of a run that was begun as `before`: `auto` is what it was then."""
    if config.mixed_precision != "auto":
        return config
    return config.model_copy(update={"mixed_precision": before.mixed_precision})


def with_precision(plan: TrialPlan, device_type: str) -> tuple[TrialPlan, str]:
    """A plan that says what `auto` means here, or meant when the run was begun; and the same for people."""
    config, path = plan.config, plan.run_dir / CONFIG
    begun = plan.resume and config.mixed_precision == "auto" and path.exists()
    if begun:
        config = going_on(config, load_run_config(path))
    chosen, source = precision(config, device_type)
    config = config.model_copy(update={"mixed_precision": chosen})
    return replace(plan, config=config), f"{chosen} ({'as it was begun' if begun else source})"
