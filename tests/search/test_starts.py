"""The first trials of a sampled study: points that are given, and the best of another study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from _stores import grid_spec

from saeopt.config.study import StudySpec
from saeopt.errors import UserError
from saeopt.search.objectives import objective_values
from saeopt.search.ranking import ranked
from saeopt.search.rounds import n_proposed
from saeopt.search.space import Space, key_of
from saeopt.search.starts import doubles_text
from saeopt.trials import claims, endings
from saeopt.trials.attributes import evaluation_attributes
from saeopt.trials.create import create_study, planned_cells
from saeopt.trials.starts import with_starts
from saeopt.trials.storage import Store

HOOK = "blocks.1.hook_resid_pre"
SPACE: dict[str, Any] = {
    "lr": {"low": 1e-4, "high": 1e-2, "log": True},
    "sae_type": ["relu", "topk"],
    "saes.sparsity_coeff": {"low": 0.1, "high": 10, "when": {"sae_type": "relu"}},
    "saes.k": {"values": [8, 16, 32], "when": {"sae_type": "topk"}},
}


def sampled(n: int = 20, **fields: Any) -> StudySpec:
    given = {"space": SPACE, "sampler": {"type": "tpe", "n_startup_trials": 4}, "max_trials": n}
    return grid_spec(**{**given, **fields})


def test_given_points_come_first_and_the_design_fills_them() -> None:
    points = [{"sae_type": "topk", "saes.k": 16, "lr": "1e-3"}, {"sae_type": "relu"}, {"lr": 0.002}]
    cells, proposed = planned_cells(sampled(enqueue=points))
    assert cells[0].params == {"saes.sae_type": "topk", "lr": 1e-3, "saes.k": 16}
    assert cells[1].params["saes.sae_type"] == "relu"
    assert 0.1 <= cells[1].params["saes.sparsity_coeff"] <= 10
    assert cells[2].params["lr"] == 0.002
    assert (len(cells), proposed) == (4, 16)
    without, _ = planned_cells(sampled())
    assert cells[3].params == without[3].params  # given points take the place of spread ones
    again, _ = planned_cells(sampled(enqueue=points))
    assert [c.params for c in again] == [c.params for c in cells]


def test_a_point_that_stands_twice_is_one_trial_and_is_told() -> None:
    once = [{"sae_type": "topk", "saes.k": 8, "lr": 1e-3}, {"sae_type": "topk", "saes.k": 16, "lr": 1e-3}]
    spec = sampled(enqueue=[once[0], once[1], {**once[0], "lr": "1e-3"}, once[1]])
    cells, proposed = planned_cells(spec)
    assert [c.params["saes.k"] for c in cells[:2]] == [8, 16]
    assert len({key_of(c.params) for c in cells}) == len(cells) == 4  # the design fills up
    assert proposed == n_proposed(spec) == 16
    assert doubles_text(spec, Space(spec)) == "left out: 2 duplicates in 'enqueue'"
    alone = sampled(enqueue=once)
    assert doubles_text(alone, Space(alone)) is None
    assert doubles_text(sampled(), Space(sampled())) is None


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc", "nsga2", "gp"])
def test_every_sampled_study_begins_with_them(tmp_path: Path, sampler: str) -> None:
    store = Store.open(f"sqlite:///{tmp_path}/store.db")
    space = {"lr": SPACE["lr"]}
    points = [{"lr": 1e-3 * (i + 1)} for i in range(6)]
    spec = sampled(8, sampler={"type": sampler, "n_startup_trials": 2}, space=space, enqueue=points)
    made = create_study(store, spec)
    assert made.n_trials == 8
    taken = claims.claim(store, made.study_id, 6, {"worker": "w"})
    assert [c.params for c in taken] == points
    assert len({c.stream for c in taken}) == 1  # they make one pack
    if sampler in ("tpe", "nsga2", "gp"):
        assert n_proposed(spec) == 2
    store.close()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "outside": ({"enqueue": [{"lr": 0.5}]}, "'enqueue.0': 'lr': 0.5 is not in 0.0001 to 0.01"),
    "not in list": ({"enqueue": [{"sae_type": "topk", "saes.k": 9}]}, "'enqueue.0': 'saes.k': 9 is none of 8,"),
    "unknown": ({"enqueue": [{"saes.kk": 8}]}, "'saes.kk' is not in 'space'; did you mean 'saes.k'"),
    "type": ({"enqueue": [{"lr": "fast"}]}, "'enqueue.0': 'lr': "),
    "parent": ({"enqueue": [{"saes.k": 8}]}, "'saes.k' depends on 'saes.sae_type': the point must name both"),
    "condition": ({"enqueue": [{"sae_type": "relu", "saes.k": 8}]}, "'saes.k' does not exist under the other values"),
    "empty": ({"enqueue": [{}]}, "'enqueue.0'"),
    "too many": ({"enqueue": [{"lr": 1e-3}] * 3, "max_trials": 2}, "'enqueue' has 3 points, 'max_trials' is 2"),
    "grid": ({"enqueue": [{"lr": 1e-3}], "sampler": "grid"}, "'enqueue' needs a sampled study"),
    "steps": (
        {"space": {"saes.dict_size_to_input_ratio": {"low": 4, "high": 16, "step": 4}},
         "enqueue": [{"saes.dict_size_to_input_ratio": 6}]}, "is not on the steps of 4 in 4 to 16",
    ),
    "both": ({"start_from": {"study": "a", "top": 3, "front": True}}, "needs one of 'top: N' and 'front: true'"),
    "neither": ({"start_from": {"study": "a"}}, "needs one of 'top: N' and 'front: true'"),
    "start grid": ({"start_from": {"study": "a", "top": 3}, "sampler": "grid"}, "'start_from' needs a sampled study"),
    "password": (
        {"start_from": {"study": "a", "top": 1, "storage": "postgresql://u:secret@h/d"}}, "must hold no password",
    ),
    "unknown key": ({"start_from": {"studdy": "a", "top": 1}}, "unknown key 'start_from.studdy'; did you mean 'study'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_tried_first_is_refused_with_a_line(case: str) -> None:
    fields, line = REFUSED[case]
    with pytest.raises(UserError) as error:
        planned_cells(sampled(**fields))
    assert line in str(error.value)
    assert "secret" not in str(error.value)


def test_a_study_without_them_is_stored_as_before() -> None:
    assert not {"enqueue", "start_from"} & json.loads(sampled().to_json()).keys()
    spec = sampled(enqueue=[{"lr": 1e-3}])
    assert StudySpec.from_json(spec.to_json()).enqueue == [{"lr": 1e-3}]


def test_the_best_of_several_objectives_are_spread_over_the_front() -> None:
    line = [[float(i), float(-i)] for i in range(11)]
    assert ranked([*line, [20.0, 20.0]], 12)[-1] == 11
    assert sorted(ranked([*line, [20.0, 20.0]], 3)) == [2, 5, 8]
    assert ranked([[2.0], [1.0], [1.0], [3.0]], 3) == [1, 2, 0]
    assert ranked([], 3) == []


# ---- another study
def finished(store: Store, spec: StudySpec, outcomes: list[tuple[float, float]]) -> None:
    """The study with its first trials ended at (L0, FVU) each."""
    study_id = create_study(store, spec).study_id
    for l0, fvu in outcomes:
        (claim,) = claims.claim(store, study_id, 1, {"worker": "w"})
        row = {"l0": l0, "fvu": fvu, "explained_variance": 1 - fvu, "fraction_dead": 0.0}
        values = objective_values(spec, {HOOK: row})
        assert endings.finish(store, claim, "COMPLETE", values, attrs=evaluation_attributes({HOOK: row}))


OUTCOMES = [(10.0, 0.5), (20.0, 0.3), (30.5, 0.2), (25.0, 0.4), (900.0, 0.1), (0.1, 0.9)]
TARGETS = {"saes.target_l0": {"low": 8, "high": 64, "log": True}, "lr": {"low": 1e-3, "high": 4.5e-3}}


@pytest.fixture
def source(store_address: str, tmp_path: Path) -> Store:
    """A store with the grid `s` over lr (1e-3, 2e-3, …), whose trials are relu at a fixed λ."""
    store = Store.open(store_address)
    finished(store, grid_spec(8, output_dir=str(tmp_path / "out")), OUTCOMES)
    return store


def start(store: Store, **fields: Any) -> tuple[StudySpec, list[str]]:
    asked = {"study": "s", "front": True, **fields.pop("start_from", {})}
    spec = sampled(**{"name": "new", "space": TARGETS, "start_from": asked, **fields})
    return with_starts(spec, store.url.render_as_string(hide_password=False))


def test_the_front_of_another_study_comes_first_and_its_l0_becomes_the_target(source: Store) -> None:
    spec, said = start(source)
    cells, proposed = planned_cells(spec)
    found = {one.trial: one.params for one in (spec.start_from and spec.start_from.found) or []}
    assert set(found) == {0, 1, 2, 4}  # 3 is beaten, 5 has collapsed
    assert [found[n]["saes.target_l0"] for n in (0, 1, 2)] == [10.0, 20.0, 30.5]
    assert [found[n]["lr"] for n in (0, 1, 2)] == [1e-3, 2e-3, 3e-3]
    assert [cell.params for cell in cells] == list(found.values())
    assert (len(cells), proposed) == (4, 16)
    assert "first come the fronts of study s" in said[0]
    assert "'saes.target_l0' is the L0 that they reached" in said[0]
    assert any("lr of #4 is left to the design: 0.005 is not in 0.001 to 0.0045" in line for line in said)
    assert any("saes.target_l0 of #4" in line and "900, is not in 8 to 64" in line for line in said)


def test_lists_and_whole_numbers_take_the_nearest_target(source: Store) -> None:
    for dimension, wanted in (
        ([8, 16, 32, 64], [8, 16, 32]),
        ({"low": 8, "high": 30, "int": True}, [10, 20, 30]),
        ({"low": 9, "high": 63, "step": 9}, [9.0, 18.0, 27.0]),
    ):
        space = {"saes.target_l0": dimension, "lr": TARGETS["lr"]}
        spec, _ = start(source, space=space)
        found = {one.trial: one.params for one in (spec.start_from and spec.start_from.found) or []}
        assert [found[n]["saes.target_l0"] for n in (0, 1, 2)] == wanted
        planned_cells(spec)


def test_lambda_is_taken_as_it_is_and_what_is_fixed_there_too(source: Store) -> None:
    space = {"saes.sparsity_coeff": {"low": 0.01, "high": 1}, "data.seed": [0, 1], "warmup_samples": [0, 8]}
    spec, said = start(source, space=space, start_from={"top": 3, "front": False})
    found = (spec.start_from and spec.start_from.found) or []
    assert {one.params["saes.sparsity_coeff"] for one in found} == {0.1}
    assert "not varied here, so as 'base' says: lr" in said
    assert any("left out, the same here as one before it" in line for line in said)


def test_a_lambda_that_was_moved_or_is_in_other_units_is_left_out(tmp_path: Path) -> None:
    store = Store.open(f"sqlite:///{tmp_path}/store.db")
    finished(store, grid_spec(space={"saes.target_l0": [8, 16]}), OUTCOMES[:2])
    space = {"saes.sparsity_coeff": {"low": 0.01, "high": 1}}
    _, said = start(store, space=space)
    assert any("saes.sparsity_coeff of #" in line and "moved to reach 'saes.target_l0'" in line for line in said)
    store.close()


def test_top_is_by_the_objectives_and_max_trials_bounds_it(source: Store, tmp_path: Path) -> None:
    spec, _ = start(source, start_from={"top": 2, "front": False})
    assert len((spec.start_from and spec.start_from.found) or []) == 2
    spec, said = start(source, max_trials=2)
    assert len((spec.start_from and spec.start_from.found) or []) == 2
    assert "'max_trials' leaves room for 2 of 4: the best" in said
    for metric in ("fvu", "explained_variance"):  # less is better, and more
        one = Store.open(f"sqlite:///{tmp_path}/{metric}.db")
        finished(one, grid_spec(objectives=[metric]), OUTCOMES)
        spec, _ = start(one, start_from={"top": 2, "front": False})
        assert [f.trial for f in (spec.start_from and spec.start_from.found) or []] == [4, 2]
        spec, said = start(one, start_from={"top": 9, "front": False})
        assert "the best 9 of study s (there are 5)" in said[0]
        one.close()


def test_given_points_come_before_those_of_another_study_and_both_are_known_to_workers(source: Store) -> None:
    spec, _ = start(source, enqueue=[{"lr": 2e-3, "saes.target_l0": 12}])
    made = create_study(source, spec)
    again = create_study(source, spec)
    assert (again.is_new, again.study_id) == (False, made.study_id)
    first = claims.claim(source, made.study_id, 5, {"worker": "w"})
    assert first[0].params == {"lr": 2e-3, "saes.target_l0": 12.0}
    read = source.spec("new")
    assert read.start_from is not None
    assert [c.params for c in first[1:]] == [one.params for one in read.start_from.found or []]
    assert n_proposed(read) == 15


def test_creating_again_changes_nothing_though_the_other_study_went_on_or_is_gone(source: Store) -> None:
    import optuna

    spec, _ = start(source)
    made = create_study(source, spec)
    (claim,) = claims.claim(source, source.study_id("s"), 1, {"worker": "w"})
    row = {"l0": 15.0, "fvu": 0.01, "explained_variance": 0.99}
    other = source.spec("s")
    endings.finish(
        source, claim, "COMPLETE", objective_values(other, {HOOK: row}), attrs=evaluation_attributes({HOOK: row})
    )
    later, _ = start(source)
    assert later.start_from != spec.start_from
    assert create_study(source, later).n_trials == made.n_trials
    optuna.delete_study(study_name="s", storage=source.optuna)
    unresolved = spec.model_copy(update={"start_from": spec.start_from.model_copy(update={"found": None})})  # type: ignore[union-attr]
    assert create_study(source, unresolved, ([], 0)).is_new is False
    with pytest.raises(UserError, match="different 'start_from"):
        create_study(source, spec.model_copy(update={"start_from": spec.start_from.model_copy(update={"study": "t"})}))  # type: ignore[union-attr]


def test_another_store_and_what_is_not_there(source: Store, tmp_path: Path) -> None:
    here = Store.open(f"sqlite:///{tmp_path}/here.db")
    for where, line in (({}, "no study 's'"), ({"storage": str(tmp_path / "no.db")}, "no such store")):
        with pytest.raises(UserError, match=f"'start_from': .*{line}"):
            start(here, start_from=where)
    if source.is_sqlite:
        spec, _ = start(here, start_from={"storage": f"sqlite:///{source.url.database}"})
        assert create_study(here, spec).n_trials == 20
    here.close()


def test_a_study_without_results_cannot_be_started_from(tmp_path: Path) -> None:
    store = Store.open(f"sqlite:///{tmp_path}/store.db")
    create_study(store, grid_spec(3))
    with pytest.raises(UserError, match="no trial of study 's' has come to its end"):
        start(store)
    store.close()


def test_other_architectures_give_what_both_have(tmp_path: Path) -> None:
    store = Store.open(f"sqlite:///{tmp_path}/store.db")
    finished(store, grid_spec(space={"sae_type": ["topk"], "saes.k": [8, 16, 48]}), [(8, 0.3), (16, 0.2), (48, 0.1)])
    spec, said = start(store, space={**SPACE, "saes.k": {"values": [8, 16, 24, 32], "when": {"sae_type": "topk"}}})
    found = {one.trial: one.params for one in (spec.start_from and spec.start_from.found) or []}
    assert [found[n]["saes.k"] for n in (0, 1)] == [8, 16]
    assert found[2]["saes.sae_type"] == "topk"
    assert found[2]["saes.k"] in (8, 16, 24, 32)
    assert any("saes.k of #2 is left to the design: 48 is none of 8, 16, 24, 32" in line for line in said)
    assert Space(spec).config(found[2]).saes.sae_type == "topk"
    store.close()
