"""Learning rate, λ and β as pure functions of the number of samples consumed."""

from __future__ import annotations

import math

from saeopt.config.run import RunConfig
from saeopt.config.saes import SAEConfig
from saeopt.training.step.contract import Hyper


def lr_factor(config: RunConfig, samples: int, total: int) -> float:
    """The learning rate at the end of a window as a share of `lr`.

    Linear warm-up from 0; then constant, cosine to `min_lr_factor` (Loshchilov & Hutter 2017), or constant
    and a linear fall to `min_lr_factor` over the last `cooldown_samples` (20 % of the run).
    """
    warmup = config.warmup_samples
    if samples < warmup:
        return samples / warmup
    if config.schedule == "constant":
        return 1.0
    low = config.min_lr_factor
    if config.schedule == "cosine":
        progress = min(1.0, (samples - warmup) / max(1, total - warmup))
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    fall = config.cooldown(total)
    progress = min(1.0, max(0.0, (samples - (total - fall)) / max(1, fall)))
    return 1.0 - (1 - low) * progress


def sparsity_factor(config: RunConfig, sae: SAEConfig, samples: int, total: int) -> float:
    """λ at the end of a window as a share of `sparsity_coeff`: a linear warm-up (Anthropic, April 2024)."""
    warmup = config.sparsity_warmup(sae, total)
    return samples / warmup if samples < warmup else 1.0


def beta(config: RunConfig, sae: SAEConfig, samples: int, total: int) -> float:
    """β of the hard-concrete gates: constant during the warm-up, then exponential from initial to final."""
    if "initial_beta" not in type(sae).model_fields:  # to ask a model for what it lacks takes long, and this every step
        return 1.0
    initial: float = getattr(sae, "initial_beta", 1.0)
    final: float | None = getattr(sae, "final_beta", None)
    if not getattr(sae, "beta_annealing", False) or final is None:
        return initial
    progress = min(1.0, max(0.0, (samples - config.warmup_samples) / max(1, total - config.warmup_samples)))
    return initial * (final / initial) ** progress


def hyper(config: RunConfig, sae: SAEConfig, samples: int, total: int) -> Hyper:
    """One member's numbers for the window that ends at `samples`."""
    return Hyper(
        lr=config.lr * lr_factor(config, samples, total),
        sparsity_coeff=sae.sparsity_coeff * sparsity_factor(config, sae, samples, total),
        beta=beta(config, sae, samples, total),
        max_grad_norm=math.inf if config.max_grad_norm is None else config.max_grad_norm,
    )
