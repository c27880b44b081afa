"""The whole loss of topk and gated, worked by hand, from every step that the CPU has."""

from __future__ import annotations

import math

import pytest
import torch

from saeopt.config.machine import PerformanceConfig
from saeopt.saes.base import SAE, StepInputs
from saeopt.saes.registry import get_sae
from saeopt.training.step.choose import make_stack
from saeopt.training.step.contract import Example, Place, StackOptions

STACKS = ["fused", "reference"]
OPTIONS = StackOptions(dead_after_tokens=100)


def step(sae: SAE, x_Nd: torch.Tensor, stack: str, sparsity: float = 0.0) -> dict[str, float]:
    """The metrics of one window, whose loss is that of the weights before it; leaves Adam's m = 0.1 g in `sae.m`."""
    made = make_stack([sae], [0], OPTIONS, PerformanceConfig(stack=stack))
    hyper = [{"lr": 1e-3, "sparsity_coeff": sparsity, "beta": 1.0, "max_grad_norm": math.inf}]
    made.accumulate(Example(x_Nd, x_Nd, None, Place(0, 1, len(x_Nd))), hyper)
    made.apply(hyper)
    sae.m = {name: t / 0.1 for name, t in made.state(0).items() if name.startswith("m.")}
    return made.metrics()[0]


def topk(recipe: int, *, legacy: bool = False) -> SAE:
    """Three latents of which the third, [0.6, 0.8], has been silent for long; b_enc keeps it from being chosen."""
    cls = get_sae("topk")
    config = cls.Config(sae_type="topk", sae_positions=["hook"], k=1, decoder_norm="free")
    sae = cls(2, 3, config, recipe=recipe, legacy_scaling=legacy, dtype=torch.float64)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0, 1], [0, 1, 1]]))
        sae.W_dec.copy_(torch.tensor([[1, 0], [0, 1], [0.6, 0.8]], dtype=torch.float64))
        sae.b_enc[2] = -2.0
    sae.tokens_since_fired[2] = 100
    return sae


X = torch.tensor([[2.0, 1], [0, 3]], dtype=torch.float64)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize(("recipe", "legacy", "loss"), [(2, False, 0.675), (1, False, 0.5875), (2, True, 0.3375)])
def test_topk_with_a_dead_latent(stack: str, recipe: int, legacy: bool, loss: float) -> None:
    """x̂ = [2,0], [0,3]: e = [0,1], [0,0], MSE = 1/2. The dead latent fires 1 on both: ê = [.6,.8] twice.

    Σ‖e − ê‖² = .4 + 1, Σ‖e − mean e‖² = 1 − 1/2: AuxK = 2.8. V = ‖[1,−1]‖² = 2. Loss = .5 + 2·2.8/32 = .675; without V
    .5875; per unit of d (MSE and V) half of .675.
    """
    sae = topk(recipe, legacy=legacy)
    sae.measure(X)
    found = step(sae, X, stack)
    assert found["loss"] == pytest.approx(loss, rel=1e-12)
    assert found["mse"] == pytest.approx(0.5, rel=1e-12)
    assert found["aux"] == pytest.approx(loss - (0.25 if legacy else 0.5), rel=1e-12)
    if not legacy and recipe == 2:  # αV/.5 = 1/8 of −2⟨e − ê, w⟩ x = .4 [2,1] + 2 [0,3]
        torch.testing.assert_close(sae.m["m.W_enc"][:, 2], torch.tensor([0.1, 0.8]).double())


@pytest.mark.parametrize("stack", STACKS)
def test_topk_with_living_latents_alone(stack: str) -> None:
    sae = topk(2)
    sae.measure(X)
    sae.tokens_since_fired.zero_()
    assert step(sae, X, stack)["loss"] == pytest.approx(0.5, rel=1e-12)


def test_the_variance_is_measured_once_and_travels_with_the_weights() -> None:
    sae = topk(2)
    sae.measure(torch.tensor([[2.0, 1], [0, 3], [1, 2], [1, 2]]))
    assert sae.state_dict()["variance"] == 1.0
    sae.training_forward(X, StepInputs(0.0, dead_h=torch.tensor([False, False, True])))
    assert sae.variance == 1.0
    assert "variance" not in topk(1).state_dict()  # files of the first version have none


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize(("recipe", "decoder_norm"), [(1, None), (2, None), (2, "free")])
def test_gated(stack: str, recipe: int, decoder_norm: str | None) -> None:
    """Rows [1,0] and [0,1], b_gate = [−1,0], e^r = [1,2]. x = [2,−1]: gate [1,−1], f = [2,0], x̂ = [2,0], error 1;
    by the gate alone [1,0], error 2. x = [.5,3]: gate [−.5,3], f = [0,6], error .25 + 9; by the gate [0,3], error .25.

    MSE = 10.25/2, penalty λ·(1 + 3)/2 with λ = .5, auxiliary (2 + .25)/2: 5.125 + 1 + 1.125 = 7.25.
    """
    cls = get_sae("gated")
    config = cls.Config(sae_type="gated", sae_positions=["hook"], decoder_norm=decoder_norm)
    sae = cls(2, 2, config, recipe=recipe, dtype=torch.float64)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.eye(2))
        sae.b_gate[0] = -1.0
        sae.r_mag[1] = math.log(2)
    x_Nd = torch.tensor([[2.0, -1], [0.5, 3]], dtype=torch.float64)
    found = step(sae, x_Nd, stack, sparsity=0.5)
    assert found["loss"] == pytest.approx(7.25, rel=1e-12)
    assert (found["mse"], found["sparsity"]) == pytest.approx((5.125, 1.0), rel=1e-12)
    # errors [0,1], [−.5,3] through f; unless frozen [−1,1], [−.5,0] through the gate alone; the penalty's λ/2·[1,3]
    through_f = torch.tensor([[0.0, 2], [-3, 18]])
    through_gate = torch.tensor([[-1.0, 1], [-1.5, 0]])
    pull = torch.tensor([[0.25, 0], [0, 0.75]])
    expected = {"1": through_f + pull, "2": through_f, "2free": through_f + through_gate + pull}
    g_W_dec = expected[f"{recipe}{decoder_norm or ''}"].double()
    if decoder_norm is None and recipe == 2:
        g_W_dec = g_W_dec * (1 - torch.eye(2))  # nothing along the rows
    torch.testing.assert_close(sae.m["m.W_dec"], g_W_dec)
