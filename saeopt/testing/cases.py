"""SAEs with awkward weights, and inputs for them: biases, negative pre-activations, dead latents, masked tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saeopt.saes.base import SAE, StepInputs, Widths, where
from saeopt.saes.noise import uniform
from saeopt.saes.numbers import Progress
from saeopt.saes.registry import get_sae
from saeopt.training.step.contract import Example, Numbers, Place, StackOptions

D, H, SAMPLES, TOKENS = 6, 15, 8, 5
OPTIONS = StackOptions(dead_after_tokens=60)


def build(
    sae_type: str,
    fields: Mapping[str, Any] | None = None,
    *,
    d: int = D,
    h: int = H,
    seed: int = 0,
    legacy: bool = False,
    recipe: int = 2,
    dtype: torch.dtype = torch.float64,
    widths: Widths | None = None,
) -> SAE:
    """An SAE whose every parameter is random and not 0; a field k is 4 unless given."""
    cls = get_sae(sae_type)
    chosen = ({"k": 4} if "k" in cls.Config.model_fields else {}) | dict(fields or {})
    config = cls.Config(sae_type=sae_type, sae_positions=["hook"], **chosen)
    sae = cls(d, h, config, legacy_scaling=legacy, recipe=recipe, dtype=dtype, **where(widths))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        sae.after_step()
    return sae


def normalise_awkwardly(sae: SAE) -> SAE:
    """The SAE with means, scales and matrices of its own for everything that it reads and writes."""
    generator = torch.Generator().manual_seed(3)
    for name, buffer in sae.normalising():
        drawn = torch.rand(buffer.shape, generator=generator, dtype=torch.float64)
        if name.startswith("whitening"):
            drawn = torch.eye(len(buffer), dtype=torch.float64) + 0.4 * drawn / len(buffer)
        if name != "unwhitening":
            buffer.copy_(0.3 + drawn)
    if sae.whitens:
        sae.unwhitening.copy_(torch.linalg.inv(sae.whitening if sae.widths is None else sae.whitening_written))
    return sae


def activations(n: int = SAMPLES * TOKENS, d: int = D, seed: int = 1) -> Tensor:
    """Activations with a mean that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + torch.linspace(-1, 1, d, dtype=torch.float64)


def step_inputs(sae: SAE, n: int = SAMPLES * TOKENS, **fields: Any) -> StepInputs:
    """Noise and a mask of dead latents where the architecture takes them; λ = 0.3, β = 0.7."""
    u_Nh = uniform(5, 0, n, 1, sae.h).double() if sae.needs_noise else None
    dead_h = torch.arange(sae.h) % 2 == 0 if sae.needs_dead else None
    given = {"sparsity_coeff": 0.3, "beta": 0.7, "u_Nh": u_Nh, "dead_h": dead_h, "numbers": numbers(sae), **fields}
    return StepInputs(**given)


def numbers(sae: SAE, samples: int = 50, **own: float) -> dict[str, float]:
    """The architecture's numbers in the middle of a run of 100 samples."""
    return {name: number.at(sae.config, Progress(samples, 100)) for name, number in sae.numbers.items()} | own


def row(sae: SAE, lr: float = 3e-3, sparsity_coeff: float = 0.3, max_grad_norm: float = 1.0) -> Numbers:
    """A member's numbers for a window."""
    return {"lr": lr, "max_grad_norm": max_grad_norm, **numbers(sae, sparsity_coeff=sparsity_coeff)}


def loss(sae: SAE, x_Nd: Tensor, inputs: StepInputs) -> Tensor:
    """The loss of one window."""
    forward = sae.training_forward(x_Nd, x_Nd, inputs)
    n = len(x_Nd) if inputs.keep_N is None else inputs.keep_N.sum()
    return sum((ratio.value(n) for ratio in forward.ratios.values()), torch.stack([*forward.terms.values()]).sum() / n)


def gradients(sae: SAE, value: Tensor) -> dict[str, Tensor]:
    """Gradient per parameter; 0 where there is none."""
    names, parameters = zip(*sae.named_parameters(), strict=True)
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}


def examples(n: int, dtype: torch.dtype = torch.float64, d: int = D) -> list[Example]:
    """Micro-batches one after another in the stream, most of them with masked tokens."""
    made = []
    for i in range(n):
        x_Nd = (2 * activations(d=d, seed=10 + i)).to(dtype)
        keep_N = torch.arange(len(x_Nd)) % (3 + i % 3) != 0 if i % 3 else None
        made.append(Example(x_Nd, x_Nd, keep_N, Place(i * SAMPLES, SAMPLES, TOKENS)))
    return made


def joined(window: Sequence[Example]) -> Example:
    """Micro-batches as one."""
    x_Nd = torch.cat([e.x_Nd for e in window])
    keep_N = torch.cat([torch.ones(len(e.x_Nd)).bool() if e.keep_N is None else e.keep_N for e in window])
    return Example(x_Nd, x_Nd, keep_N, Place(window[0].place.first_sample, SAMPLES * len(window), TOKENS))
