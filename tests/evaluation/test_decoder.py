"""What the decoder's rows say of L0: c_dec and s_n^dec, worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from saeopt.evaluation import decoder
from saeopt.evaluation.decoder import Projections, mean_cosine, some_positions
from saeopt.saes.base import SAE
from saeopt.testing.cases import build


def with_rows(rows: list[list[float]], bias: list[float], scale: float = 1.0, **fields: Any) -> SAE:
    """A relu SAE whose decoder holds these rows, in normalised units."""
    sae = build("relu", fields, seed=0, d=len(bias), h=len(rows), dtype=torch.float32)
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor(rows))
        sae.b_dec.copy_(torch.tensor(bias))
        sae.scale.fill_(scale)
    return sae


def test_the_mean_cosine_of_three_rows() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.6, 0.8]])
    assert mean_cosine(rows) == pytest.approx((0 + 0.6 + 0.8) / 3)
    assert math.isnan(mean_cosine(rows[:1]))


def test_blocks_give_the_mean_over_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.nn.functional.normalize(torch.randn(50, 7, generator=torch.Generator().manual_seed(1)), dim=-1)
    pairs = [abs(float(rows[i] @ rows[j])) for i in range(50) for j in range(i)]
    for block in (2**24, 50 * 7, 1):
        monkeypatch.setattr(decoder, "_BLOCK", block)
        assert mean_cosine(rows) == pytest.approx(sum(pairs) / len(pairs), rel=1e-6)


def test_the_nth_projection_of_two_tokens() -> None:
    """h = 4, so n = 1: of 8 projections that of rank 1 · 2, counted from 0. Rows of any length, raw units."""
    sae = with_rows([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [3.0, 4.0]], bias=[1.0, 2.0], scale=0.5)
    # b_dec is (2, 4) in raw units; y − b_dec is (1, 2) and (−3, 1)
    projections = Projections(sae)
    for y in ([3.0, 6.0], [-1.0, 5.0]):
        projections.update(torch.tensor([y]))
    # token 1: 1, 2, −1, 2.2; token 2: −3, 1, 3, −1; in order 3, 2.2, 2, 1, …
    assert projections.result()["s_dec"] == pytest.approx(2.0, rel=0.006)
    projections.sums += projections.sums.clone()  # two ranks that saw the same
    assert projections.result()["s_dec"] == pytest.approx(2.0, rel=0.006)


def test_projections_below_zero_and_none() -> None:
    sae = with_rows([[1.0], [1.0], [1.0], [1.0]], bias=[0.0])
    assert math.isnan(Projections(sae).result()["s_dec"])
    for value in (-3.0, 0.0, 1e-3, -1e9):
        projections = Projections(sae)
        projections.update(torch.tensor([[value]]))
        assert projections.result()["s_dec"] == pytest.approx(value, rel=0.006)


def test_every_eighth_position_of_long_sequences_is_projected() -> None:
    device = torch.device("cpu")
    assert some_positions(torch.Size([3, 128]), device).sum() == 3 * 16
    assert some_positions(torch.Size([3, 10]), device).all()
