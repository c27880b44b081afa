"""Learning rate and β at their corners, against closed forms."""

from __future__ import annotations

import math

import pytest

from saeopt.training.schedules import beta, hyper, lr_factor


def test_warmup_is_linear_from_zero(make_config):
    config = make_config(warmup_samples=64)
    assert lr_factor(config, 16, 256) == pytest.approx(0.25)
    assert lr_factor(config, 64, 256) == pytest.approx(1.0)


def test_cosine_ends_at_min_lr_factor(make_config):
    config = make_config(warmup_samples=0, min_lr_factor=0.1)
    assert lr_factor(config, 128, 256) == pytest.approx(0.1 + 0.9 * 0.5)
    assert lr_factor(config, 64, 256) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert lr_factor(config, 256, 256) == pytest.approx(0.1)


def test_linear_is_flat_until_the_cooldown(make_config):
    config = make_config(lr_schedule="linear", warmup_samples=0, cooldown_samples=100, min_lr_factor=0.2)
    assert lr_factor(config, 156, 256) == pytest.approx(1.0)
    assert lr_factor(config, 206, 256) == pytest.approx(0.6)
    assert lr_factor(config, 256, 256) == pytest.approx(0.2)


def test_linear_without_cooldown_falls_from_the_end_of_the_warmup(make_config):
    config = make_config(lr_schedule="linear", warmup_samples=56, min_lr_factor=0.0)
    assert lr_factor(config, 156, 256) == pytest.approx(0.5)


def test_constant_stays(make_config):
    assert lr_factor(make_config(lr_schedule="constant", warmup_samples=0), 256, 256) == 1.0


@pytest.mark.parametrize("sae_type", ["hard_concrete", "gated_hard_concrete"])
def test_beta_waits_for_the_warmup_then_falls_exponentially(make_config, sae_type):
    config = make_config(
        **{
            "warmup_samples": 56,
            "saes.sae_type": sae_type,
            "saes.initial_beta": 0.8,
            "saes.final_beta": 0.2,
            "saes.beta_annealing": True,
        }
    )
    assert beta(config, config.saes, 56, 256) == pytest.approx(0.8)
    assert beta(config, config.saes, 156, 256) == pytest.approx(0.4)
    assert beta(config, config.saes, 256, 256) == pytest.approx(0.2)


def test_no_clipping_is_an_infinite_norm(make_config):
    config = make_config(max_grad_norm=None)
    assert hyper(config, config.saes, 1, 256).max_grad_norm == math.inf
