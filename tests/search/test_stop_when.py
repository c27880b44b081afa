"""A study that ends by itself: its front no longer grows, or its budget is used up; and how it goes on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from _worker_kit import HOOK, Trainer, good, run_together, spec_in, start, states

from saeopt.config.limits import StopWhen
from saeopt.errors import UserError
from saeopt.training.plan import TrialPlan
from saeopt.trials import budget, claims, endings
from saeopt.trials import internals as db
from saeopt.trials.growth import gains
from saeopt.trials.storage import Store
from saeopt.views import spending

RULE = {"hypervolume_gain": 0.01, "over": "4 trials"}


def test_over_may_be_written_as_a_number_or_in_words(tmp_path: Path) -> None:
    assert spec_in(tmp_path, stop_when=RULE).stop_when == StopWhen(hypervolume_gain=0.01, over=4)
    assert spec_in(tmp_path, stop_when={"over": 4}).stop_when == StopWhen(over=4)
    with pytest.raises(UserError, match=r"'stop_when\.over': must be a valid integer"):
        spec_in(tmp_path, stop_when={"over": "4 hours"})
    with pytest.raises(UserError, match=r"'stop_when\.hypervolume_gain'"):
        spec_in(tmp_path, stop_when={"hypervolume_gain": 1.5})


def test_the_gain_is_that_of_the_hypervolume_by_hand(tmp_path: Path) -> None:
    """Objectives L0 (by its logarithm) and explained variance; the reference a tenth beyond the front's ends."""
    spec = spec_in(tmp_path, stop_when=RULE)
    e = math.e
    before = [[e**1, 0.5], [e**3, 0.9], None, [e**3, 0.2]]
    assert gains(spec, [*before, [e**4, 0.1], None], 2) == {"mean over hook points": 0.0}
    # points (1, −0.5), (3, −0.9), then (2, −0.8); the reference (3.2, −0.46)
    old = 2.2 * 0.04 + 0.2 * 0.4
    new = old + (3.2 - 2) * 0.3 - 0.2 * 0.3
    found = gains(spec, [*before, [e**2, 0.8]], 1)
    assert found is not None
    assert found["mean over hook points"] == pytest.approx(new / old - 1)


def test_a_bad_trial_moves_no_reference_point(tmp_path: Path) -> None:
    spec, front = spec_in(tmp_path, stop_when=RULE), [[8.0, 0.5], [32.0, 0.9]]
    more = [16.0, 0.75]
    assert gains(spec, [*front, more], 1) == gains(spec, [[4000.0, 0.01], *front, more], 1)


def test_one_objective_grows_against_the_median_of_all(tmp_path: Path) -> None:
    spec = spec_in(tmp_path, stop_when=RULE, objectives=["fvu"])
    found = gains(spec, [[0.6], [0.4], [0.2], [0.1]], 1)
    assert found == {"mean over hook points": pytest.approx((0.3 - 0.1) / (0.3 - 0.2) - 1)}
    assert gains(spec, [[0.2], [0.2], [0.2]], 1) == {"mean over hook points": 0.0}
    assert gains(spec, [None, [0.6]], 1) is None


def test_fronts_are_those_of_hook_points_where_objectives_are(tmp_path: Path) -> None:
    base = {
        "tlens_model_path": "somewhere",
        "data": {"dataset_name": "x.jsonl", "n_train_samples": 64, "train_batch_size": 4},
        "saes": {"sae_type": "relu", "sae_positions": [HOOK, "blocks.2.hook_resid_pre"], "sparsity_coeff": 0.1},
    }
    objectives = [{"metric": m, "hook_points": "all"} for m in ("l0", "fvu")]
    spec = spec_in(tmp_path, stop_when=RULE, objectives=objectives, base=base)
    rows = [[8.0, 8.0, 0.5, 0.5], [32.0, 32.0, 0.2, 0.2], [16.0, 16.0, 0.5, 0.3]]
    found = gains(spec, rows, 1)
    assert found is not None
    assert found[HOOK] == 0.0
    assert found["blocks.2.hook_resid_pre"] > 0.01


def test_a_study_ends_once_its_front_no_longer_grows_and_goes_on_when_asked(store_address: str, tmp_path: Path) -> None:
    store, spec = Store.open(store_address), spec_in(tmp_path, 20, stop_when=RULE)
    workers = [start(Store.open(store_address), spec, Trainer(), pack=1) for _ in range(2)]
    run_together(workers)
    study = store.study_id("s")
    ended = states(store).count("COMPLETE")
    assert 5 <= ended <= 7  # one before, the four of the rule, and what the other worker had begun
    assert states(store).count("WAITING") == 20 - ended
    with store.read() as connection:
        why = budget.why_over(connection, study, spec)
    assert why == "its front has not grown by 0.01 over the last 4 trials (hypervolume +0)"
    assert store.study("s").user_attrs["ended"] == why
    assert claims.claim(store, study, 1, {}, spec=spec) == []

    spending.resume(store, "s", [])
    assert store.study("s").user_attrs["ended"] == ""
    start(Store.open(store_address), spec, Trainer(), pack=1).run()
    assert states(store).count("COMPLETE") == ended + 4


def test_a_study_whose_front_grows_goes_on(store_address: str, tmp_path: Path) -> None:
    def better(plan: TrialPlan, samples: int) -> dict[str, float]:
        return {"l0": 20.0, "fvu": 0.5 / (1 + int(plan.name))}

    store, spec = Store.open(store_address), spec_in(tmp_path, 8, stop_when=RULE)
    start(Store.open(store_address), spec, Trainer(better), pack=1).run()
    assert states(store).count("COMPLETE") == 8


def test_pruned_trials_count_and_failed_ones_do_not(store_address: str, tmp_path: Path) -> None:
    def measure(plan: TrialPlan, samples: int) -> dict[str, float]:
        if plan.name in ("1", "2"):
            raise ValueError(f"broken in {plan.name}")
        return good(plan, samples) if plan.name == "0" else {"l0": 0.01, "fvu": 1.0}

    store = Store.open(store_address)
    spec = spec_in(tmp_path, 12, stop_when={"over": 3}, retries=0)
    start(Store.open(store_address), spec, Trainer(measure), pack=1).run()
    assert states(store)[:6] == ["COMPLETE", "FAIL", "FAIL", "PRUNED", "PRUNED", "PRUNED"]
    assert states(store)[6:] == ["WAITING"] * 6


def test_more_budget_lets_a_study_go_on_and_less_than_is_spent_is_refused(store_address: str, tmp_path: Path) -> None:
    store, spec = Store.open(store_address), spec_in(tmp_path, 6, budget={"trials": 2})
    start(Store.open(store_address), spec, Trainer(), pack=4).run()
    assert states(store).count("COMPLETE") == 2
    for changes in ([], ["trials=2"], ["tokens=1e12"], ["trials=3", "tokens=1e3"]):
        with pytest.raises(UserError, match=r"study s: the budget is used up: .*; give more in all than that"):
            spending.resume(store, "s", changes)
    for change, message in {"trial=3": "unknown key 'trial'; did you mean 'trials'", "trials": "UNIT=NUMBER"}.items():
        with pytest.raises(UserError, match=message):
            spending.resume(store, "s", [change])
    with store.read() as connection:
        assert budget.LIMITS not in db.get_attrs(connection, db.study_attrs, store.study_id("s"))
    spending.resume(store, "s", ["trials=5"])
    start(Store.open(store_address), spec, Trainer(), pack=4).run()
    assert states(store).count("COMPLETE") == 5
    assert store.study("s").user_attrs["budget"] == "5 of 5 trials"


def test_what_is_paused_ends_with_a_study_that_has_ended(store_address: str, tmp_path: Path) -> None:
    from saeopt.trials.create import create_study
    from saeopt.trials.paused import Ending

    spec = spec_in(tmp_path, 6, budget={"trials": 1}, early_stopping={"type": "halving", "rungs": [0.25]})
    store = Store.open(store_address)
    study = create_study(store, spec).study_id
    first, second = (claims.claim(store, study, 1, {})[0] for _ in range(2))
    assert endings.pause(store, second, 16, "behind others")
    ending = Ending(store, study, spec, None)
    assert not ending.step(4)
    endings.finish(store, first, "COMPLETE", [20.0, 0.8])
    assert ending.step(4)
    assert states(store)[:2] == ["COMPLETE", "PRUNED"]
    with store.read() as connection:
        assert budget.account(connection, study, spec).spent["trials"] == 1
