"""scripts/compare_target_l0.py: what it trains, and what it makes of the numbers."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import compare_target_l0


def test_every_target_and_every_λ_of_the_front_is_trained_with_every_seed_on_other_documents_than_are_held_out(
    tmp_path, monkeypatch
):
    line = f"x --model m --data d --out {tmp_path} --l0 8 16 --seeds 1 2 --front relu=0.1,0.2,0.4 --set lr=0.002"
    monkeypatch.setattr(sys, "argv", line.split())
    given = compare_target_l0.options()
    found = list(compare_target_l0.jobs(given, "relu"))
    assert len(found) == 2 * (2 + 3)
    for what, config in found:
        assert (config.seed, config.lr, config.recipe) == (what["seed"], 0.002, 3)
        assert config.saes.target_l0 == what.get("target_l0")
        assert config.saes.sparsity_coeff == what.get("sparsity_coeff", config.saes.sparsity_coeff)
        assert (config.data.split, config.data.eval_split) == ("train[100:1000]", "train[0:100]")


def test_fvu_is_compared_with_the_front_of_the_same_seed_at_the_l0_that_came_out():
    rows = []
    for seed, scale in ((1, 1.0), (2, 1.1)):  # fronts FVU = scale / L0, which are straight in the logarithms
        rows += [
            {"type": "relu", "seed": seed, "sparsity_coeff": λ, "l0": l0, "fvu": scale / l0}
            for λ, l0 in ((0.4, 5.0), (0.2, 10.0), (0.1, 40.0))
        ]
        own = {"type": "relu", "seed": seed, "fraction_dead": 0.0}
        rows.append({**own, "target_l0": 20.0, "l0": 20.8, "fvu": 1.02 * scale / 20.8})
        rows.append({**own, "target_l0": 60.0, "l0": 60.0, "fvu": 0.01})
    inside, beyond = compare_target_l0.above_front(rows)
    assert inside["l0_off"] == pytest.approx([0.04, 0.04])
    assert inside["fvu_above"] == pytest.approx([0.02, 0.02])
    assert inside["front_spread"] == pytest.approx(0.1)
    assert all(map(math.isnan, beyond["fvu_above"]))  # the front is not drawn on beyond its ends
    assert "| relu | 20 | +4.0 … +4.0 | +2.0 (10.0) | yes yes |" in compare_target_l0.table([inside])
