"""Fixed weights pushed through public libraries (sae-lens 6.54, dictionary_learning) give the same numbers here.

The weights and the expected numbers stand in golden.json and below; where the shared originals are present
the copies are compared with them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from saeopt.saes.base import SAE, StepInputs
from saeopt.saes.hard_concrete import noisy_gate, probability_nonzero, quiet_gate
from saeopt.saes.registry import get_sae

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
X = torch.tensor(GOLDEN["x"], dtype=torch.float64)


def golden(sae_type: str, recipe: int = 2, **fields: Any) -> SAE:
    cls = get_sae(sae_type)
    config = cls.Config(sae_type=sae_type, sae_positions=["hook"], **fields)
    sae = cls(3, 6, config, recipe=recipe, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.tensor(0.4 if name == "threshold" else GOLDEN[name]))
    return sae


def means(sae: SAE, dead: list[int] | None = None) -> tuple[float, dict[str, float]]:
    """Loss and its terms at λ = 0.1; leaves the gradient in the parameters."""
    dead_h = None if dead is None else torch.tensor([i in dead for i in range(6)])
    forward = sae.training_forward(X, StepInputs(0.1, dead_h=dead_h, numbers={"bandwidth": 0.6}))
    terms = {name: term / 4 for name, term in forward.terms.items()}
    terms |= {name: ratio.value(4) for name, ratio in forward.ratios.items()}
    total = sum(terms.values())
    total.backward()
    return total.item(), {name: term.item() for name, term in terms.items()}


def norm(sae: SAE, name: str) -> float:
    return sae.get_parameter(name).grad.norm().item()


def near(value: float) -> Any:
    return pytest.approx(value, rel=3e-6)


def test_relu_loss_and_gradients() -> None:
    sae = golden("relu")
    loss, terms = means(sae)
    assert loss == near(0.765873)
    assert terms == {"mse": near(0.4733131), "sparsity": near(0.2925601)}
    assert norm(sae, "W_enc") == near(1.909442)
    assert norm(sae, "W_dec") == near(1.553012)
    torch.testing.assert_close(sae.encode(X), torch.tensor(GOLDEN["relu_code"]).double(), rtol=1e-6, atol=1e-6)


GATED_W_DEC = [
    (1, {}, 2.3289),  # rows are free, the auxiliary decoder is frozen
    (2, {"decoder_norm": "free"}, 3.7016),  # nothing is frozen: sae-lens' form
    (2, {}, 2.2224),  # rows of norm 1: the penalty does not reach them
]


@pytest.mark.parametrize(("recipe", "fields", "norm_of_W_dec"), GATED_W_DEC)
def test_gated_loss_and_gradients(recipe: int, fields: dict[str, Any], norm_of_W_dec: float) -> None:
    sae = golden("gated", recipe, **fields)
    loss, terms = means(sae)
    assert loss == near(1.3937652)
    assert terms == {"mse": near(0.6278920), "sparsity": near(0.2925601), "aux": near(0.4733131)}
    assert norm(sae, "W_enc") == pytest.approx(4.2892, abs=5e-5)
    assert norm(sae, "W_dec") == pytest.approx(norm_of_W_dec, abs=5e-5)
    torch.testing.assert_close(sae.encode(X), torch.tensor(GOLDEN["gated_code"]).double(), rtol=1e-6, atol=1e-6)


def test_topk_loss_and_gradients() -> None:
    sae = golden("topk", k=2)
    loss, terms = means(sae)
    assert loss == near(0.6645705)
    assert terms == {"mse": near(0.6645705)}
    assert norm(sae, "W_enc") == near(1.614906)
    assert norm(sae, "W_dec") == near(1.538099)
    torch.testing.assert_close(sae.encode(X), torch.tensor(GOLDEN["topk_code"]).double(), rtol=1e-6, atol=1e-6)


def test_auxk_where_every_dead_latent_is_negative() -> None:
    sae = golden("topk", k=2, aux_coeff=1.0)
    with torch.no_grad():
        sae.b_enc[[0, 3, 5]] = -5.0
    _, terms = means(sae, dead=[0, 3, 5])
    assert terms == {"mse": near(1.3157766), "aux": near(1.1992125)}
    assert torch.equal(sae.W_enc.grad[:, [0, 3, 5]], torch.zeros(3, 3))


def test_batch_topk_loss_gradients_and_threshold() -> None:
    sae = golden("batch_topk", k=2)
    loss, terms = means(sae)
    assert loss == near(0.6645705)
    assert terms == {"mse": near(0.6645705)}
    assert norm(sae, "W_enc") == near(1.614906)
    assert norm(sae, "W_dec") == near(1.538099)
    forward = sae.training_forward(X, StepInputs(0.1))
    torch.testing.assert_close(forward.f_Nh, torch.tensor(GOLDEN["topk_code"]).double(), rtol=1e-6, atol=1e-6)
    sae.after_window(forward.tallies, torch.tensor(4.0))
    assert sae.threshold.item() == near(0.844175)  # the smallest that was kept: no bias towards the start
    assert torch.equal(sae.code(X) > 0, forward.f_Nh > 0.844176)


def test_matryoshka_loss_and_gradients() -> None:
    sae = golden("matryoshka_batch_topk", k=2, prefixes=[2, 4, 6])
    loss, _ = means(sae)
    assert loss == near(2.934372901916504 / 3)
    assert norm(sae, "W_enc") == near(2.56069016456604 / 3)
    assert norm(sae, "W_dec") == near(2.4496853351593018 / 3)


def test_jumprelu_loss_and_gradients() -> None:
    sae = golden("jumprelu")
    loss, terms = means(sae)
    assert loss == near(0.7233131)
    assert terms == {"mse": near(0.4733131), "sparsity": near(0.25)}
    assert norm(sae, "W_enc") == near(1.7619130611419678)
    assert norm(sae, "W_dec") == near(1.436605453491211)
    expected = torch.tensor([0.0, -0.08679870516061783, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(sae.threshold.grad, expected, rtol=1e-5, atol=1e-8)


P_NONZERO = {
    0.5: [0.14172302, 0.54957354, 0.76833755, 0.90015495, 0.98521072],
    2 / 3: [0.19759354, 0.64533520, 0.83182216, 0.93077117, 0.99003440],
    1.0: [0.35386232, 0.80184966, 0.91666663, 0.96763873, 0.99549425],
}


@pytest.mark.parametrize("beta", P_NONZERO)
def test_hard_concrete_gates(beta: float) -> None:
    log_alpha = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    u = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    limits = (-0.1, 1.1)
    z = torch.tensor([0.0, 0.03107814, 0.5, 0.96892190, 1.0] if beta == 1.0 else [0.0, 0.0, 0.5, 1.0, 1.0])
    torch.testing.assert_close(noisy_gate(log_alpha, u, beta, limits), z.double(), rtol=0, atol=1e-7)
    expected = torch.tensor(P_NONZERO[beta], dtype=torch.float64)
    torch.testing.assert_close(probability_nonzero(log_alpha, beta, limits), expected, rtol=0, atol=2e-7)
    paper = torch.tensor([0.0, 0.22272974, 0.5, 0.77727032, 1.0], dtype=torch.float64)
    torch.testing.assert_close(quiet_gate(log_alpha, beta, limits, "paper"), paper, rtol=0, atol=1e-7)


def test_the_committed_numbers_are_the_shared_ones() -> None:
    spec = Path(os.environ.get("SAEOPT_SHARED") or Path(__file__).resolve().parents[3] / "shared") / "spec"
    if not spec.exists():
        pytest.skip("the shared specification is not there (SAEOPT_SHARED names the folder that holds it)")
    values = json.loads((spec / "golden_sae_values.json").read_text())
    values |= values["gated_extra"] | {"relu_code": values["saelens.standard"]["acts"]}
    values |= {"gated_code": values["saelens.gated"]["acts"], "topk_code": values["saelens.batchtopk"]["acts"]}
    for name, numbers in GOLDEN.items():
        torch.testing.assert_close(torch.tensor(numbers), torch.tensor(values[name]), rtol=1e-7, atol=1e-9)
    gates = json.loads((spec / "golden_aux_and_hard_concrete.json").read_text())
    gates = next(v for k, v in gates.items() if k.startswith("hard_concrete"))
    for beta, numbers in P_NONZERO.items():
        assert gates[str(round(beta, 4))]["p_nonzero"] == pytest.approx(numbers, abs=1e-8)
