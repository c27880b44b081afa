"""The learning rate as a pure function of the number of samples consumed (λ and β: `saes`, each at its place)."""

from __future__ import annotations

import math

from saeopt.config.run import RunConfig


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


def learning_rate(config: RunConfig, samples: int, total: int) -> float:
    """The learning rate of the window that ends at `samples`."""
    return config.lr * lr_factor(config, samples, total)


def max_grad_norm(config: RunConfig) -> float:
    """The gradient's norm that is clipped at; infinite where nothing is clipped."""
    return math.inf if config.max_grad_norm is None else config.max_grad_norm
