"""SAEs with awkward weights and inputs for the tests: biases, negative pre-activations, dead latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saeopt.saes.base import SAE, StepInputs
from saeopt.saes.noise import uniform
from saeopt.saes.registry import ARCHITECTURES, get_sae

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ARCHITECTURES),
    *((name, {"decoder_norm": "unit"}) for name in ARCHITECTURES),
    ("topk", {"decoder_norm": "free"}),
    ("gated", {"decoder_norm": "free"}),
    ("topk", {"k": 3, "aux_k": 2}),
    ("gated", {"magnitude_activation": None}),
    ("hard_concrete", {"input_dependent_gates": False}),
    ("hard_concrete", {"magnitude_activation": "relu", "eval_gate": "paper"}),
    ("gated_hard_concrete", {"aux_form": "seed", "eval_gate": "paper"}),
]
IDS = [name + "".join(f"-{k}={v}" for k, v in fields.items()) for name, fields in VARIANTS]


def build(
    sae_type: str,
    fields: dict[str, Any] | None = None,
    *,
    d: int = 6,
    h: int = 15,
    seed: int = 0,
    legacy: bool = False,
    recipe: int = 2,
    dtype: torch.dtype = torch.float64,
) -> SAE:
    """An SAE whose every parameter is random and not 0; topk keeps 4 unless told."""
    cls = get_sae(sae_type)
    chosen = {"k": 4, **(fields or {})} if sae_type == "topk" else fields or {}
    config = cls.Config(sae_type=sae_type, sae_positions=["hook"], **chosen)
    sae = cls(d, h, config, legacy_scaling=legacy, recipe=recipe, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        sae.after_step()
    return sae


def activations(n: int = 40, d: int = 6, seed: int = 1) -> Tensor:
    """Activations with a mean that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + torch.linspace(-1, 1, d, dtype=torch.float64)


def step_inputs(sae: SAE, n: int = 40, **fields: Any) -> StepInputs:
    """Noise and a mask of dead latents where the architecture takes them; λ = 0.3, β = 0.7."""
    u_Nh = uniform(5, 0, n, 1, sae.h).double() if sae.needs_noise else None
    dead_h = torch.arange(sae.h) % 2 == 0 if sae.needs_dead else None
    return StepInputs(**{"sparsity_coeff": 0.3, "beta": 0.7, "u_Nh": u_Nh, "dead_h": dead_h, **fields})


def loss(sae: SAE, x_Nd: Tensor, inputs: StepInputs) -> Tensor:
    """The loss of one window."""
    forward = sae.training_forward(x_Nd, inputs)
    n = len(x_Nd) if inputs.keep_N is None else inputs.keep_N.sum()
    return sum(forward.terms.values()) / n + sum(ratio.value(n) for ratio in forward.ratios.values())


def gradients(sae: SAE, value: Tensor) -> dict[str, Tensor]:
    """Gradient per parameter; 0 where there is none."""
    names, parameters = zip(*sae.named_parameters(), strict=True)
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, found, strict=True)}
