"""Trials of several seeds: when they have collapsed, what is stored of them, and which differences are real."""

from __future__ import annotations

import math
import random
from pathlib import Path
from statistics import NormalDist

import pytest
from _stores import grid_spec
from _worker_kit import HOOK, Trainer, start

from saeopt.config.stopping import Collapse
from saeopt.search.collapse import violations, why_all_collapsed, why_collapsed
from saeopt.search.noise import pooled
from saeopt.search.pareto import Point
from saeopt.spread import over_seeds
from saeopt.training.plan import TrialPlan
from saeopt.trials.attributes import evaluation_attributes, evaluation_of
from saeopt.trials.storage import Store
from saeopt.views.best import find_best, load_points


def row(*seeds: tuple[float, float]) -> dict[str, float]:
    return over_seeds([{"l0": l0, "fvu": fvu, "fraction_dead": 0.1} for l0, fvu in seeds])


def test_an_sae_has_collapsed_as_soon_as_one_seed_has() -> None:
    rule, half = Collapse(), row((40.0, 0.1), (0.1, 0.99))
    assert why_collapsed(rule, row((40.0, 0.1), (39.0, 0.12))) is None
    assert why_collapsed(rule, half) == "L0 0.1 is below 0.5 in one of 2 seeds or more"
    assert half["l0"] > 20  # its mean looks well
    assert violations(rule, {"h": half})["min_l0"] == pytest.approx(math.log(5))
    assert why_all_collapsed(rule, {"h": half, "g": row((40.0, 0.1), (40.0, 0.1))}) is None
    assert why_collapsed(rule, row((40.0, 0.1), (40.0, math.nan))) is not None


def test_all_that_is_known_of_the_seeds_comes_back_from_the_attributes() -> None:
    told = {"h": {**row((40.0, 0.1), (0.1, 0.99), (20.0, 0.2)), "found_again": 0.5, "seeds": {"0": {"l0": 40.0}}}}
    stored = evaluation_attributes(told)
    found = evaluation_of(stored)["h"]
    for name in ("l0", "fvu", "n_seeds", "l0_std", "fvu_std", "l0_min", "fvu_max", "found_again"):
        assert found[name] == pytest.approx(told["h"][name], rel=1e-4), name
    assert stored["fvu_std"] == pytest.approx(told["h"]["fvu_std"], rel=1e-4)  # a column of the dashboard
    assert "seeds/h" not in evaluation_attributes({"h": {"l0": 1.0, "fvu": 0.1}})


def point(label: str, l0: float, fvu: float, std: float, n: int = 3) -> Point:
    return Point(label, {"l0": l0, "fvu": fvu, "fvu_std": std, "l0_std": 0.0, "n_seeds": n}, "h")


def test_the_noise_is_pooled_and_a_difference_is_real_beyond_it() -> None:
    a, b = point("#1", 20, 0.100, 0.003, 3), point("#2", 20, 0.110, 0.001, 2)
    noise = pooled([a, b], "fvu")
    assert noise is not None
    assert noise.freedom == 3
    assert noise.deviation == pytest.approx(math.sqrt((2 * 0.003**2 + 0.001**2) / 3))
    t = 3.182446  # of a table of Student's t, 3 degrees of freedom, two-sided 95 %
    assert noise.margin(a, b) == pytest.approx(t * noise.deviation * math.sqrt(1 / 3 + 1 / 2), rel=1e-6)
    assert noise.really_better(a, b) == (noise.margin(a, b) < 0.010) is True
    assert not noise.really_better(b, a)
    assert not noise.really_better(a, point("#3", 20, 0.1 + 0.99 * noise.margin(a, a), 0.001))
    up = pooled([Point("x", {"cosine": 0.9, "cosine_std": 0.01, "n_seeds": 3})] * 2, "cosine")
    assert up is not None
    low, high = (Point("x", {"cosine": c, "n_seeds": 3}) for c in (0.5, 0.9))
    assert up.really_better(high, low)
    assert not up.really_better(low, high)
    assert pooled([Point("x", {"fvu": 0.1})], "fvu") is None


def test_of_equal_saes_one_pair_in_twenty_is_called_different() -> None:
    rng, draw = random.Random(0), NormalDist(0.2, 0.01)
    called = 0
    for _ in range(2000):
        pair = [row(*((20.0, draw.inv_cdf(rng.random())) for _ in range(3))) for _ in range(2)]
        a, b = (Point(str(i), metrics) for i, metrics in enumerate(pair))
        noise = pooled([a, b], "fvu")
        assert noise is not None
        called += noise.really_better(a, b) or noise.really_better(b, a)
    assert 70 <= called <= 130  # 100 ± 3 standard deviations


def test_best_names_what_it_cannot_tell_apart() -> None:
    points = [
        point("#1", 18, 0.100, 0.001), point("#2", 20, 0.1005, 0.001), point("#3", 22, 0.150, 0.001),
        point("#4", 40, 0.050, 0.001), point("#5", 45, 0.0505, 0.001),
    ]  # fmt: skip
    (found,) = find_best(points)
    assert [p.label for p in found.front] == ["#1", "#4"]
    assert {span: [p.label for p in close.points] for span, close in found.close.items()} == {
        (16, 32): ["#2"], (32, 64): ["#5"],
    }  # fmt: skip
    assert [p.label for p in found.unbeaten] == ["#2", "#5"]
    (alone,) = find_best([Point(p.label, {"l0": p["l0"], "fvu": p["fvu"]}, "h") for p in points])
    assert (alone.close, alone.unbeaten) == ({}, [])


def test_a_worker_stores_means_and_prunes_what_collapses_in_one_seed(tmp_path: Path) -> None:
    spec = grid_spec(2, seeds=2, output_dir=str(tmp_path))
    store = Store.open(f"sqlite:///{tmp_path}/s.db")

    def measure(plan: TrialPlan, samples: int) -> dict[str, float]:
        assert plan.config.seeds == 2
        bad = plan.name == "1"
        return row((20.0, 0.2), (0.1 if bad else 22.0, 0.9 if bad else 0.3))

    start(store, spec, Trainer(measure)).run()
    trials = store.study(spec.name).trials
    assert trials[1].state.name == "PRUNED"
    assert trials[1].user_attrs["reason"].startswith(f"collapsed: {HOOK}: L0 0.1 is below 0.5 in one of 2 seeds")
    points, _ = load_points(store, spec.name)
    good = next(p for p in points if p.label == "#0")
    assert (good["l0"], good["fvu"], good["n_seeds"]) == (21.0, 0.25, 2)
    assert good["fvu_std"] == pytest.approx(0.1 / math.sqrt(2), rel=1e-4)
