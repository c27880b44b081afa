"""Closed forms of each architecture: what its loss is, and who gets a gradient from which term."""

from __future__ import annotations

import math

import pytest
import torch
from sae_cases import activations, build, gradients, loss, step_inputs

from saeopt.saes.base import SAE, StepInputs
from saeopt.saes.hard_concrete import noisy_gate, probability_nonzero, quiet_gate
from saeopt.saes.noise import uniform
from saeopt.saes.registry import get_sae


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def test_relu_loss_is_unchanged_when_encoder_and_decoder_are_rescaled() -> None:
    sae, x_Nd = build("relu"), activations()
    before = loss(sae, x_Nd, step_inputs(sae)).item()
    c_h = torch.linspace(0.1, 7, sae.h, dtype=torch.float64)
    with torch.no_grad():
        sae.W_enc.mul_(c_h)
        sae.b_enc.mul_(c_h)
        sae.W_dec.div_(c_h.unsqueeze(-1))
    assert loss(sae, x_Nd, step_inputs(sae)).item() == pytest.approx(before, rel=1e-12)


def test_unit_decoder_rows_leave_the_plain_l1_penalty() -> None:
    sae, x_Nd = build("relu", {"decoder_norm": "unit"}), activations()
    forward = sae.training_forward(x_Nd, StepInputs(0.3))
    assert forward.terms["sparsity"].item() == pytest.approx(0.3 * forward.f_Nh.sum().item(), rel=1e-12)


@pytest.mark.parametrize("sae_type", ["relu", "gated", "topk", "hard_concrete"])
def test_unit_decoder_rows_survive_a_step_and_its_gradient_has_no_radial_part(sae_type: str) -> None:
    sae, x_Nd = build(sae_type, {"decoder_norm": "unit"}), activations()
    loss(sae, x_Nd, step_inputs(sae)).backward()
    sae.before_step()
    assert sae.W_dec.grad is not None
    assert sae.W_dec.grad.norm() > 1e-3
    assert (sae.W_dec.grad * sae.W_dec).sum(-1).abs().max() < 1e-12
    with torch.no_grad():
        sae.W_dec -= 0.3 * sae.W_dec.grad
    assert (sae.W_dec.norm(dim=-1) - 1).abs().max() > 1e-3
    sae.after_step()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(sae.h).double())


def test_gated_code_element_by_element() -> None:
    sae, x_Nd = build("gated"), activations(7)
    shared_Nh = (x_Nd - sae.b_dec) @ sae.W_enc
    f_Nh = sae.encode(x_Nd)
    kinds = set()
    for n in range(7):
        for i in range(sae.h):
            gate = (shared_Nh[n, i] + sae.b_gate[i]).item() > 0
            magnitude = math.exp(sae.r_mag[i].item()) * shared_Nh[n, i].item() + sae.b_mag[i].item()
            kinds.add((gate, magnitude > 0))
            assert f_Nh[n, i].item() == pytest.approx(max(magnitude, 0) if gate else 0, abs=1e-12)
    assert len(kinds) == 4  # open and closed gates with positive and negative magnitudes all occurred


def test_gated_gate_bias_learns_from_penalty_and_auxiliary_term_only() -> None:
    sae, x_Nd = build("gated"), activations()

    def bias_gradient(term: str) -> float:
        return gradients(sae, sae.training_forward(x_Nd, step_inputs(sae)).terms[term])["b_gate"].norm().item()

    assert bias_gradient("mse") == 0
    assert bias_gradient("sparsity") > 0
    assert bias_gradient("aux") > 0


@pytest.mark.parametrize("sae_type", ["gated", "gated_hard_concrete"])
def test_auxiliary_term_does_not_move_decoder_or_magnitudes(sae_type: str) -> None:
    sae, x_Nd = build(sae_type), activations()
    found = gradients(sae, sae.training_forward(x_Nd, step_inputs(sae)).terms["aux"])
    assert found["W_enc"].norm() > 0
    for name in ("W_dec", "b_mag", "r_mag"):
        assert found[name].norm() == 0
    # b_dec is frozen as the decoder's bias, not as the encoder's centre: −W_enc · (gradient of the gate bias)
    torch.testing.assert_close(found["b_dec"], -sae.W_enc.detach() @ found["b_gate"])


@pytest.mark.parametrize("aux_form", ["gated", "seed"])
def test_gated_hard_concrete_loss_element_by_element(aux_form: str) -> None:
    sae, x_Nd = build("gated_hard_concrete", {"aux_form": aux_form}), activations(9)
    inputs = step_inputs(sae, 9)
    shared_Nh = ((x_Nd - sae.b_dec) @ sae.W_enc).tolist()
    code, auxiliary, penalty = torch.zeros(9, sae.h).double(), torch.zeros(9, sae.h).double(), 0.0
    for n in range(9):
        for i in range(sae.h):
            log_alpha, u = shared_Nh[n][i] + sae.b_gate[i].item(), inputs.u_Nh[n, i].item()
            z = min(1, max(0, 1.2 * sigmoid((math.log(u / (1 - u)) + log_alpha) / 0.7) - 0.1))
            code[n, i] = z * max(0, math.exp(sae.r_mag[i].item()) * shared_Nh[n][i] + sae.b_mag[i].item())
            auxiliary[n, i] = z * max(0, log_alpha) if aux_form == "gated" else z
            penalty += sigmoid(log_alpha - 0.7 * math.log(0.1 / 1.1))
    terms = sae.training_forward(x_Nd, inputs).terms
    error = (code @ sae.W_dec + sae.b_dec - x_Nd).square().sum()
    auxiliary_error = (auxiliary @ sae.W_dec + sae.b_dec - x_Nd).square().sum()
    assert terms["mse"].item() == pytest.approx(error.item(), rel=1e-9)
    assert terms["aux"].item() == pytest.approx(auxiliary_error.item(), rel=1e-9)
    assert terms["sparsity"].item() == pytest.approx(0.3 * penalty, rel=1e-9)


@pytest.mark.parametrize("input_dependent", [True, False])
def test_hard_concrete_loss_element_by_element(input_dependent: bool) -> None:
    sae, x_Nd = build("hard_concrete", {"input_dependent_gates": input_dependent}), activations(9)
    assert isinstance(sae, SAE)
    assert hasattr(sae, "W_gate") == input_dependent
    inputs, x_bar_Nd = step_inputs(sae, 9), x_Nd - sae.b_dec
    m_Nh = x_bar_Nd @ sae.W_enc + sae.b_enc
    la_Nh = x_bar_Nd @ sae.W_gate + sae.b_gate if input_dependent else sae.b_gate.repeat(9, 1)
    code, penalty = torch.zeros(9, sae.h).double(), 0.0
    for n in range(9):
        for i in range(sae.h):
            u, log_alpha = inputs.u_Nh[n, i].item(), la_Nh[n, i].item()
            z = min(1, max(0, 1.2 * sigmoid((math.log(u / (1 - u)) + log_alpha) / 0.7) - 0.1))
            code[n, i] = z * m_Nh[n, i].item()
            penalty += sigmoid(log_alpha - 0.7 * math.log(0.1 / 1.1))
    assert (code < 0).any()  # the magnitude is linear unless told otherwise
    rows = torch.stack([row / row.norm() for row in sae.W_dec])
    terms = sae.training_forward(x_Nd, inputs).terms
    assert terms["mse"].item() == pytest.approx((code @ rows + sae.b_dec - x_Nd).square().sum().item(), rel=1e-9)
    assert terms["sparsity"].item() == pytest.approx(0.3 * penalty, rel=1e-9)


def test_hard_concrete_reconstruction_ignores_the_length_of_decoder_rows() -> None:
    sae, x_Nd = build("hard_concrete"), activations()
    before = sae(x_Nd)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.2, 5, sae.h, dtype=torch.float64).unsqueeze(-1))
    torch.testing.assert_close(sae(x_Nd), before)


@pytest.mark.parametrize("beta", [0.3, 0.5, 1.0])
def test_probability_of_an_open_gate_by_monte_carlo(beta: float) -> None:
    draws, limits = 200_000, (-0.1, 1.1)
    log_alpha_h = torch.tensor([-4.0, -1.0, 0.0, 1.5])
    z_Nh = noisy_gate(log_alpha_h, uniform(3, 0, 4, draws // 4, 4), beta, limits)
    share_h = (z_Nh != 0).double().mean(0)
    p_h = probability_nonzero(log_alpha_h, beta, limits).double()
    assert ((share_h - p_h).abs() < 5 * (p_h * (1 - p_h) / draws).sqrt()).all()


def test_median_gate_is_the_median_over_the_noise() -> None:
    log_alpha_h = torch.tensor([-1.0, -0.2, 0.0, 0.4, 1.0])
    z_Nh = noisy_gate(log_alpha_h, uniform(4, 0, 1, 100_001, 5), 0.5, (-0.1, 1.1))
    quiet_h = quiet_gate(log_alpha_h, 0.5, (-0.1, 1.1), "median")
    torch.testing.assert_close(z_Nh.median(0).values, quiet_h, rtol=0, atol=0.02)


def test_evaluation_gate_uses_the_temperature_of_the_last_step() -> None:
    sae, x_Nd = build("hard_concrete"), activations()
    assert sae.beta.item() == 0.5  # initial_beta before the first step
    early = sae.encode(x_Nd)
    sae.training_forward(x_Nd, step_inputs(sae, beta=0.1))
    assert sae.beta.item() == pytest.approx(0.1)
    log_alpha_Nh, m_Nh = sae.log_alpha_and_magnitude(x_Nd)
    expected = m_Nh * (1.2 * torch.sigmoid(log_alpha_Nh / 0.1) - 0.1).clamp(0, 1)
    torch.testing.assert_close(sae.encode(x_Nd), expected)
    assert not torch.allclose(expected, early)


def test_hard_concrete_refuses_to_train_without_noise() -> None:
    with pytest.raises(ValueError, match="u_Nh"):
        build("hard_concrete").training_forward(activations(), StepInputs(0.3, 0.5))


@pytest.mark.parametrize("k", [1, 3, 6])
def test_topk_keeps_exactly_the_k_largest(k: int) -> None:
    sae, x_Nd = build("topk", {"k": k}, d=12, h=60), activations(50, 12)
    acts_Nh = torch.relu(sae.pre_activation(x_Nd))
    assert ((acts_Nh > 0).sum(-1) >= k).all()
    for f_Nh in (sae.encode(x_Nd), sae.training_forward(x_Nd, step_inputs(sae, 50)).f_Nh):
        assert ((f_Nh != 0).sum(-1) == k).all()
        for f_h, acts_h in zip(f_Nh, acts_Nh, strict=True):
            kept = f_h != 0
            assert torch.equal(f_h[kept], acts_h[kept])
            assert acts_h[kept].min() > acts_h[~kept].max()


def test_topk_keeps_no_negative_pre_activation() -> None:
    sae, x_Nd = build("topk", {"k": 4}), activations()
    with torch.no_grad():
        sae.b_enc.fill_(-3.0)
    f_Nh = sae.encode(x_Nd)
    assert (f_Nh >= 0).all()
    assert ((f_Nh != 0).sum(-1) < 4).any()


def test_auxk_by_hand() -> None:
    """x = [[2,0],[0,4]] leaves e = [[1,0],[0,2]]; the dead latent fires 1 on both rows and adds ê = [1,1].

    Σ‖e − ê‖² = 1 + 2 = 3, Σ‖e − mean e‖² = 2.5, AuxK = 1.2.
    """
    cls = get_sae("topk")
    sae = cls(2, 3, cls.Config(sae_type="topk", sae_positions=["hook"], k=1), dtype=torch.float64)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0, 0.5], [0, 1, 0.25]]))
        sae.W_dec.copy_(torch.tensor([[0.5, 0], [0, 0.5], [1, 1]]))
    x_Nd = torch.tensor([[2.0, 0], [0, 4]], dtype=torch.float64)
    ratio = sae.training_forward(x_Nd, StepInputs(0.0, dead_h=torch.tensor([False, False, True]))).ratios["aux"]
    assert sae.aux_k == 1
    assert ratio.numerator.item() == pytest.approx(3 / 32)
    assert 1 / ratio.inverse_denominator(2) == pytest.approx(2.5)
    assert ratio.value(2).item() == pytest.approx(1.2 / 32)
    found = gradients(sae, 32 * ratio.value(2))
    torch.testing.assert_close(found["W_enc"], torch.tensor([[0, 0, 1.6], [0, 0, 0]]).double())
    torch.testing.assert_close(found["b_enc"], torch.tensor([0, 0, 0.8]).double())
    torch.testing.assert_close(found["W_dec"], torch.tensor([[0, 0], [0, 0], [0.8, 0]]).double())


def test_auxk_uses_at_most_aux_k_dead_latents_and_no_living_one() -> None:
    sae, x_Nd = build("topk", {"k": 2, "aux_coeff": 1.0}, d=9, h=40), activations(30, 9)
    assert sae.aux_k == 4  # the power of two at or below 9 / 2
    error_Nd = (x_Nd - sae.decode(sae.encode(x_Nd))).detach()
    acts_Nh = torch.relu(sae.pre_activation(x_Nd))
    for dead in ([], [7], [0, 3, 8], list(range(20))):
        dead_h = torch.tensor([i in dead for i in range(40)])
        ratio = sae.training_forward(x_Nd, StepInputs(0.0, dead_h=dead_h)).ratios["aux"]
        left = 0.0
        for n in range(30):
            best = sorted(dead, key=lambda i: -acts_Nh[n, i].item())[: min(len(dead), 4)]
            e_hat_d = sum((acts_Nh[n, i] * sae.W_dec[i] for i in best), torch.zeros(9).double())
            left += (error_Nd[n] - e_hat_d).square().sum().item()
        assert ratio.numerator.item() == pytest.approx(left if dead else 0.0, rel=1e-12)
        alive = gradients(sae, ratio.numerator)["W_enc"][:, ~dead_h]
        assert torch.equal(alive, torch.zeros_like(alive))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 3, 7])
def test_auxk_is_0_where_the_error_has_no_spread(n: int, dtype: torch.dtype) -> None:
    sae = build("topk", {"k": 2}, dtype=dtype)
    same_Nd = activations(1).to(dtype).repeat(n, 1)
    one_token = sae.training_forward(same_Nd, step_inputs(sae, n)).ratios["aux"]
    assert one_token.numerator > 0
    assert one_token.value(n).item() == 0
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
    assert sae.training_forward(torch.zeros(5, 6, dtype=dtype), step_inputs(sae, 5)).ratios["aux"].value(5).item() == 0


def test_the_threshold_of_batch_topk_has_no_bias_and_follows_a_short_run() -> None:
    steady, rising = build("batch_topk"), build("batch_topk")
    for sae in (steady, rising):
        sae.get_buffer("threshold").fill_(100.0)  # forgotten with the first window
    for window in range(1, 51):
        for sae, smallest in ((steady, 0.5), (rising, float(window))):
            sums = {"smallest": torch.tensor(3 * smallest).double(), "batches": torch.tensor(3.0).double()}
            sae.after_window(sums, torch.tensor(40.0))
        nothing = {name: torch.zeros(()).double() for name in sums}
        steady.after_window(nothing, torch.tensor(40.0))  # a window that kept nothing counts for nothing
        assert steady.get_buffer("threshold").item() == pytest.approx(0.5)
    assert rising.get_buffer("threshold_windows").item() == 50
    late = rising.get_buffer("threshold").item()  # a mean over all of so few windows would be 25.5
    assert late == pytest.approx(40.2, rel=1e-4)


@pytest.mark.parametrize(("sae_type", "length"), [("jumprelu", "each"), ("batch_topk", "all"), ("relu", "each")])
def test_rows_made_1_long_leave_reconstructions_as_they_were(sae_type: str, length: str) -> None:
    sae, x_Nd = build(sae_type), activations()
    with torch.no_grad():
        sae.W_dec.mul_(3.0 if length == "all" else torch.linspace(0.5, 3, sae.h).unsqueeze(-1))
        if sae_type != "relu":
            sae.threshold.fill_(0.4)
    before, code = sae(x_Nd), sae.encode(x_Nd)
    assert sae.rescale_rows()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(sae.h).double())
    assert torch.equal(sae.encode(x_Nd) != 0, code != 0)
    torch.testing.assert_close(sae(x_Nd), before)
