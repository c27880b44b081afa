"""Objective values, collapse, dominance."""

from __future__ import annotations

import math

import pytest
from _stores import grid_spec

from saeopt.config.stopping import Collapse
from saeopt.errors import UserError
from saeopt.search.collapse import rule_of, violations, why_all_collapsed, why_collapsed
from saeopt.search.objectives import directions, objective_names, objective_values
from saeopt.search.pruning import MAX_REPORTS, at, dominated, is_due, parse_curve

A, B = "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"
EVALUATION = {A: {"l0": 10.0, "fvu": 0.2, "ce_recovered": 0.9}, B: {"l0": 30.0, "fvu": 0.4, "ce_recovered": 0.7}}


def values(*objectives: object) -> list[float] | None:
    return objective_values(grid_spec(objectives=list(objectives)), EVALUATION)


def test_objectives_are_means_over_hook_points_or_single_ones() -> None:
    assert values("l0", "explained_variance") == pytest.approx([20.0, 0.7])
    assert values({"metric": "l0", "hook_points": B}) == [30.0]
    assert values({"metric": "l0", "hook_points": [A]}) == [10.0]
    assert values("kl") is None
    assert values({"metric": "l0", "hook_points": "elsewhere"}) is None


def test_all_hook_points_become_objectives_of_their_own() -> None:
    spec = grid_spec(objectives=[{"metric": "fvu", "hook_points": "all"}])
    assert objective_names(spec) == [f"fvu@{B}"]
    assert directions(spec) == ["minimize"]
    patterns = spec.model_copy(update={"base": spec.base | {"saes": {"sae_positions": ["blocks.*.hook_resid_pre"]}}})
    with pytest.raises(UserError, match="without patterns"):
        objective_names(patterns)


def test_a_target_l0_costs_what_the_formula_says() -> None:
    objective = {"metric": "ce_recovered", "target_l0": 10, "l0_tolerance": 0.1, "l0_weight": 0.5}
    cost = 0.5 * (math.log(3) - math.log(1.1))
    assert values(objective) == pytest.approx([(0.9 + 0.7 - cost) / 2])
    assert directions(grid_spec(objectives=[objective])) == ["maximize"]


def test_values_are_plain_floats() -> None:
    numpy = pytest.importorskip("numpy")
    found = objective_values(grid_spec(objectives=["l0"]), {A: {"l0": numpy.float32(3)}})
    assert found == [3.0]
    assert type(found[0]) is float


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"l0": 0.4, "fvu": 0.5}, "L0"),
        ({"l0": 5.0, "fvu": 1.0}, "FVU"),
        ({"l0": 5.0, "fvu": float("nan")}, "NaN"),
        ({"l0": 5.0}, "missing"),
        ({"l0": 5.0, "fvu": 0.5, "fraction_dead": 1.0}, "dead"),
    ],
)
def test_what_has_collapsed(row: dict[str, float], word: str) -> None:
    rule = Collapse()
    assert word in (why_collapsed(rule, row) or "")
    assert word in (why_all_collapsed(rule, {A: row}) or "")
    assert max(violations(rule, {A: row}).values()) > 0
    assert why_all_collapsed(rule, {A: row, B: {"l0": 5.0, "fvu": 0.5}}) is None
    assert why_all_collapsed(rule, {}) is None


def test_a_studys_own_rule_holds_and_the_default_where_it_stops_nothing() -> None:
    own = rule_of(grid_spec(early_stopping={"collapse": {"min_l0": 3, "max_fvu": 0.7}}))
    assert why_collapsed(own, {"l0": 2.0, "fvu": 0.2})
    assert rule_of(grid_spec(early_stopping={"collapse": None})) == Collapse()


def test_violations_are_at_most_zero_exactly_where_nothing_has_collapsed() -> None:
    rule = Collapse(min_l0=1.0, max_fvu=0.9)
    assert max(violations(rule, EVALUATION).values()) <= 0
    assert violations(rule, {A: {"l0": math.exp(-2), "fvu": 0.5}})["min_l0"] == pytest.approx(2.0)
    assert violations(rule, {A: {"l0": 2.0, "fvu": 0.9}})["max_fvu"] > 0
    assert violations(rule, {A: {"l0": 0.0, "fvu": float("inf")}}) == {"min_l0": 10.0, "max_fvu": 10.0}


def test_dominance_needs_a_margin_in_every_objective() -> None:
    down_up = [False, True]
    assert dominated([20.0, 0.5], [10.0, 0.9], down_up, 0.1)
    assert not dominated([20.0, 0.5], [19.0, 0.9], down_up, 0.1)
    assert not dominated([20.0, 0.5], [10.0, 0.4], down_up, 0.1)


def test_curves_are_compared_at_the_same_budget() -> None:
    curve = parse_curve({"10": [1.0], "20": [2.0]})
    assert (at(curve, 9), at(curve, 10), at(curve, 19), at(curve, 99)) == (None, [1.0], [1.0], [2.0])


@pytest.mark.parametrize("total", [7, 50, 1000, 99_999])
def test_there_are_at_most_fifty_reports(total: int) -> None:
    sent, last = 0, 0
    for samples in range(1, total + 1):
        if is_due(last, samples, total):
            sent, last = sent + 1, samples
    assert sent <= MAX_REPORTS
    assert last == total
