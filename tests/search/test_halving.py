"""The ranking at a rung, where rungs lie, what `create` says and refuses, and what older versions see."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from _stores import grid_spec

from saeopt.config.study import StudySpec
from saeopt.errors import UserError
from saeopt.search.halving import Ranking, Standing, gains, held_out, rungs_in_samples
from saeopt.search.ranking import hypervolume
from saeopt.search.stopping import stopping_text, why_never

HOOKS = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]


def spec_of(objectives: list[Any], hooks: list[str] | None = None, **rule: Any) -> StudySpec:
    base = grid_spec(1).base
    base = {**base, "saes": {**base["saes"], "sae_positions": hooks or HOOKS[:1]}}
    early = {"type": "halving", **rule}
    return grid_spec(8, base=base, objectives=objectives, early_stopping=early)


def standings(*values: Any) -> list[Standing]:
    return [Standing(number, row) for number, row in enumerate(values)]


def test_whom_nobody_dominates_goes_on_however_many_they_are() -> None:
    ranking = Ranking(spec_of(["l0", "fvu"], keep=0.2))
    front = [(10.0, 0.4), (20.0, 0.3), (30.0, 0.2), (40.0, 0.1)]
    found = ranking.verdicts(standings(*front, (25.0, 0.35)), range(5))
    assert list(found) == [4]
    assert found[4] == "place 5 of 5, of which 1 goes on: trial 1 is ahead (l0 20 against 25, fvu 0.3 against 0.35)"


def test_keep_is_a_floor_for_the_others_by_fronts_and_then_by_hypervolume() -> None:
    ranking = Ranking(spec_of(["l0", "fvu"], keep=0.6))
    rows = standings((10.0, 0.1), (20.0, 0.2), (12.0, 0.25), (21.0, 0.19), (40.0, 0.9))
    assert ranking.order(rows)[0] == 0
    assert set(ranking.order(rows)[1:4]) == {1, 2, 3}
    assert ranking.order(rows)[1] == 2, "it adds most to the second front"
    assert sorted(ranking.verdicts(rows, range(5))) == sorted(ranking.order(rows)[3:])


def test_one_objective_keeps_the_best_share_and_ties_lose_to_nobody() -> None:
    ranking = Ranking(spec_of(["explained_variance"], keep=0.5))
    found = ranking.verdicts(standings((0.9,), (0.7,), (0.8,), (0.6,)), range(4))
    assert sorted(found) == [1, 3]
    assert "trial 0 is ahead (explained_variance 0.9 against 0.7)" in found[1]
    assert ranking.verdicts(standings((0.9,), (0.9,), (0.9,)), range(3)) == {}


def test_a_trial_goes_on_where_one_hook_point_is_among_the_best() -> None:
    ranking = Ranking(spec_of([{"metric": "fvu", "hook_points": "all"}], HOOKS, keep=0.3))
    found = ranking.verdicts(standings((0.1, 0.9), (0.9, 0.1), (0.5, 0.5)), range(3))
    assert sorted(found) == [2]


def test_the_collapsed_come_last_and_are_nobodys_measure() -> None:
    ranking = Ranking(spec_of(["l0", "fvu"], keep=0.3))
    found = ranking.verdicts(standings(None, (10.0, 0.5), None), range(3))
    assert sorted(found) == [0, 2]
    assert "collapsed" in found[0]
    assert ranking.verdicts(standings(None, None), range(2)) == {}, "with nobody ahead of them they go on"


def test_only_those_asked_for_are_judged_but_all_are_counted() -> None:
    ranking = Ranking(spec_of(["fvu"], keep=0.5))
    assert sorted(ranking.verdicts(standings((0.1,), (0.2,), (0.3,), (0.4,)), [1, 3])) == [3]


def test_rungs_are_whole_windows_before_the_end() -> None:
    rule = spec_of(["fvu"], rungs=[0.1, 0.3, 0.99]).early_stopping
    assert rungs_in_samples(rule, 600, 8) == (64, 184)
    assert rungs_in_samples(spec_of(["fvu"]).early_stopping, 1000, 10) == (100, 300)
    geometric = spec_of(["fvu"], min_share=0.1, reduction_factor=2).early_stopping
    assert geometric.shares == [0.1, 0.2, 0.4, 0.8]


def test_create_says_what_is_compared_where() -> None:
    text = stopping_text(spec_of(["fvu"], rungs=[0.25]))
    assert text is not None
    assert text.startswith("halving compares fvu at 25% (16 samples), as training measures it;")
    measured = spec_of(["fvu", "cosine"], rung_eval_samples=24)
    held = measured.base["data"]["n_eval_samples"]
    assert f"on {min(24, held)} held-out samples there" in (stopping_text(measured) or "")
    more = spec_of(["fvu", "cosine"], rung_eval_samples=held + 1)
    assert f"on {held} held-out samples there" in (stopping_text(more) or ""), "no more than there are"
    assert "at 0.1% (1 samples)" in (stopping_text(spec_of(["fvu"], rungs=[0.001])) or ""), "not 0% (0 samples)"
    assert (held_out(measured), held_out(spec_of(["fvu"]))) == (24, 0)


@pytest.mark.parametrize(
    ("fields", "n_trials", "said"),
    [
        ({"keep": 1.0}, 8, "'keep' is 1: everybody goes on"),
        ({}, 1, "there is one trial, and nobody to compare it with"),
        ({"rungs": [0.99]}, 8, "no rung lies before the end of 64 samples"),
    ],
)
def test_what_can_never_pause_anybody_is_refused(fields: dict[str, Any], n_trials: int, said: str) -> None:
    assert said in (why_never(spec_of(["fvu"], **fields), n_trials) or "")
    assert why_never(spec_of(["fvu"]), 8) is None


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"type": "halving", "rungs": [0.3, 0.1]}, "'rungs' must rise"),
        ({"type": "halving", "rungs": [0.3], "min_share": 0.1}, "'rungs' or 'min_share', not both"),
        ({"type": "pareto", "keep": 0.5}, "'keep' belongs to 'type: halving'"),
        ({"type": "halving", "rungs": [1.0]}, "rungs"),
        ({"type": "halving", "rungs": []}, "'early_stopping.rungs': must have at least 1 item, not 0"),
        ({"type": "halving", "warmup": 0.3}, "'warmup' does not belong to 'type: halving', which has 'rungs'"),
        ({"type": "halving", "n_startup_trials": 2}, "'n_startup_trials' does not belong to 'type: halving'"),
        ({"type": "halving", "margin": 0.3}, "'margin' does not belong to 'type: halving', which has 'keep'"),
        ({"type": "halving", "reduction_factor": 4}, "'reduction_factor' needs 'min_share'"),
    ],
)
def test_a_rule_that_contradicts_itself_is_refused(rule: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        grid_spec(8, early_stopping=rule)


def test_older_versions_refuse_a_study_with_rungs_and_read_all_others() -> None:
    plain = json.loads(grid_spec(4).to_json())
    assert plain["format"] == 1, "what older versions know they go on reading"
    assert not {"rungs", "min_share", "keep", "rung_eval_samples", "keep_paused"} & set(plain["early_stopping"])
    rungs = spec_of(["fvu"], rungs=[0.5]).to_json()
    assert json.loads(rungs)["format"] == 2, "an older version says in one line that a newer one is needed"
    again = StudySpec.from_json(rungs)
    assert (again.early_stopping.rungs, again.to_json()) == ([0.5], rungs)
    with pytest.raises(UserError, match="the study's format is 3, this version knows 2: use a newer one"):
        StudySpec.from_json(rungs.replace('"format": 2', '"format": 3'))


def test_what_a_point_adds_to_a_front_is_the_volume_that_it_alone_dominates() -> None:
    front = np.array([[0.0, 1.0], [0.2, 0.7], [0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])[[3, 0, 4, 1, 2]]
    whole = hypervolume(front.tolist(), [1.1, 1.1])
    expected = [whole - hypervolume(np.delete(front, i, axis=0).tolist(), [1.1, 1.1]) for i in range(len(front))]
    assert gains(front) == pytest.approx(expected)
