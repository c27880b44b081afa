"""Learning rate and β at their corners, against closed forms."""

from __future__ import annotations

import math

import pytest

from saeopt.saes.registry import get_sae
from saeopt.training.controls import Controls, schedules
from saeopt.training.pack import Member
from saeopt.training.schedules import lr_factor


def number(config, name, samples, total):
    sae = get_sae(config.saes.sae_type)(4, 8, config.saes)
    members = [Member("a", "hook", config, sae)]
    return Controls(members, schedules(members, total)).numbers(samples)[0][name]


def test_warmup_is_linear_from_zero(make_config):
    config = make_config(warmup_samples=64)
    assert lr_factor(config, 16, 256) == pytest.approx(0.25)
    assert lr_factor(config, 64, 256) == pytest.approx(1.0)


def test_cosine_ends_at_min_lr_factor(make_config):
    config = make_config(lr_schedule="cosine", warmup_samples=0, min_lr_factor=0.1)
    assert lr_factor(config, 128, 256) == pytest.approx(0.1 + 0.9 * 0.5)
    assert lr_factor(config, 64, 256) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert lr_factor(config, 256, 256) == pytest.approx(0.1)


def test_linear_is_flat_until_the_cooldown(make_config):
    config = make_config(lr_schedule="linear", warmup_samples=0, cooldown_samples=100, min_lr_factor=0.2)
    assert lr_factor(config, 156, 256) == pytest.approx(1.0)
    assert lr_factor(config, 206, 256) == pytest.approx(0.6)
    assert lr_factor(config, 256, 256) == pytest.approx(0.2)


def test_recipe_1_falls_linearly_from_the_end_of_the_warmup(make_config):
    config = make_config(recipe=1, lr_schedule="linear", warmup_samples=56, min_lr_factor=0.0)
    assert lr_factor(config, 156, 256) == pytest.approx(0.5)


def test_recipe_2_falls_over_the_last_fifth(make_config):
    config = make_config(warmup_samples=10, min_lr_factor=0.0, **{"data.n_train_samples": 500})
    assert [lr_factor(config, n, 500) for n in (5, 10, 400, 450, 500)] == pytest.approx([0.5, 1, 1, 0.5, 0])
    late = make_config(warmup_samples=450, min_lr_factor=0.0, **{"data.n_train_samples": 500})
    assert [lr_factor(late, n, 500) for n in (450, 475, 500)] == pytest.approx([1, 0.5, 0])


def test_lambda_rises_over_the_first_twentieth_of_recipe_2(make_config):
    given = {"data.n_train_samples": 500, "saes.sparsity_coeff": 8}
    config = make_config(**given)
    rising = [number(config, "sparsity_coeff", n, 500) for n in (5, 20, 25, 500)]
    assert rising == pytest.approx([1.6, 6.4, 8, 8])
    told = make_config(**given, **{"saes.sparsity_warmup_samples": 100})
    assert number(told, "sparsity_coeff", 25, 500) == pytest.approx(2)
    first = make_config(recipe=1, **given)
    assert number(first, "sparsity_coeff", 1, 500) == 8


def test_a_share_of_an_unknown_length_is_nothing(make_config):
    config = make_config(**{"data.n_train_samples": None})
    assert [lr_factor(config, n, 500) for n in (450, 500)] == [1, 1]
    assert number(config, "sparsity_coeff", 1, 500) == config.saes.sparsity_coeff


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
    assert number(config, "beta", 56, 256) == pytest.approx(0.8)
    assert number(config, "beta", 156, 256) == pytest.approx(0.4)
    assert number(config, "beta", 256, 256) == pytest.approx(0.2)


def test_no_clipping_is_an_infinite_norm(make_config):
    config = make_config(max_grad_norm=None)
    assert number(config, "max_grad_norm", 1, 256) == math.inf
