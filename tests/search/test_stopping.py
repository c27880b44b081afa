"""Early stopping compares a trial with everyone who has come as far: mates of its pack, other workers, the ended."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from _stores import grid_spec
from _worker_kit import Trainer, spec_in, start

from saeopt.search.pruning import Curve
from saeopt.search.stopping import Asked, Judge, Runner, bracket, stopping_text, why_never
from saeopt.training.plan import TrialPlan
from saeopt.trials import claims, endings
from saeopt.trials.create import create_study
from saeopt.trials.stopper import CURVE, Report, Stopper
from saeopt.trials.storage import Store
from saeopt.views import monitoring

GOOD, HOPELESS = ("0", "2", "4", "6"), ("1", "3", "5", "7")
RULES = [
    ("pareto", ["fvu", "explained_variance"]),
    ("pareto", ["fvu", "cosine"]),
    ("median", ["fvu"]),
    ("asha", ["fvu"]),
    ("hyperband", ["fvu"]),
    ("median", ["cosine"]),
]


@pytest.fixture
def any_store(store_address: str) -> Iterator[Store]:
    """SQLite's or PostgreSQL's."""
    opened = Store.open(store_address)
    yield opened
    opened.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(f"sqlite:///{tmp_path}/store.db")
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("on_trial_start", "on_trial_end", "on_trial_paused", "on_study_progress"):
        monkeypatch.setattr(monitoring, name, lambda *args, **kwargs: None)


def measured(plan: TrialPlan, samples: int) -> dict[str, float]:
    fvu = (0.9 if plan.name in HOPELESS else 0.2) + 0.002 * int(plan.name)
    return {"l0": 20.0, "fvu": fvu, "cosine": 1.0 - fvu}


def rule_of(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, "warmup": 0.2, "n_startup_trials": 1, "collapse": None, **fields}


@pytest.mark.parametrize("pack", [8, 2])
@pytest.mark.parametrize(("kind", "objectives"), RULES)
def test_in_one_pack_and_over_packs_the_hopeless_are_stopped(
    kind: str, objectives: list[str], pack: int, store: Store, tmp_path: Path
) -> None:
    spec = spec_in(tmp_path, 8, objectives=objectives, early_stopping=rule_of(kind))
    if "cosine" in objectives:
        spec = spec.model_copy(update={"base": spec.base | {"eval_every_n_samples": 8}})
    trainer = Trainer(measured, evaluates="cosine" in objectives)
    worker = start(store, spec, trainer, pack=pack)
    trainer.after_step = lambda: worker.reports.flush(30.0)
    worker.run()
    trials = store.study("s").trials
    stopped = [str(t.number) for t in trials if t.state.name == "PRUNED"]
    if pack == 8:
        assert set(HOPELESS) <= set(stopped)
    elif kind != "hyperband":  # some of its trials are not asked before most of the others have ended
        assert set(HOPELESS) <= set(stopped) | {"1"}  # whose pack was the first to come
    for number in set(stopped) & set(HOPELESS):
        reason = trials[int(number)].user_attrs["reason"]
        assert reason.startswith(f"stopped early by {kind} at ")
        assert "trial " in reason
    if kind == "pareto":
        assert set(stopped) <= set(HOPELESS)  # nobody beats the good ones by the margin
    assert trials[0].state.name == "COMPLETE"


def test_the_order_in_which_a_pack_is_reported_does_not_matter(store: Store, tmp_path: Path) -> None:
    """Where the hopeless come first, each would be the best so far of those that had reported."""
    spec = spec_in(tmp_path, 6, objectives=["fvu"], early_stopping=rule_of("asha"))
    trainer = Trainer(lambda plan, samples: {"l0": 20.0, "fvu": 0.9 - 0.1 * int(plan.name)})
    worker = start(store, spec, trainer, pack=6)
    trainer.after_step = lambda: worker.reports.flush(30.0)
    worker.run()
    assert [t.state.name for t in store.study("s").trials] == ["PRUNED"] * 5 + ["COMPLETE"]


def test_two_workers_see_each_others_running_trials(any_store: Store, tmp_path: Path) -> None:
    """Nobody has ended; each worker has a good one and a hopeless one of its own, or only hopeless ones."""
    spec = grid_spec(4, objectives=["l0", "fvu"], early_stopping=rule_of("pareto"), output_dir=str(tmp_path))
    study_id = create_study(any_store, spec).study_id
    values = [[20.0, 0.2], [40.0, 0.9], [50.0, 0.8], [19.0, 0.9]]
    taken = [claims.claim(any_store, study_id, 2, {"worker": w}) for w in ("a", "b")]
    stoppers = [Stopper(any_store, study_id, spec) for _ in taken]
    for claim in [c for pack in taken for c in pack]:
        curve = {10: values[claim.number], 30: values[claim.number]}
        claims.report(any_store, claim, 30, values[claim.number][0], {CURVE: curve})
    found = [
        s.reasons([Report(c.trial_id, 30, 100, 20) for c in pack]) for s, pack in zip(stoppers, taken, strict=True)
    ]
    numbers = {c.trial_id: c.number for pack in taken for c in pack}
    assert {numbers[i] for reasons in found for i in reasons} == {1, 2}
    (reason,) = [r for i, r in (found[0] | found[1]).items() if numbers[i] == 2]
    assert "trial 0 was better in every objective (l0 20 against 50, fvu 0.2 against 0.8)" in reason
    # The same decisions whoever asks, and after one of them has been stored.
    endings.finish(any_store, taken[0][1], "PRUNED", None, attrs={"reason": "stopped early by pareto"})
    again = Stopper(any_store, study_id, spec).reasons([Report(c.trial_id, 30, 100, 20) for c in taken[1]])
    assert again == found[1]


def judged(kind: str, mine: Curve, others: list[Runner], samples: int, **fields: Any) -> str | None:
    objectives = fields.pop("objectives", ["fvu"])
    spec = grid_spec(1, objectives=objectives, early_stopping=rule_of(kind, **fields))
    return Judge(spec).reason(Asked(Runner(0, mine), samples, 100, 20), others)


def test_who_has_not_come_as_far_is_no_measure() -> None:
    short, far = {10: [0.1]}, {10: [0.1], 30: [0.1]}
    for kind in ("median", "asha"):
        assert judged(kind, {10: [0.9], 30: [0.9]}, [Runner(1, short)], 30) is None
        assert judged(kind, {10: [0.9], 30: [0.9]}, [Runner(1, far)], 30)
    two = {"objectives": ["fvu", "mse"]}
    assert judged("pareto", {30: [0.9, 9.0]}, [Runner(1, {10: [0.1, 1.0]})], 30, **two) is None
    assert judged("pareto", {30: [0.9, 9.0]}, [Runner(1, {40: [0.1, 1.0]})], 30, **two) is None  # nothing of it by 30
    assert judged("pareto", {30: [0.9, 9.0]}, [Runner(1, {20: [0.1, 1.0], 40: [0.1, 1.0]})], 30, **two)


def test_of_a_pack_remain_as_many_as_the_rule_must_compare_with() -> None:
    """Each report asks anew, and who was stopped is no longer there: the pack does not shrink without end."""
    there = {n: {30: [n / 100]} for n in range(1, 9)}
    while worse := [
        n
        for n, curve in there.items()
        if judged("median", curve, [Runner(m, c) for m, c in there.items() if m != n], 30, n_startup_trials=3)
    ]:
        there = {n: curve for n, curve in there.items() if n not in worse}
    assert list(there) == [1, 2]  # four were compared for the last time


def test_whom_no_other_beats_in_everything_is_never_stopped_by_pareto() -> None:
    front = [[4.0, 0.5], [8.0, 0.3], [16.0, 0.2], [32.0, 0.1]]
    for i, values in enumerate(front):
        others = [Runner(n, {30: other}) for n, other in enumerate(front) if n != i]
        assert judged("pareto", {30: values}, others, 30, objectives=["l0", "fvu"]) is None
        assert judged(
            "pareto", {30: [values[0] * 1.2, values[1] * 1.2]}, [Runner(9, {30: values})], 30, objectives=["l0", "fvu"]
        )


def test_of_what_is_one_at_best_the_margin_is_of_what_is_missing() -> None:
    """A cosine of 0.96 against 0.88 is within a tenth of it, and has a third of the error."""
    two = {"objectives": ["fvu", "cosine"]}
    assert judged("pareto", {30: [0.25, 0.88]}, [Runner(1, {30: [0.08, 0.96]})], 30, **two)
    assert judged("pareto", {30: [0.25, 0.959]}, [Runner(1, {30: [0.08, 0.96]})], 30, **two) is None


def test_a_rung_asks_once_and_the_best_third_goes_on() -> None:
    others = [Runner(n, {18: [0.1 * n], 22: [0.1 * n], 40: [0.1 * n]}) for n in range(1, 9)]
    third = {18: [0.25], 22: [0.25], 24: [0.99]}
    assert judged("asha", third, others, 22) is None  # place 3 of 9
    assert judged("asha", third, others, 24) is None  # no rung between
    reason = judged("asha", {18: [0.35], 22: [0.35]}, others, 22)
    assert reason
    assert "fvu 0.35, place 4 of 9 at the rung of 20 samples, of which 3 go on" in reason
    assert "(the last is trial 3 with 0.3)" in reason
    assert judged("asha", {22: [0.9], 59: [0.9], 61: [0.9]}, others, 61) is None  # nobody else was at 60


def test_brackets_are_optunas() -> None:
    pruner = optuna.pruners.HyperbandPruner(min_resource=20, max_resource=1000, reduction_factor=3)
    study = optuna.create_study(study_name="s", pruner=pruner)
    pruner._try_initialization(study)
    for number in range(200):
        trial = optuna.trial.create_trial(value=0.0)
        trial.number = number
        assert bracket(f"s_{number}", 20, 1000, 3) == pruner._get_bracket_id(study, trial)


@pytest.mark.parametrize(
    "reason", ["collapsed: h: L0 0.1 is below 0.5", "NaN or Inf in loss or gradient before sample 9"]
)
def test_a_trial_that_collapsed_or_diverged_is_nobodys_measure(any_store: Store, tmp_path: Path, reason: str) -> None:
    spec = grid_spec(2, objectives=["fvu"], early_stopping=rule_of("median"), output_dir=str(tmp_path))
    study_id = create_study(any_store, spec).study_id
    first, second = claims.claim(any_store, study_id, 2, {"worker": "w"})
    claims.report(any_store, first, 30, 0.1)
    claims.report(any_store, second, 30, 0.9)
    asked = [Report(second.trial_id, 30, 100, 20)]
    assert Stopper(any_store, study_id, spec).reasons(asked)
    endings.finish(any_store, first, "PRUNED", None, attrs={"reason": reason})
    assert Stopper(any_store, study_id, spec).reasons(asked) == {}


def test_create_says_what_is_compared_and_refuses_what_can_never_stop_a_trial() -> None:
    def refused(match: str, n: int = 8, **fields: Any) -> None:
        reason = why_never(grid_spec(n, base=grid_spec(1).base | fields.pop("base", {}), **fields), n)
        assert reason
        assert re.search(match, reason)
        assert "\n" not in reason

    late = {"eval_every_n_samples": 10**6}
    refused("training does not measure cosine", objectives=["fvu", "cosine"], early_stopping=rule_of("pareto"))
    refused(r"leaves none of 5 trials", 5, objectives=["fvu"], early_stopping="median")
    refused("the first evaluation is at the end", objectives=["fvu"], early_stopping="asha", base=late)
    shown = stopping_text(grid_spec(8, objectives=["cosine"], early_stopping="asha"))
    assert shown
    assert shown.startswith("asha compares explained_variance of log steps: cosine is measured at the end")
    shown = stopping_text(grid_spec(8, objectives=["fvu", "explained_variance"], early_stopping="pareto"))
    assert shown == "pareto compares fvu, explained_variance of log steps, as training measures it"
    assert stopping_text(grid_spec(8)) is None
