"""Where an SAE starts: decoder directions, decoder bias and the encoder's size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_cases import IDS, VARIANTS, activations, build

from saeopt.saes import init
from saeopt.saes.init import forget_decoders, geometric_median, initial_bias, initial_decoder

every_variant = pytest.mark.parametrize(("sae_type", "fields"), VARIANTS, ids=IDS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("h", [8, 64, 256])
@pytest.mark.parametrize("shift", [0.0, 1.0])
@every_variant
def test_reconstruction_starts_as_long_as_the_input(
    sae_type: str, fields: dict[str, Any], h: int, shift: float
) -> None:
    sae = build(sae_type, {**fields, "encoder_start": "matched"}, d=16, h=h)
    x_Nd = torch.randn(500, 16, generator=generator()).double() + shift
    sae.initialise(x_Nd, generator())
    x_hat_Nd = sae.decode(sae.encode(x_Nd))
    assert (x_hat_Nd.norm(dim=-1).mean() / x_Nd.norm(dim=-1).mean()).item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(h).double())
    c = sae.W_enc.norm(dim=0)
    torch.testing.assert_close(sae.W_enc, c.mean() * sae.W_dec.T)
    for name in sae.latent_vectors:
        first = sae.config.initial_threshold if name == "threshold" else 0.0
        assert torch.all(sae.get_parameter(name) == first)


@pytest.mark.parametrize(("k", "long"), [(1, False), (32, True)])
def test_topks_encoder_starts_as_the_decoders_transpose_where_that_is_not_too_long(k: int, long: bool) -> None:
    sae, matched = (build("topk", {"k": k, **own}, d=16, h=64) for own in ({}, {"encoder_start": "matched"}))
    x_Nd = torch.randn(500, 16, generator=generator()).double() + 0.5
    for each in (sae, matched):
        each.initialise(x_Nd, generator())
    torch.testing.assert_close(sae.W_enc, matched.W_enc if long else sae.W_dec.T)
    assert (matched.W_enc.norm() < sae.W_dec.norm()) == long


@every_variant
def test_a_wide_dictionary_does_not_start_at_a_large_error(sae_type: str, fields: dict[str, Any]) -> None:
    """W_enc = W_decᵀ would start at an FVU of about (h / 2d)² = 256."""
    sae = build(sae_type, fields, d=16, h=512)
    x_Nd = torch.randn(500, 16, generator=generator()).double() + 0.5
    sae.initialise(x_Nd, generator())
    fvu = (sae.decode(sae.encode(x_Nd)) - x_Nd).square().sum() / (x_Nd - x_Nd.mean(0)).square().sum()
    assert fvu.item() < 1.5


def test_start_depends_on_the_generator_alone_and_clears_what_was_there() -> None:
    first, second, third = build("gated", seed=1), build("gated", seed=2), build("gated", seed=1)
    for sae, seed in ((first, 0), (second, 0), (third, 1)):
        sae.initialise(activations(), generator(seed))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not torch.allclose(first.W_dec, third.W_dec)


def test_float32_and_float64_start_at_the_same_directions() -> None:
    wide, narrow = build("relu"), build("relu", dtype=torch.float32)
    wide.initialise(activations(), generator())
    narrow.initialise(activations(), generator())
    torch.testing.assert_close(narrow.W_dec.double(), wide.W_dec, rtol=0, atol=1e-6)
    torch.testing.assert_close(narrow.W_enc.double(), wide.W_enc, rtol=1e-3, atol=1e-5)


def test_a_wide_decoder_has_orthogonal_columns_before_its_rows_are_scaled() -> None:
    W_hd = initial_decoder(4096, 16, True, generator())
    gram = W_hd.T @ W_hd * 16 / 4096  # the rows of a tall orthonormal matrix are nearly of one length
    torch.testing.assert_close(gram, torch.eye(16), rtol=0, atol=0.06)
    plain = initial_decoder(4096, 16, False, generator())
    off = (plain.T @ plain * 16 / 4096 - torch.eye(16)).abs().max()
    assert off > 2 * (gram - torch.eye(16)).abs().max()


@pytest.mark.parametrize("h", [5, 12])
def test_a_narrow_decoder_has_orthonormal_rows(h: int) -> None:
    W_hd = initial_decoder(h, 12, True, generator())
    torch.testing.assert_close(W_hd @ W_hd.T, torch.eye(h), rtol=0, atol=1e-5)


def test_geometric_median_ignores_an_outlier_and_has_no_pull_left() -> None:
    x_Nd = activations(200)
    x_Nd[:20] += 1e4
    median_d = geometric_median(x_Nd)
    offset_Nd = x_Nd - median_d
    assert (offset_Nd / offset_Nd.norm(dim=-1, keepdim=True)).mean(0).norm() < 1e-6
    assert median_d.norm() < 3 < x_Nd.mean(0).norm()


def test_geometric_median_of_points_that_meet_it() -> None:
    cross = torch.tensor([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    torch.testing.assert_close(geometric_median(cross), torch.zeros(2))
    far_from_the_mean = torch.tensor([[0.0], [0.0], [0.0], [10.0]])
    torch.testing.assert_close(geometric_median(far_from_the_mean), torch.zeros(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(geometric_median(torch.ones(4, 3)), torch.ones(3))
    # the mean lies on three points that outweigh the pull of the others: nothing moves
    held = torch.tensor([[0.0], [0.0], [0.0], [1.0], [2.0], [-3.0]])
    assert geometric_median(held, max_iterations=1).item() == 0
    # the first iterate (the mean) lies on a point that is not the median
    on_the_mean = torch.tensor([[0.0], [1.0], [1.0], [1.0], [-3.0]])
    torch.testing.assert_close(geometric_median(on_the_mean), torch.ones(1), rtol=0, atol=1e-5)


def test_bias_kinds() -> None:
    x_Nd = activations()
    torch.testing.assert_close(initial_bias(x_Nd, "mean"), x_Nd.mean(0))
    assert initial_bias(x_Nd, "zero").count_nonzero() == 0
    assert torch.equal(initial_bias(x_Nd, "geometric_median"), geometric_median(x_Nd))


@every_variant
def test_one_calibration_token_still_gives_finite_weights(sae_type: str, fields: dict[str, Any]) -> None:
    sae = build(sae_type, fields)
    sae.initialise(activations()[:1], generator())
    assert all(torch.isfinite(p).all() for p in sae.parameters())


def test_no_calibration_token_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="no calibration token"):
        build("relu").initialise(activations()[:0], generator())


def test_gate_logits_start_at_order_1_whatever_the_units() -> None:
    for unit in (1.0, 3000.0):
        sae = build("hard_concrete", d=16, h=64)
        x_Nd = unit * (torch.randn(300, 16, generator=generator()).double() + 1)
        sae.initialise(x_Nd, generator())
        assert 0.5 < sae.log_alpha_and_magnitude(x_Nd)[0].std().item() < 2


def test_a_decoder_is_drawn_once_for_equal_members(monkeypatch):
    drawn = []
    monkeypatch.setattr(init, "_draw", lambda *given, draw=init._draw: drawn.append(given[:3]) or draw(*given))
    forget_decoders()
    first, again, other = generator(), generator(), torch.Generator().manual_seed(9)
    W_hd, more_hd = initial_decoder(20, 5, True, first), initial_decoder(8, 5, True, first)
    same_hd = initial_decoder(20, 5, True, again)
    same_hd[0] = 0.0
    assert torch.equal(initial_decoder(20, 5, True, generator()), W_hd)
    assert torch.equal(initial_decoder(8, 5, True, again), more_hd)  # the generator is where it would be
    assert drawn == [(20, 5, True), (8, 5, True)]
    assert not torch.equal(initial_decoder(20, 5, True, other), W_hd)
    initial_decoder(20, 5, False, generator())
    assert len(init._drawn) == 2
    forget_decoders()
    assert not init._drawn
