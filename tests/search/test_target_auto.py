"""`saes.target_l0: auto`: five L0s, what the decoders say of them, and one refinement by however many workers."""

from __future__ import annotations

import math
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
from _processes import HOOK, signs_at, work_and_refine
from _stores import grid_spec
from _worker_kit import Trainer, spec_in, start

from saeopt.config.study import StudySpec
from saeopt.errors import UserError
from saeopt.search.signs import Favoured, Sign, around, favoured, first_targets
from saeopt.search.space import Space
from saeopt.training.plan import TrialPlan
from saeopt.trials import claims, endings
from saeopt.trials.attributes import evaluation_attributes
from saeopt.trials.create import create_study, planned_cells
from saeopt.trials.refine import RECOMMENDED, Refinement
from saeopt.trials.storage import Store

TARGET = "saes.target_l0"
FIVE: dict[str, Any] = {TARGET: {"values": [4, 8, 16, 32, 64], "refine": True}}


def curve(*points: tuple[float, float, float], dead: float = 0.0) -> list[Sign]:
    return [Sign(i, l0, c_dec, s_dec, dead) for i, (l0, c_dec, s_dec) in enumerate(points)]


# ---- the rule
def test_c_dec_leads_and_s_dec_decides_where_it_is_level() -> None:
    plain = curve((4, 0.20, 1.0), (8, 0.15, 2.0), (16, 0.10, 3.0), (32, 0.14, 0.5))
    assert favoured(plain) == Favoured(16, 2, False)
    level = curve((4, 0.20, 1.0), (8, 0.109, 2.0), (16, 0.10, 3.0), (32, 0.14, 0.5))
    assert favoured(level) == Favoured(8, 1, False)
    assert favoured(curve((4, 0.2, math.nan), (8, 0.1, math.nan), (16, 0.3, math.nan))) == Favoured(8, 1, False)


def test_the_ends_of_the_curve_are_named_and_few_points_say_nothing() -> None:
    assert favoured(curve((4, 0.3, 1), (8, 0.2, 1), (16.4, 0.1, 1))) == Favoured(16, 2, True)
    assert favoured(curve((4, 0.1, 1), (8, 0.2, 1), (16, 0.3, 1))) == Favoured(4, 0, True)
    assert favoured(curve((4, 0.1, 1), (8, 0.2, 1))) is None
    assert around(curve((4, 0.1, 1), (8, 0.2, 1)), [4, 8]) == []


def test_decoders_of_dead_latents_do_not_count_while_others_remain() -> None:
    living = curve((8, 0.2, 1), (16, 0.15, 1), (32, 0.18, 1))
    dead = [Sign(9, 4, 0.1, 0.1, 0.4)]
    assert favoured([*dead, *living]) == Favoured(16, 1, False)
    assert favoured([*dead, *living[:2]]) == Favoured(4, 9, True)


def test_what_is_tried_next_lies_between_the_neighbours_or_beyond_the_end() -> None:
    inside = curve((8, 0.2, 1), (16, 0.1, 1), (64, 0.2, 1))
    assert around(inside, [8, 16, 64]) == [11, 23, 32]
    assert around(curve((4, 0.3, 1), (8, 0.2, 1), (16, 0.1, 1)), [4, 8, 16]) == [11, 23, 32]
    assert around(curve((4, 0.1, 1), (8, 0.2, 1), (16, 0.3, 1)), [4, 8, 16]) == [2, 3, 6]
    assert around(curve((1, 0.1, 1), (2, 0.2, 1), (4, 0.3, 1)), [1, 2, 4]) == []


def test_the_first_l0s_go_by_the_width() -> None:
    assert first_targets(768, 768 * 32) == [12, 24, 48, 96, 192]
    assert first_targets(64, 512) == [1, 2, 4, 8, 16]
    assert first_targets(768, 768) == [6, 12, 24, 48, 96]  # an eighth of the latents


# ---- the study
def test_each_combination_has_its_own_five() -> None:
    spec = grid_spec(space={"saes.sae_type": ["relu", "topk"], "lr": [1e-3, 2e-3], **FIVE})
    cells, proposed = planned_cells(spec)
    assert (len(cells), proposed) == (20, 0)
    assert sorted({cell.config.saes.target_l0 for cell in cells}) == [4, 8, 16, 32, 64]
    assert StudySpec.from_json(spec.to_json()).to_json() == spec.to_json()
    assert '"refine"' not in grid_spec(space={TARGET: [4, 8, 16]}).to_json()  # older versions read that


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sampler": "tpe", "max_trials": 9}, "'space.saes.target_l0': refine needs 'sampler: grid', not tpe"),
        ({"max_trials": 3}, "'space.saes.target_l0': refine excludes 'max_trials'"),
        ({"early_stopping": "pareto"}, "refine needs 'early_stopping: none'"),
        ({"space": {TARGET: "auto"}}, "'saes.target_l0: auto' needs the model's width"),
        ({"space": {TARGET: ["auto", 8]}}, "'auto' stands alone, in place of the list"),
        ({"space": {f"{TARGET}@{HOOK}": "auto"}}, f"name the field without '@{HOOK}'"),
        ({"space": {"lr": {"values": [1e-3], "refine": True}}}, "'lr': 'refine' is for 'saes.target_l0' alone"),
        ({"space": {"lr": "auto"}}, "'lr': input should be a valid number"),
        ({"space": {TARGET: {"values": [8, 16], "refine": True}}}, "needs 3 values or more"),
        ({"space": {TARGET: {"values": [8, 16, 20.5], "refine": True}}}, "needs whole numbers"),
        ({"space": {TARGET: {"low": 1, "high": 9, "refine": True}}}, "'refine: true' needs 'values'"),
        ({"space": {**FIVE, "lr": {"values": [1e-3], "when": {TARGET: 8}}}}, "of which more values will come"),
    ],
)
def test_what_would_leave_gaps_in_the_curve_is_refused_in_one_line(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        planned_cells(grid_spec(**{"space": FIVE, **fields}))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def targets(store: Store) -> list[int]:
    return [trial.params[TARGET] for trial in store.study("s").trials]


def test_two_workers_add_the_refinement_once(store_address: str, tmp_path: Path) -> None:
    spec = grid_spec(space={"lr": [1e-3, 2e-3], **FIVE})
    store = Store.open(store_address)
    create_study(store, spec)
    context, outs = multiprocessing.get_context("spawn"), [tmp_path / "a", tmp_path / "b"]
    begin = time.time() + 3
    workers = [context.Process(target=work_and_refine, args=(store_address, "s", begin, out)) for out in outs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert sum(int(out.read_text()) for out in outs) == 4
    trials = store.study("s").trials
    assert [trial.number for trial in trials] == list(range(14))
    assert {trial.state.name for trial in trials} == {"COMPLETE"}
    assert sorted(targets(store)[10:]) == [11, 11, 23, 23]
    store.close()


def measured(plan: TrialPlan, samples: int) -> dict[str, float]:
    return signs_at(float(plan.config.saes.target_l0 or 1))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(f"sqlite:///{tmp_path}/store.db")


def test_a_worker_refines_and_tells_what_is_recommended(store: Store, tmp_path: Path) -> None:
    spec = spec_in(tmp_path, space=FIVE)
    trainer = Trainer(measured)
    start(store, spec, trainer, pack=8).run()
    assert targets(store)[5:] == [11, 23]
    assert trainer.packs == [["0", "1", "2", "3", "4"], ["5", "6"]]
    (found,) = store.study("s").user_attrs[RECOMMENDED]
    assert (found["l0"], found["trial"], found["at_edge"]) == (23, 6, False)
    assert [point["l0"] for point in found["curve"]] == [4, 8, 11, 16, 23, 32, 64]
    start(store, spec, trainer).run()
    assert len(targets(store)) == 7


def test_what_a_killed_worker_left_undone_the_next_one_does(store: Store, tmp_path: Path) -> None:
    spec = spec_in(tmp_path, space=FIVE)
    study_id = create_study(store, spec).study_id
    for claim in claims.claim(store, study_id, 5, {"worker": "killed"}):
        attrs = evaluation_attributes({HOOK: signs_at(float(claim.params[TARGET]))})
        assert endings.finish(store, claim, "COMPLETE", [1.0, 0.5], attrs=attrs)
    assert len(targets(store)) == 5
    start(store, spec, Trainer(measured)).run()
    assert targets(store)[5:] == [11, 23]


def test_a_trial_that_failed_leaves_a_gap_and_is_not_trained_again(store: Store, tmp_path: Path) -> None:
    def before(names: list[str]) -> None:
        if "3" in names:  # L0 32
            raise RuntimeError("a crash")

    spec = spec_in(tmp_path, space=FIVE, retries=0)
    start(store, spec, Trainer(measured, before), pack=8).run()
    trials = store.study("s").trials
    assert [trial.state.name for trial in trials[:5]] == ["COMPLETE"] * 3 + ["FAIL", "COMPLETE"]
    assert targets(store)[5:] == [11, 23]  # √(16 · 64) = 32 has been tried
    assert store.study("s").user_attrs[RECOMMENDED][0]["l0"] == 23


def test_nothing_is_added_while_one_of_the_five_trains(store: Store, tmp_path: Path) -> None:
    spec = spec_in(tmp_path, space={"lr": [1e-3, 2e-3], **FIVE})
    study_id = create_study(store, spec).study_id
    refinement = Refinement(store, study_id, Space(spec), store.identity(study_id))
    taken = claims.claim(store, study_id, 10, {"worker": "w"})
    for i, claim in enumerate(sorted(taken, key=lambda c: c.params["lr"])):
        assert refinement.step() == 0
        attrs = evaluation_attributes({HOOK: signs_at(float(claim.params[TARGET]), best=16)})
        assert endings.finish(store, claim, "COMPLETE", [1.0, 0.5], attrs=attrs)
        if i % 5 == 4:
            assert refinement.step() == 2
    assert len(targets(store)) == 14
    assert refinement.step() == 0


def test_collapsed_saes_are_no_part_of_the_curve(store: Store, tmp_path: Path) -> None:
    def measure(plan: TrialPlan, samples: int) -> dict[str, float]:
        found = signs_at(float(plan.config.saes.target_l0 or 1), best=64)
        return {**found, "fvu": 1.5} if found["l0"] == 64 else found

    start(store, spec_in(tmp_path, space=FIVE), Trainer(measure), pack=8).run()
    assert [point["l0"] for point in store.study("s").user_attrs[RECOMMENDED][0]["curve"]][:4] == [4, 8, 16, 23]
