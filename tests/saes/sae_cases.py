"""The forms of every architecture that the tests go through; SAEs and inputs are those of `saeopt.testing.cases`."""

from __future__ import annotations

from typing import Any

from saeopt.saes.registry import ARCHITECTURES
from saeopt.testing.cases import activations, build, gradients, loss, step_inputs

__all__ = ["IDS", "VARIANTS", "activations", "build", "gradients", "loss", "step_inputs"]

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ARCHITECTURES),
    *((name, {"decoder_norm": "unit"}) for name in ARCHITECTURES),
    ("topk", {"decoder_norm": "free"}),
    ("gated", {"decoder_norm": "free"}),
    ("topk", {"k": 3, "aux_k": 2}),
    ("gated", {"magnitude_activation": None}),
    ("hard_concrete", {"input_dependent_gates": False}),
    ("hard_concrete", {"magnitude_activation": "relu", "eval_gate": "paper"}),
    ("relu", {"auxk_coeff": 0.1}),
    ("gated", {"auxk_coeff": 0.1, "aux_k": 2}),
    ("hard_concrete", {"auxk_coeff": 0.1}),
    ("gated_hard_concrete", {"aux_form": "seed", "eval_gate": "paper"}),
    ("relu", {"prefixes": [2, 0.5, 1]}),
    ("topk", {"prefixes": [0.3, 1]}),
    ("batch_topk", {"k": 3.3, "aux_k": 2}),
    ("jumprelu", {"bandwidth": 2.0, "final_bandwidth": 0.5, "threshold_lr_factor": 1.0}),
    ("jumprelu", {"penalty": "tanh", "bandwidth": 2.0, "pre_activation_coeff": 0.1}),
    ("jumprelu", {"penalty": "quadratic", "l0_penalty_target": 2.0, "bandwidth": 2.0}),
    ("jumprelu", {"max_density": 0.2, "bandwidth": 2.0, "auxk_coeff": 0.1}),
]
IDS = [name + "".join(f"-{k}={v}" for k, v in fields.items()) for name, fields in VARIANTS]
