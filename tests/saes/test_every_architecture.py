"""What holds for saeopt's own architectures besides the contract (test_contract.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from sae_cases import IDS, VARIANTS, activations, build, gradients, loss, step_inputs
from torch import Tensor

from saeopt.config.saes import SAEConfig
from saeopt.saes.base import SAE
from saeopt.saes.registry import ARCHITECTURES, get_sae
from saeopt.testing.cases import numbers

every_variant = pytest.mark.parametrize(("sae_type", "fields"), VARIANTS, ids=IDS)
every_architecture = pytest.mark.parametrize("sae_type", ARCHITECTURES)


@every_variant
def test_training_and_evaluation_code_have_the_same_support_without_noise(
    sae_type: str, fields: dict[str, Any]
) -> None:
    sae, x_Nd = build(sae_type, fields), activations()
    inputs = step_inputs(sae)
    if inputs.u_Nh is not None:
        inputs.u_Nh = torch.full_like(inputs.u_Nh, 0.5)  # the noise's median: the median gate follows
    forward = sae.training_forward(x_Nd, inputs)
    if sae.selects_over_batch:  # once the threshold has seen this batch, it lets the same pass, but for the smallest
        sae.after_window(forward.tallies, torch.tensor(float(len(x_Nd))))
        assert (forward.f_Nh > 0).sum() - (sae.encode(x_Nd) > 0).sum() == 1
    elif fields.get("eval_gate") != "paper":
        torch.testing.assert_close(forward.f_Nh, sae.encode(x_Nd))
        torch.testing.assert_close(forward.x_hat_Nd, sae(x_Nd))


LEGACY_DIVISORS = {  # d = 6; a ratio of two squared errors has no units
    "relu": {"mse": 6, "sparsity": 6},
    "gated": {"mse": 6, "sparsity": 1, "aux": 6},
    "hard_concrete": {"mse": 6, "sparsity": 6},
    "gated_hard_concrete": {"mse": 6, "sparsity": 6, "aux": 6},
    "topk": {"mse": 6},
}


@pytest.mark.parametrize("sae_type", LEGACY_DIVISORS)
def test_legacy_scaling_divides_the_terms_that_the_replaced_system_divided(sae_type: str) -> None:
    now, then, x_Nd = build(sae_type), build(sae_type, legacy=True), activations()
    here = now.training_forward(x_Nd, step_inputs(now))
    there = then.training_forward(x_Nd, step_inputs(then))
    divisors = {name: (term / there.terms[name]).item() for name, term in here.terms.items()}
    assert divisors == pytest.approx(LEGACY_DIVISORS[sae_type])
    for name, ratio in here.ratios.items():
        assert there.ratios[name].value(40).item() == pytest.approx(ratio.value(40).item() / 6), name


OTHER_VALUES: dict[str, dict[str, Any]] = {
    "relu": {},
    "gated": {"aux_coeff": 0.5, "magnitude_activation": "softplus"},
    "hard_concrete": {
        "magnitude_activation": "relu",
        "initial_beta": 0.9,
        "final_beta": 0.1,
        "beta_annealing": False,
        "hard_concrete_stretch_limits": [-0.4, 1.2],
        "eval_gate": "paper",
        "input_dependent_gates": False,
    },
    "topk": {"k": 5, "aux_k": 1, "aux_coeff": 0.5, "prefixes": [0.5, 1]},
    "jumprelu": {
        "penalty": "tanh",
        "initial_threshold": 0.3,
        "threshold_lr_factor": 0.5,
        "bandwidth": 0.6,
        "final_bandwidth": 0.7,
        "max_density": 0.01,
    },
}
ELSEWHERE = {"l0_penalty_target", "pre_activation_coeff", "density_coeff", "resample_every_tokens", "threshold"}
"""What needs other fields, or works between windows or after them: tried in tests of its own."""
REVIVAL = {"auxk_coeff": 0.5, "aux_k": 1}
OTHER_VALUES["gated_hard_concrete"] = {
    **{k: v for k, v in OTHER_VALUES["hard_concrete"].items() if k != "input_dependent_gates"},
    "aux_coeff": 0.5,
    "aux_form": "seed",
    "magnitude_activation": "softplus",
}
for name in ("relu", "gated", "hard_concrete", "gated_hard_concrete", "jumprelu"):
    OTHER_VALUES[name] = OTHER_VALUES.get(name, {}) | REVIVAL
OTHER_VALUES["relu"]["prefixes"] = [0.5, 1]
OTHER_VALUES["batch_topk"] = OTHER_VALUES["matryoshka_batch_topk"] = OTHER_VALUES["topk"] | {"k": 5.5}
COMMON = {"mse_coeff": 3.0, "init_decoder_orthogonal": False, "bias_init": "zero"}
CASES = [(name, {field: value}) for name, others in OTHER_VALUES.items() for field, value in (others | COMMON).items()]
CASES += [
    (name, {"decoder_norm": "free" if get_sae(name).default_decoder_norm == "unit" else "unit"})
    for name in OTHER_VALUES
]


def footprint(sae_type: str, fields: dict[str, Any]) -> list[Tensor]:
    """All that a config can change: terms, code, a step's constraints, the start, and the β in mid-run."""
    annealed = {"final_beta": 0.2, "beta_annealing": True} if "hard_concrete" in sae_type else {}
    auxk = {"auxk_coeff": 0.3} if "auxk_coeff" in OTHER_VALUES[sae_type] else {}
    fields = annealed | auxk | fields
    sae, x_Nd = build(sae_type, fields), activations()
    forward = sae.training_forward(x_Nd, step_inputs(sae, beta=numbers(sae).get("beta", 1.0)))
    slopes = gradients(sae, loss(sae, x_Nd, step_inputs(sae)))
    found = [*slopes.values(), *(torch.tensor(rule) for rule in sae.rules.values())]
    found += [*forward.terms.values(), *(part for ratio in forward.ratios.values() for part in ratio), sae.encode(x_Nd)]
    with torch.no_grad():
        sae.W_dec.mul_(2)
    sae.after_step()
    found.append(sae.W_dec.detach().clone())
    sae.initialise(x_Nd, torch.Generator().manual_seed(0))
    return [*found, *sae.state_dict().values()]


@pytest.mark.parametrize(("sae_type", "fields"), CASES, ids=[f"{n}-{next(iter(f))}" for n, f in CASES])
def test_every_field_of_a_config_changes_something(sae_type: str, fields: dict[str, Any]) -> None:
    usual, other = footprint(sae_type, {}), footprint(sae_type, fields)
    assert len(usual) != len(other) or any(
        a.shape != b.shape or not torch.equal(a, b) for a, b in zip(usual, other, strict=True)
    )


@pytest.mark.parametrize("sae_type", OTHER_VALUES)
def test_the_fields_tried_above_are_all_there_are(sae_type: str) -> None:
    own = set(get_sae(sae_type).Config.model_fields) - set(SAEConfig.model_fields)
    assert own - ELSEWHERE == set(OTHER_VALUES[sae_type])


@every_architecture
def test_bfloat16_products_stay_close_to_float32(sae_type: str) -> None:
    sae, x_Nd = build(sae_type, dtype=torch.float32), activations().float()
    inputs = step_inputs(sae)
    inputs.u_Nh = None if inputs.u_Nh is None else inputs.u_Nh.float()
    exact = loss(sae, x_Nd, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(sae, x_Nd, inputs)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=0.05)
    value.backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in sae.parameters())


@pytest.mark.parametrize(
    ("sae_type", "fields", "message"),
    [
        ("hard_concrete", {"beta_annealing": True}, "'beta_annealing' needs 'final_beta'"),
        ("gated_hard_concrete", {"beta_annealing": True}, "'beta_annealing' needs 'final_beta'"),
        ("hard_concrete", {"hard_concrete_stretch_limits": [0.1, 1.1]}, "below 0"),
        ("hard_concrete", {"initial_beta": 0}, "greater than"),
        ("gated", {"magnitude_activation": "gelu"}, "'relu'"),
        ("topk", {"k": 0}, "greater than 0"),
        ("relu", {"k": 3}, "k"),
    ],
)
def test_impossible_values_are_refused(sae_type: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        get_sae(sae_type).Config(sae_type=sae_type, sae_positions=["hook"], **fields)


def test_k_beyond_the_dictionary_is_refused() -> None:
    from saeopt.errors import UserError

    with pytest.raises(UserError, match=r"'saes\.k': 16 exceeds the dictionary's 15"):
        build("topk", {"k": 16})
    with pytest.raises(UserError, match=r"'saes\.k': 15\.5 exceeds the dictionary's 15"):
        build("batch_topk", {"k": 15.5})
    with pytest.raises(UserError, match=r"'saes\.l0_penalty_target': 16 exceeds the dictionary's 15"):
        build("jumprelu", {"penalty": "quadratic", "l0_penalty_target": 16})


def test_subclass_hooks_are_enough_for_state_of_its_own() -> None:
    class Counting(SAE):
        def build(self) -> None:
            self.register_buffer("seen", torch.zeros(()))

    assert "seen" in Counting(2, 3, SAEConfig(sae_type="x", sae_positions=["a"])).state_dict()


def test_another_width_is_refused_by_what_is_right() -> None:
    sae = build("relu")
    with pytest.raises(ValueError, match=r"this SAE reads 6 numbers per token: got the shape \(2, 5\)"):
        sae.encode(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="this SAE's code has 15 numbers per token"):
        sae.decode(torch.zeros(2, 16))


def test_jumprelu_refuses_what_its_penalty_does_not_read() -> None:
    with pytest.raises(ValidationError, match="'pre_activation_coeff' has no effect without 'penalty: tanh'"):
        build("jumprelu", {"pre_activation_coeff": 0.1})
    assert build("jumprelu", {"pre_activation_coeff": 0.1, "penalty": "tanh"}).needs_dead
