"""The largest of a micro-batch, found piece by piece, are those of a sort."""

from __future__ import annotations

import pytest
import torch

from saeopt.training.step.sparse import Largest


@pytest.mark.parametrize("kind", ["noise", "rising", "ties", "constant", "few are positive", "none is positive"])
@pytest.mark.parametrize("wanted", [0, 1, 40, 700, 10**6])
def test_it_is_a_sort_whatever_the_order(kind: str, wanted: int) -> None:
    pieces = torch.randn(50, 8, 30, generator=torch.Generator().manual_seed(0))
    if kind == "rising":
        pieces = pieces.view(-1).sort().values.view_as(pieces)
    elif kind == "ties":
        pieces = pieces.round()
    elif kind == "constant":
        pieces = torch.ones_like(pieces)
    elif kind != "noise":
        pieces -= 3 if kind == "few are positive" else 30
    best, most = Largest(wanted), 0
    for piece in pieces:
        best.offer(piece)
        most = max(most, best.count)
    values, places = best.found()
    flat = pieces.view(-1)
    expected = flat.sort(descending=True).values[:wanted]
    assert torch.equal(values.sort(descending=True).values, expected[expected > 0])
    assert torch.equal(flat[places], values)
    assert torch.equal(places, places.unique())
    assert most <= 2 * wanted


def test_what_is_not_a_number_is_never_lost() -> None:
    best = Largest(2)
    for piece in ([1.0, 5.0, 2.0], [float("nan"), 4.0, 3.0], [9.0, 6.0, 7.0]):
        best.offer(torch.tensor(piece))
    values, places = best.found()
    assert torch.isnan(values[0])
    assert places.tolist() == [3, 6]
