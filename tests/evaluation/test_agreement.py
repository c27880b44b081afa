"""How far the seeds of an SAE agree, worked out by hand; and what a row over seeds holds."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from saeopt.evaluation import agreement as module
from saeopt.evaluation.agreement import agreement, found_again, matched
from saeopt.spread import over_seeds, worst

X, Y, Z = torch.eye(3, dtype=torch.float64)


def at(cosine: float, from_: torch.Tensor = X, to: torch.Tensor = Y) -> torch.Tensor:
    return cosine * from_ + math.sqrt(1 - cosine**2) * to


def rows(*vectors: torch.Tensor) -> torch.Tensor:
    return torch.stack(vectors)


def test_a_latent_is_found_again_above_a_cosine_of_nine_tenths_both_ways() -> None:
    a, b = rows(X, Y, Z), rows(at(0.95), at(0.85, Z, Y), -Z, at(0.97, X, Z))
    # X is in b twice, Y and Z are not (0.53 with the second, -Z is no Z); of b the first and the last are in a
    assert found_again(a, b) == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert found_again(a, b, signed=False) == pytest.approx((2 / 3 + 3 / 4) / 2)


def test_the_matching_is_one_to_one_and_what_is_left_counts_nothing() -> None:
    a, b = rows(X, at(0.9)), rows(at(0.99), Y, Z)
    cos = a @ b.T
    best = max(float(cos[0, i] + cos[1, j]) for i, j in permutations(range(3), 2))
    assert matched(a, b) == matched(b, a) == pytest.approx(best / 3)
    assert best < float(cos.amax(1).sum())  # both would rather have the first


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (torch.nn.functional.normalize(torch.randn(50, 4), dim=-1) for _ in range(2))
    whole = found_again(a, b)
    monkeypatch.setattr(module, "_BLOCK", 7 * 50)
    assert found_again(a, b) == whole > 0


def test_dead_latents_are_no_latents_and_pairs_are_averaged() -> None:
    a, b, c = rows(X, Y, Z), rows(X, Y, -Z), rows(X, -Y, Z)
    everywhere = [torch.ones(3)] * 3
    found = agreement([a, b, c], everywhere)
    assert found["found_again"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)
    assert found["pw_mcc"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)  # a row and its opposite do not match
    fired = [torch.tensor([9.0, 1, 0]), torch.tensor([3.0, 1, 0])]
    assert agreement([a, b], fired) == {"found_again": 1.0, "pw_mcc": 1.0}
    none = torch.zeros(3)
    assert agreement([a, b], [fired[0], none]) == {"found_again": 0.0, "pw_mcc": 0.0}
    assert all(math.isnan(value) for value in agreement([a, b], [none, none]).values())


def test_a_large_dictionary_is_matched_on_request_only() -> None:
    a = [torch.eye(4)] * 2
    fired = [torch.ones(4)] * 2
    assert agreement(a, fired, most=3) == {"found_again": 1.0}
    assert agreement(a, fired, most=None) == {"found_again": 1.0, "pw_mcc": 1.0}


def test_a_row_over_seeds_holds_means_spreads_and_the_worst() -> None:
    each = [
        {"l0": 8.0, "fvu": 0.2, "fraction_dead": 0.0, "finite": True, "n_tokens": 5, "log10_density": hist(1, 3)},
        {"l0": 8.0, "fvu": 0.5, "fraction_dead": 0.5, "finite": False, "n_tokens": 5, "log10_density": hist(3, 5)},
    ]
    row = over_seeds(each)
    assert row == {
        "l0": 8.0, "fvu": 0.35, "fraction_dead": 0.25, "finite": False, "n_tokens": 5, "log10_density": hist(2, 4),
        "l0_min": 8.0, "fvu_max": 0.5, "fraction_dead_max": 0.5, "n_seeds": 2,
        "l0_std": 0.0, "fvu_std": pytest.approx(0.3 / math.sqrt(2)), "fraction_dead_std": pytest.approx(0.5 / 2**0.5),
    }  # fmt: skip
    assert {k: worst(row)[k] for k in ("l0", "fvu", "fraction_dead")} == {"l0": 8.0, "fvu": 0.5, "fraction_dead": 0.5}
    assert over_seeds(each[:1]) == each[0]
    broken = over_seeds([each[0], {**each[1], "fvu": math.nan}])
    assert math.isnan(broken["fvu"])
    assert math.isnan(broken["fvu_max"])


def hist(*counts: float) -> dict[str, list[float]]:
    return {"edges": [0.0, 1.0, 2.0], "counts": list(counts)}
