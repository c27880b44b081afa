"""Metrics against values worked by hand, and against themselves in pieces."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saeopt.evaluation.metrics import DENSITY_EDGES, Accumulator, Metrics, explained_variance, scalars

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def compute(x: Tensor, x_hat: Tensor, f: Tensor, keep: Tensor | None = None, scale: float = 1.0) -> Metrics:
    sums = Accumulator(x.shape[1], f.shape[1], scale=scale)
    sums.update(x, x_hat, f, keep)
    return sums.result()


@pytest.fixture
def data() -> Data:
    """Awkward: a mean far from 0, negative codes, dead latents, masked rows full of NaN."""
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(101, 6, generator=generator) + 50
    x_hat = x + torch.randn(101, 6, generator=generator)
    f = torch.randn(101, 16, generator=generator) * (torch.rand(101, 16, generator=generator) < 0.2)
    f[:, [3, 7]] = 0
    keep = torch.rand(101, generator=generator) < 0.8
    x[~keep], x_hat[~keep], f[~keep] = math.nan, math.inf, math.nan
    return x, x_hat, f, keep


def test_the_case_of_the_specification() -> None:
    x, x_hat = torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    f = torch.tensor([[1.0, 0.0, -2.0, 0.0], [0.0, 0.0, 3.0, 0.0]])
    got = compute(x, x_hat, f, scale=0.5)
    # error 1 + 1; mean (1, 2), spread (1 + 4) + (1 + 4) = 10
    assert got["fvu"] == pytest.approx(0.2, abs=1e-15)
    assert got["explained_variance"] == pytest.approx(0.8, abs=1e-15)
    assert explained_variance(x, x_hat) == pytest.approx(0.8, abs=1e-15)
    assert got["mse"] == 1.0
    assert got["l0"] == 1.5  # the negative entry counts
    assert got["l1"] == (3 + 3) / 2 / 0.5
    assert got["cosine"] == pytest.approx((2 / math.sqrt(5) + 1) / 2, abs=1e-12)
    assert got["norm_ratio"] == pytest.approx((math.sqrt(5) + 3) / (2 + 4), abs=1e-12)
    assert got["fraction_dead"] == got["fraction_alive"] == 0.5
    assert got["n_tokens"] == 2


def test_l1_counts_what_a_latent_writes() -> None:
    """Σ f ‖W_dec‖ in raw units: (3·2 + 4·0.5) / scale."""
    sums = Accumulator(2, 2, scale=0.5, norm_h=torch.tensor([2.0, 0.5]))
    sums.update(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([[3.0, -4.0]]))
    assert sums.result()["l1"] == (3 * 2 + 4 * 0.5) / 0.5


def test_the_density_histogram_counts_alive_latents_by_their_share_of_tokens() -> None:
    f = torch.zeros(1000, 4)
    f[:, 0] = 1  # log10 1 = 0: last bin
    f[:10, 1] = -1  # log10 0.01 = -2
    f[:1, 2] = 1  # log10 0.001 = -3
    histogram = compute(torch.randn(1000, 2), torch.randn(1000, 2), f)["log10_density"]
    assert isinstance(histogram, dict)
    found = {edge: n for edge, n in zip(histogram["edges"], histogram["counts"], strict=False) if n}
    assert found == {-0.25: 1, -2.0: 1, -3.0: 1}
    assert histogram["edges"] == DENSITY_EDGES


def test_masked_tokens_change_nothing(data: Data) -> None:
    x, x_hat, f, keep = data
    assert_close(compute(x, x_hat, f, keep), compute(x[keep], x_hat[keep], f[keep]))


def test_uneven_batches_give_the_same_as_the_whole(data: Data) -> None:
    x, x_hat, f, keep = data
    sums = Accumulator(6, 16)
    for part in torch.tensor_split(torch.arange(101), [1, 40, 41]):
        sums.update(x[part], x_hat[part], f[part], keep[part])
    assert_close(sums.result(), compute(x, x_hat, f, keep))


def test_two_ranks_reduced_give_the_same_as_one(data: Data) -> None:
    x, x_hat, f, keep = data
    ranks = [Accumulator(6, 16), Accumulator(6, 16)]
    for rank, part in zip(ranks, (slice(0, 30), slice(30, 101)), strict=True):
        rank.update(x[part], x_hat[part], f[part], keep[part])
    ranks[0].sums += ranks[1].sums
    assert_close(ranks[0].result(), compute(x, x_hat, f, keep))


def test_fvu_agrees_with_the_formula_where_the_mean_is_large(data: Data) -> None:
    x, x_hat, f, keep = data
    x, x_hat = x + 1000, x_hat + 1000
    kept, kept_hat = x[keep].double(), x_hat[keep].double()
    expected = (kept - kept_hat).square().sum() / (kept - kept.mean(0)).square().sum()
    assert compute(x, x_hat, f, keep)["fvu"] == pytest.approx(float(expected), rel=1e-9)


def test_half_precision_activations_are_summed_in_double() -> None:
    x = torch.full((4096, 2), 100.0, dtype=torch.bfloat16)
    assert compute(x, x - 1, torch.ones(4096, 3, dtype=torch.bfloat16))["mse"] == 2.0


def test_nothing_gives_nan_and_no_error() -> None:
    got = Accumulator(2, 3).result()
    assert got["n_tokens"] == 0
    assert all(math.isnan(v) for k, v in scalars(got).items() if k != "n_tokens")


def test_values_are_plain_python(data: Data) -> None:
    got = compute(*data)
    assert {type(v) for v in got.values()} == {float, int, dict}
    assert "log10_density" not in scalars(got)
    assert {type(v) for v in scalars(got).values()} == {float}


def assert_close(got: Metrics, expected: Metrics) -> None:
    assert scalars(got) == pytest.approx(scalars(expected), rel=1e-12)
    assert got["log10_density"] == expected["log10_density"]
