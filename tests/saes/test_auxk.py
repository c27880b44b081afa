"""`auxk_coeff`: the auxiliary loss of topk for architectures whose dead latents have no gradient of their own."""

from __future__ import annotations

import pytest
import torch

from saeopt.config.machine import PerformanceConfig
from saeopt.saes.base import StepInputs
from saeopt.saes.registry import get_sae
from saeopt.testing.cases import OPTIONS, activations, build, examples, gradients, loss, row, step_inputs
from saeopt.training.step.choose import make_stack

ALPHA = 0.2


@pytest.mark.parametrize("sae_type", ["relu", "gated", "hard_concrete", "gated_hard_concrete"])
def test_dead_latents_learn_with_it_alone_and_living_ones_as_before(sae_type):
    x_Nd, dead_h = activations(), torch.zeros(15, dtype=torch.bool)
    dead_h[:4] = True
    found = {}
    for alpha in (0.0, ALPHA):
        sae = build(sae_type, {"auxk_coeff": alpha})
        with torch.no_grad():
            sae.get_parameter("b_enc" if sae_type == "relu" else "b_gate")[:4] = -20.0
        inputs = step_inputs(sae, dead_h=dead_h, sparsity_coeff=0.0)
        assert not sae.code(x_Nd)[:, :4].any()
        found[alpha] = gradients(sae, loss(sae, x_Nd, inputs))["W_enc"]
    assert found[ALPHA][:, :4].norm(dim=0).min() > 0
    torch.testing.assert_close(found[ALPHA][:, 4:], found[0.0][:, 4:])


def test_its_value_is_topks_with_the_softened_code_worked_out_by_hand():
    """Two latents, the second dead: π = −1 on the first token, −2 on the second; e = (0, 1) and (0, −1)."""
    cls = get_sae("relu")
    config = cls.Config(sae_type="relu", sae_positions=["h"], auxk_coeff=ALPHA, aux_k=1)
    sae = cls(2, 2, config, dtype=torch.float64)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.5]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        sae.b_enc.copy_(torch.tensor([0.0, -1.5]))
    sae.variance.fill_(3.0)
    x_Nd = torch.tensor([[2.0, 1.0], [1.0, -1.0]]).double()
    dead_h = torch.tensor([False, True])
    forward = sae.training_forward(x_Nd, x_Nd, StepInputs(0.0, dead_h=dead_h))
    left = (1 - torch.tensor(-1.0).exp()) ** 2 + (-1 - torch.tensor(-2.0).exp()) ** 2
    assert forward.ratios["auxk"].value(2).item() == pytest.approx(ALPHA * 3 * left.item() / 2, rel=1e-6)
    assert not sae.training_forward(x_Nd, x_Nd, StepInputs(0.0)).ratios  # nobody knows who is dead


def test_without_it_nothing_is_kept_or_asked_for():
    plain, asked = build("relu"), build("relu", {"auxk_coeff": ALPHA})
    assert not plain.needs_dead
    assert asked.needs_dead
    assert set(asked.state_dict()) - set(plain.state_dict()) == {"variance"}


def test_it_takes_the_reference_step_and_tells_its_value(caplog):
    sae = build("relu", {"auxk_coeff": ALPHA})
    sae.tokens_since_fired[:5] = OPTIONS.dead_after_tokens
    stack = make_stack([sae], [0], OPTIONS, PerformanceConfig())
    assert stack.assembly.name == "reference"
    stack.step(examples(1)[0], [row(sae)])
    assert stack.metrics()[0]["aux"] > 0
