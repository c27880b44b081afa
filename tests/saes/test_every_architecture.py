"""What holds for every registered architecture, with awkward weights and inputs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from sae_cases import IDS, VARIANTS, activations, build, gradients, loss, step_inputs
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeopt.config.saes import SAEConfig
from saeopt.saes.base import SAE
from saeopt.saes.registry import ARCHITECTURES, get_sae

every_variant = pytest.mark.parametrize(("sae_type", "fields"), VARIANTS, ids=IDS)
every_architecture = pytest.mark.parametrize("sae_type", ARCHITECTURES)


@every_variant
def test_saved_loaded_and_folded_sae_encodes_and_decodes_alike(
    sae_type: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    sae, x_raw_Nd = build(sae_type, fields), 30 * activations()
    sae.scale.fill_(0.037)
    sae.training_forward(x_raw_Nd * sae.scale, step_inputs(sae, beta=0.2))  # leaves its traces in the buffers
    sae.tokens_since_fired.copy_(torch.arange(sae.h))
    save_file({name: tensor.contiguous() for name, tensor in sae.state_dict().items()}, tmp_path / "sae.safetensors")
    loaded = type(sae)(sae.d, sae.h, sae.config, dtype=torch.float64)
    loaded.load_state_dict(load_file(tmp_path / "sae.safetensors"))
    assert torch.equal(loaded.tokens_since_fired, torch.arange(sae.h))
    code, x_hat = sae.encode(x_raw_Nd), sae(x_raw_Nd)
    assert torch.equal(code, sae.code(x_raw_Nd * sae.scale))
    assert torch.equal(sae.decode(code), x_hat)
    assert torch.equal(loaded.encode(x_raw_Nd), code)
    assert torch.equal(loaded(x_raw_Nd), x_hat)

    before = copy.deepcopy(loaded.state_dict())
    folded = loaded.folded()
    assert folded.scale.item() == 1
    torch.testing.assert_close(folded.encode(x_raw_Nd), code)
    torch.testing.assert_close(folded.decode(code), x_hat)
    torch.testing.assert_close(folded(x_raw_Nd), x_hat)
    torch.testing.assert_close(folded.folded()(x_raw_Nd), x_hat)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


@every_variant
def test_the_unit_decoder_reconstructs_alike_from_rows_of_norm_1(sae_type: str, fields: dict[str, Any]) -> None:
    sae, x_raw_Nd = build(sae_type, fields), 30 * activations()
    sae.scale.fill_(0.037)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.5, 3, sae.h).unsqueeze(-1))
    unit = sae.unit_decoder()
    torch.testing.assert_close(unit.W_dec.norm(dim=-1), torch.ones(sae.h).double())
    torch.testing.assert_close(unit(x_raw_Nd), sae(x_raw_Nd))
    torch.testing.assert_close(unit.encode(x_raw_Nd) @ unit.W_dec + unit.b_dec, sae(x_raw_Nd))
    assert torch.equal(unit.encode(x_raw_Nd) != 0, sae.encode(x_raw_Nd) != 0)
    torch.testing.assert_close(unit.unit_decoder()(x_raw_Nd), sae(x_raw_Nd))


@every_variant
def test_activations_of_any_dtype_and_shape_are_taken(sae_type: str, fields: dict[str, Any]) -> None:
    sae, x_raw_Nd = build(sae_type, fields), activations().float()
    assert torch.equal(sae(x_raw_Nd.view(5, 8, 6)).flatten(0, 1), sae(x_raw_Nd.double()))


@every_variant
def test_masked_tokens_change_nothing(sae_type: str, fields: dict[str, Any]) -> None:
    sae, x_Nd = build(sae_type, fields), activations()
    keep_N = (torch.arange(40) % 3 != 0).double()
    kept = keep_N.bool()
    all_of_it, part = step_inputs(sae, keep_N=keep_N), step_inputs(sae)
    if part.u_Nh is not None:
        part.u_Nh = part.u_Nh[kept]
    wild_Nd = torch.where(kept.unsqueeze(-1), x_Nd, 1e3 * x_Nd)
    forward = sae.training_forward(wild_Nd, all_of_it)
    assert torch.equal(forward.f_Nh[~kept], torch.zeros_like(forward.f_Nh[~kept]))
    short = sae.training_forward(x_Nd[kept], part)
    assert forward.terms.keys() == short.terms.keys()
    for name, term in short.terms.items():
        assert forward.terms[name].item() == pytest.approx(term.item(), rel=1e-12)
    masked = gradients(sae, loss(sae, wild_Nd, all_of_it))
    for name, expected in gradients(sae, loss(sae, x_Nd[kept], part)).items():
        torch.testing.assert_close(masked[name], expected, rtol=1e-9, atol=1e-12)


@every_variant
def test_training_and_evaluation_code_have_the_same_support_without_noise(
    sae_type: str, fields: dict[str, Any]
) -> None:
    sae, x_Nd = build(sae_type, fields), activations()
    inputs = step_inputs(sae)
    if inputs.u_Nh is not None:
        inputs.u_Nh = torch.full_like(inputs.u_Nh, 0.5)  # the noise's median: the median gate follows
    forward = sae.training_forward(x_Nd, inputs)
    if fields.get("eval_gate") != "paper":
        torch.testing.assert_close(forward.f_Nh, sae.encode(x_Nd))
        torch.testing.assert_close(forward.x_hat_Nd, sae(x_Nd))


LEGACY_DIVISORS = {  # d = 6; a ratio of two squared errors has no units
    "relu": {"mse": 6, "sparsity": 6},
    "gated": {"mse": 6, "sparsity": 1, "aux": 6},
    "hard_concrete": {"mse": 6, "sparsity": 6},
    "gated_hard_concrete": {"mse": 6, "sparsity": 6, "aux": 6},
    "topk": {"mse": 6},
}


@every_architecture
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
    "topk": {"k": 5, "aux_k": 1, "aux_coeff": 0.5},
}
OTHER_VALUES["gated_hard_concrete"] = {
    **{k: v for k, v in OTHER_VALUES["hard_concrete"].items() if k != "input_dependent_gates"},
    "aux_coeff": 0.5,
    "aux_form": "seed",
    "magnitude_activation": "softplus",
}
COMMON = {"mse_coeff": 3.0, "init_decoder_orthogonal": False, "bias_init": "zero"}
CASES = [(name, {field: value}) for name, others in OTHER_VALUES.items() for field, value in (others | COMMON).items()]
CASES += [
    (name, {"decoder_norm": "free" if get_sae(name).default_decoder_norm == "unit" else "unit"})
    for name in OTHER_VALUES
]


def footprint(sae_type: str, fields: dict[str, Any]) -> list[Tensor]:
    """All that a config can change: terms, code, a step's constraints, the start, and the β in mid-run."""
    from saeopt.config import validate_run
    from saeopt.training.schedules import beta

    annealed = {"final_beta": 0.2, "beta_annealing": True} if "hard_concrete" in sae_type else {}
    fields = annealed | fields
    sae, x_Nd = build(sae_type, fields), activations()
    section = sae.config.model_dump(exclude_unset=True)
    data = {"dataset_name": "x", "n_train_samples": 100}
    run = validate_run({"tlens_model_name": "x", "data": data, "saes": section}, "test")
    now = beta(run, sae.config, 50, 100)
    forward = sae.training_forward(x_Nd, step_inputs(sae, beta=now))
    found = [*forward.terms.values(), *(part for ratio in forward.ratios.values() for part in ratio), sae.encode(x_Nd)]
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


@every_architecture
def test_the_fields_tried_above_are_all_there_are(sae_type: str) -> None:
    own = set(get_sae(sae_type).Config.model_fields) - set(SAEConfig.model_fields)
    assert own == set(OTHER_VALUES[sae_type])


@every_architecture
def test_every_field_has_a_description_and_stack_fields_exist(sae_type: str) -> None:
    cls = get_sae(sae_type)
    assert all(field.description for field in cls.Config.model_fields.values())
    known = {field for name in ARCHITECTURES for field in get_sae(name).Config.model_fields}
    assert cls.stack_fields <= known


@every_architecture
def test_parameters_are_finite_and_all_get_a_gradient(sae_type: str) -> None:
    sae, x_Nd = build(sae_type), activations()
    found = gradients(sae, loss(sae, x_Nd, step_inputs(sae)))
    assert all(torch.isfinite(g).all() and g.norm() > 0 for g in found.values()), found


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


def test_subclass_hooks_are_enough_for_state_of_its_own() -> None:
    class Counting(SAE):
        def build(self) -> None:
            self.register_buffer("seen", torch.zeros(()))

    assert "seen" in Counting(2, 3, SAEConfig(sae_type="x", sae_positions=["a"])).state_dict()
