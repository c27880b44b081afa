"""Constraints besides collapse: what they accept, what samplers learn, and that no front holds what violates them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from _worker_kit import HOOK, Trainer, spec_in, start, states

from saeopt.console import console
from saeopt.errors import UserError
from saeopt.search.constraints import violations, why_trial_infeasible
from saeopt.search.samplers import make_sampler
from saeopt.training.plan import TrialPlan, TrialResult
from saeopt.trials import internals as db
from saeopt.trials.growth import ended_rows
from saeopt.trials.storage import Store
from saeopt.views import best, status
from saeopt.views.why import explained

RULES = {"fraction_dead": "<= 0.1", "cosine": ">= 0.5", "memory_gib": "<= 8"}


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({"fraction_daed": "<= 0.1"}, r"'constraints': unknown metric 'fraction_daed'; did you mean 'fraction_dead'"),
        ({"lr": "<= 0.1"}, r"unknown metric 'lr'"),
        ({"fraction_dead": 0.1}, r"'fraction_dead' must be '<= NUMBER' or '>= NUMBER' \(got '0\.1'\)"),
        ({"fraction_dead": "<= nan"}, r"'fraction_dead' must be '<= NUMBER'"),
        ({"fraction_dead": "<= much"}, r"'fraction_dead' must be '<= NUMBER'"),
        ({"found_again": ">= 0.5"}, r"'constraints': 'found_again' is measured between seeds: give 'seeds'"),
    ],
)
def test_what_is_no_constraint_is_refused_in_one_line(
    tmp_path: Path, constraints: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        spec_in(tmp_path, constraints=constraints)
    assert "\n" not in str(caught.value)


def test_how_far_a_trial_is_beyond_its_constraints_by_hand(tmp_path: Path) -> None:
    spec = spec_in(tmp_path, constraints=RULES)
    rows = {"a": {"fraction_dead": 0.05, "cosine": 0.9}, "b": {"fraction_dead": 0.3, "cosine": 0.4}}
    found = violations(spec, rows, {"memory_gib": 6.0})
    assert found == pytest.approx({"fraction_dead": 2.0, "cosine": 0.2, "memory_gib": -0.25})
    assert why_trial_infeasible(spec, rows, {"memory_gib": 6.0}) == (
        "b: fraction_dead 0.3 is above 0.1; cosine 0.4 is below 0.5"
    )
    assert violations(spec, {"a": {"fraction_dead": float("nan")}}, {}) == dict.fromkeys(RULES, 10.0)


class Costly(Trainer):
    """Its trials need as many GiB as their numbers say."""

    def __call__(self, plans: Any, observer: Any) -> dict[str, TrialResult]:
        results = super().__call__(plans, observer)
        for name, result in results.items():
            result.cost = {"parameters": 100, "memory_gib": float(name)}
        return results


def measure(plan: TrialPlan, samples: int) -> dict[str, float]:
    """Trial 1 has dead latents, and would be the best of all."""
    number = int(plan.name)
    dead, fvu = (0.5, 0.1) if number == 1 else (0.0, 0.2 + number / 100)
    return {"l0": 20.0, "fvu": fvu, "fraction_dead": dead, "cosine": 0.9}


def test_what_violates_a_constraint_is_told_and_is_on_no_front(store_address: str, tmp_path: Path) -> None:
    spec = spec_in(tmp_path, 4, constraints={"fraction_dead": "<= 0.1", "memory_gib": "<= 2"})
    store = Store.open(store_address)
    start(Store.open(store_address), spec, Costly(measure)).run()
    assert states(store) == ["COMPLETE"] * 4
    study = store.study("s")
    assert [t.number for t in study.best_trials] == [0]
    assert [t.user_attrs.get("infeasible") for t in study.trials] == [
        None, f"{HOOK}: fraction_dead 0.5 is above 0.1", None, f"{HOOK}: memory_gib 3 is above 2",
    ]  # fmt: skip
    assert study.trials[3].user_attrs["memory_gib"] == 3
    with store.read() as connection:
        assert db.infeasible(connection, store.study_id("s")) == {
            t._trial_id for t in study.trials if t.number in (1, 3)
        }
        assert [row is None for row in ended_rows(connection, store.study_id("s"))] == [False, True, False, True]

    points, trials = best.load_points(store, "s")
    (found,) = best.find_best(points)
    assert [p.label for p in found.front] == ["#0"]
    assert (found.n, found.usable, found.collapsed, found.infeasible) == (4, 2, 0, 2)
    assert best.as_json([found], trials)[HOOK]["infeasible"] == 2
    (none,) = best.find_best([p for p in points if p.infeasible])
    with console.capture() as shown:
        console.print(best.best_tables([none], trials, command="saeopt study best s"))
    assert "no front, none of 2 SAEs is usable (0 collapsed, 2 infeasible)" in " ".join(shown.get().split())
    assert "also those that violate a constraint: saeopt study best s --infeasible" in shown.get()
    assert "L0 range" not in shown.get()
    assert "weights" not in shown.get()
    (asked,) = best.find_best(best.load_points(store, "s", infeasible=True)[0])
    assert [p.label for p in asked.front] == ["#1"]

    told = status.as_json(status.gather(store, "s"))
    assert [row["trial"] for row in told["infeasible"]] == [1, 3]
    assert [row["trial"] for row in told["front"][HOOK]] == [0]
    (why,) = explained(store, "s", 1)
    assert why.text == f"trial 1 (complete): violates a constraint: {HOOK}: fraction_dead 0.5 is above 0.1"


def test_the_best_of_one_objective_keeps_the_constraints(tmp_path: Path) -> None:
    store = Store.open(f"sqlite:///{tmp_path}/store.db")
    spec = spec_in(tmp_path, 3, constraints={"fraction_dead": "<= 0.1"}, objectives=["fvu"])
    start(store, spec, Trainer(measure)).run()
    assert status.as_json(status.gather(store, "s"))["best"]["trial"] == 0
    assert store.study("s").best_trial.number == 0


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_samplers_keep_away_from_what_violates_a_constraint(tmp_path: Path, sampler: str) -> None:
    """FVU falls with lr, and latents die with it: without the constraint every proposal is large."""

    def dying(plan: TrialPlan, samples: int) -> dict[str, float]:
        lr = plan.config.lr
        return {"l0": 20.0, "fvu": 0.5 - lr / 4, "fraction_dead": lr, "cosine": 0.9}

    store = Store.open(f"sqlite:///{tmp_path}/store.db")
    spec = spec_in(
        tmp_path,
        space={"lr": {"low": 0.001, "high": 1.0}},
        sampler={"type": sampler, "n_startup_trials": 8},
        max_trials=16,
        constraints={"fraction_dead": "<= 0.3"},
    )
    start(store, spec, Trainer(dying), pack=8).run()
    trials = store.study("s").trials
    assert len({len(t.system_attrs["constraints"]) for t in trials}) == 1
    assert any(t.user_attrs.get("infeasible") for t in trials)
    assert make_sampler(spec, 20) is not None
    assert all(t.params["lr"] <= 0.3 for t in store.study("s").best_trials)
