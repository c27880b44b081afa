"""Which parameters mattered, on functions whose answer is known, and in studies of several hook points."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _stores import grid_spec
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from rich.console import Console

from saeopt.errors import UserError
from saeopt.search.importance import Importances, Tried, importances
from saeopt.trials import claims, endings
from saeopt.trials.attributes import evaluation_attributes
from saeopt.trials.create import create_study
from saeopt.trials.storage import Store
from saeopt.views import importance as views
from saeopt.views.best import load_points

UNIT = FloatDistribution(0.0, 1.0)
KIND = CategoricalDistribution(["relu", "topk"])


def drawn(function: Callable[[dict[str, Any]], float], n: int, **kinds: BaseDistribution) -> Importances:
    chance, tried = random.Random(0), []
    for _ in range(n):
        params: dict[str, Any] = {
            name: chance.choice(kind.choices) if isinstance(kind, CategoricalDistribution) else chance.random()
            for name, kind in kinds.items()
        }
        tried.append(Tried(params, function(params)))
    return importances(tried, kinds)


def test_the_shares_of_a_sum_are_the_variances_of_its_terms() -> None:
    """Var(a + b / 2) with a, b uniform: 4 parts of 5 and 1 of 5; c is in it with nothing."""
    found = drawn(lambda p: p["a"] + 0.5 * p["b"], 100, a=UNIT, b=UNIT, c=UNIT)
    assert list(found.shares)[:2] == ["a", "b"]
    assert found.shares["a"] == pytest.approx(0.8, abs=0.08)
    assert found.shares["b"] == pytest.approx(0.2, abs=0.08)
    assert found.shares["c"] < 0.02


def test_the_parameter_that_decides_a_grid_is_first() -> None:
    """A tenth of the variance lies between the values of k, and in lr the rest."""
    lists = {"k": CategoricalDistribution([8, 16, 24, 32]), "lr": CategoricalDistribution([1e-5, 5e-3])}
    tried = [
        Tried({"k": k, "lr": lr}, (0.8 if lr < 1e-4 else 0.2) - k / 200) for k in (8, 16, 24, 32) for lr in (1e-5, 5e-3)
    ]
    found = importances(tried * 2, lists)
    assert list(found.shares) == ["lr", "k"]
    assert found.shares["lr"] > 0.85


def test_what_two_parameters_do_only_together_is_neither_ones_share() -> None:
    found = drawn(lambda p: float((p["kind"] == "relu") == (p["other"] == "relu")), 60, kind=KIND, other=KIND)
    assert max(found.shares.values()) < 0.15  # nearly: sixty trials are not spread evenly
    assert found.together > 0.75


def test_a_conditional_parameter_counts_where_it_exists() -> None:
    """k exists for topk alone and decides there; whether there is a k is what the architecture decides."""

    def tried(gap: float) -> list[Tried]:
        chance, found = random.Random(1), []
        for i in range(80):
            k = chance.random()
            topk = {"kind": "topk", "k": k, "noise": chance.random()}
            params = topk if i % 2 else {"kind": "relu", "noise": chance.random()}
            found.append(Tried(params, k if i % 2 else 0.5 + gap))
        return found

    kinds = {"kind": KIND, "k": UNIT, "noise": UNIT}
    alike, apart = importances(tried(0.0), kinds), importances(tried(3.0), kinds)
    assert next(iter(alike.shares)) == "k"
    assert next(iter(apart.shares)) == "kind"
    assert apart.shares["kind"] > 0.9
    assert alike.shares["noise"] < 0.1


@pytest.mark.parametrize(
    ("tried", "reason"),
    [
        ([Tried({"a": 0.1 * i}, float(i)) for i in range(5)], "too few trials: 5 of at least 10"),
        ([Tried({"a": 0.1 * i}, float("nan")) for i in range(20)], "too few trials: 0 of"),
        ([Tried({"a": 0.5}, float(i)) for i in range(20)], "no parameter varies"),
        ([Tried({"a": 0.05 * i}, 1.0) for i in range(20)], "all trials have the same value"),
    ],
)
def test_where_nothing_can_be_said_one_line_says_why(tried: list[Tried], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as raised:
        importances(tried, {"a": UNIT})
    assert "\n" not in str(raised.value)


def test_each_hook_point_and_objective_has_shares_of_its_own(tmp_path: Path) -> None:
    """At one hook point lr decides the FVU, at the other the seed; CE recovered was measured for four trials."""
    store, hooks = Store.open(f"sqlite:///{tmp_path}/store.db"), ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]
    base = grid_spec(1).base
    base = base | {"saes": base["saes"] | {"sae_positions": hooks}}
    space = {"lr": [1e-3, 2e-3, 3e-3, 4e-3], "seed": [0, 1, 2, 3]}
    there = {"metric": "cosine", "hook_points": hooks[1]}
    spec = grid_spec(1, base=base, space=space, objectives=["fvu", "ce_recovered", there], output_dir=str(tmp_path))
    study_id = create_study(store, spec).study_id
    for claim in claims.claim(store, study_id, 16, {"worker": "w"}):
        decides = {hooks[0]: claim.params["lr"] * 100, hooks[1]: claim.params["seed"] / 10}
        evaluation = {hook: {"l0": 20.0, "fvu": 0.1 + v, "cosine": 0.9 - v} for hook, v in decides.items()}
        if claim.number < 4:
            for row in evaluation.values():
                row["ce_recovered"] = 0.9
        attrs = evaluation_attributes(evaluation)
        assert endings.finish(store, claim, "COMPLETE", [0.2, 0.9, 0.9], attrs=attrs)
    found = views.find_importances(store, spec.name, *load_points(store, spec.name))
    store.close()
    told = views.as_json(found)
    assert list(told) == hooks
    assert [next(iter(told[hook]["fvu"]["shares"])) for hook in hooks] == ["lr", "seed"]
    assert [list(told[hook]) for hook in hooks] == [["fvu", "ce_recovered"], ["fvu", "ce_recovered", "cosine"]]
    assert told[hooks[0]]["ce_recovered"] == {"reason": "too few trials: 4 of at least 10 have a value"}
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    console.print(views.importance_tables(found))
    shown = console.export_text()
    assert "share of the variance of 16 SAEs" in shown
    assert "importances for ce_recovered: too few trials: 4 of at least 10" in shown
