"""Paused trials: nobody claims them, no sampler hears of them, they go on when they are promoted; merging of packs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _stores import grid_spec

from saeopt.trials import claims, endings, paused
from saeopt.trials import internals as db
from saeopt.trials.create import create_study
from saeopt.trials.internals import queries
from saeopt.trials.packing import room
from saeopt.trials.states import Claim
from saeopt.trials.storage import Store, StudyGone
from saeopt.trials.waiting import Merging

OWNER = {"worker": "test"}


@pytest.fixture
def store(store_address: str) -> Iterator[Store]:
    opened = Store.open(store_address)
    yield opened
    opened.close()


def make(store: Store, n: int = 12, **fields: Any) -> int:
    return create_study(store, grid_spec(n, **fields)).study_id


def take(store: Store, study: int, limit: int = 4, most: int = 4, results_first: bool = False) -> list[Claim]:
    return claims.claim(store, study, limit, OWNER, merging=Merging(most, results_first))


def numbers(pack: list[Claim]) -> list[int]:
    return [claim.number for claim in pack]


def survive(store: Store, pack: list[Claim], samples: int) -> None:
    """Judged at a rung, and given back to be merged."""
    claims.stood(store, pack, samples)
    for claim in pack:
        assert endings.release(store, claim, samples)


def pause(store: Store, claim: Claim, samples: int = 16, **told: Any) -> None:
    assert endings.pause(store, claim, samples, f"paused at {samples}: beaten by trial 9", **told)


def states(store: Store, name: str = "s") -> list[str]:
    return [row.state for row in queries.trial_rows(store.engine, store.study_id(name))]


# ---- paused
@pytest.mark.parametrize("merging", [None, Merging(4)])
def test_a_paused_trial_is_claimed_by_nobody_until_it_is_promoted(store: Store, merging: Merging | None) -> None:
    study = make(store, 3)
    first = claims.claim(store, study, 3, OWNER, merging=merging)
    pause(store, first[1])
    endings.release(store, first[0])
    again = claims.claim(store, study, 9, OWNER, merging=merging)
    assert numbers(again) == [0]
    assert claims.claim(store, study, 9, OWNER, merging=merging) == []
    assert paused.promote(store, study, [1, 2]) == [1]
    (heir,) = claims.claim(store, study, 9, OWNER, merging=merging)
    assert (heir.number, heir.checkpoint, heir.stood, heir.promoted) == (1, 16, 16, True)


def test_only_a_claim_that_holds_pauses_its_trial(store: Store) -> None:
    study = make(store, 1)
    (zombie,) = claims.claim(store, study, 1, OWNER)
    assert endings.reap(store, study, [zombie.trial_id], grace=-1.0, max_losses=9) == [zombie.trial_id]
    assert not endings.pause(store, zombie, 16, "late")
    assert states(store) == ["WAITING"]
    (heir,) = claims.claim(store, study, 1, OWNER)
    pause(store, heir)
    assert not endings.pause(store, heir, 32, "twice")
    assert not endings.finish(store, heir, "COMPLETE", [1.0, 2.0])
    assert endings.reap(store, study, [heir.trial_id], grace=-1.0, max_losses=9) == []
    assert endings.retry(store, study) == []
    assert states(store) == ["PAUSED"]


def test_paused_trials_are_counted_and_shown_as_paused(store: Store) -> None:
    study = make(store, 3)
    other = make(store, 2, name="t")
    pack = claims.claim(store, study, 2, OWNER)
    pause(store, pack[0])
    counts = {name: n for name, n in claims.counts(store, study).items() if n}
    assert counts == {"WAITING": 1, "RUNNING": 1, "PAUSED": 1}
    assert queries.state_counts(store.engine)[study] == counts
    assert queries.state_counts(store.engine)[other] == {"WAITING": 2}
    row = queries.trial_rows(store.engine, study)[0]
    assert (row.state, row.complete) == ("PAUSED", None)
    assert row.attributes["reason"] == "paused at 16: beaten by trial 9"
    assert (row.attributes["paused_at"], row.attributes["samples"]) == (16, 16)


@pytest.mark.parametrize("type_", ["tpe", "nsga2"])
def test_no_sampler_sees_a_paused_trial_before_the_study_ends(store: Store, type_: str) -> None:
    spec = grid_spec(
        1, space={"lr": {"low": 1e-4, "high": 1e-2}}, sampler={"type": type_, "n_startup_trials": 2}, max_trials=4
    )
    study = create_study(store, spec).study_id
    pack = claims.claim(store, study, 2, OWNER)
    pause(store, pack[0])
    assert endings.finish(store, pack[1], "COMPLETE", [1.0, 2.0])

    def seen() -> list[str]:
        found = store.sampling_study("s").get_trials(deepcopy=False)
        return [t.state.name for t in found if t.state.is_finished() or t.state.name == "RUNNING"]

    assert seen() == ["COMPLETE"]
    assert room(store, study, spec, 4, auto=False) == 4, "what is paused is not what begins a study"


def test_optunas_own_queue_would_take_it_but_no_part_of_saeopt_asks_it() -> None:
    package = Path(paused.__file__).parents[1]
    asking = [path.name for path in package.rglob("*.py") if ".ask(" in (text := path.read_text()) and "optuna" in text]
    assert asking == []


def test_at_the_end_what_is_paused_has_been_pruned_and_may_still_be_promoted(store: Store) -> None:
    study = make(store, 3)
    pack = claims.claim(store, study, 3, OWNER)
    pause(store, pack[0], constraints={"stopped": 1e-3})
    pause(store, pack[1], values=[0.5])
    assert paused.finish(store, study, None) == [], "one still runs"
    assert endings.finish(store, pack[2], "COMPLETE", [1.0, 2.0])
    with pytest.raises(StudyGone):
        paused.finish(store, study, "another")
    assert paused.finish(store, study, None) == [0, 1]
    assert paused.finish(store, study, None) == []
    trials = store.study("s").trials
    assert [t.state.name for t in trials] == ["PRUNED", "PRUNED", "COMPLETE"]
    assert [t.values for t in trials[:2]] == [None, [0.5]]
    assert trials[0].user_attrs["reason"] == "paused at 16: beaten by trial 9"
    assert trials[0].datetime_complete is not None
    assert [t.values for t in store.study("s").best_trials] == [[1.0, 2.0]]
    assert paused.promote(store, study, [0, 1, 2]) == [0, 1]
    assert states(store) == ["WAITING", "WAITING", "COMPLETE"]
    rows = queries.trial_rows(store.engine, study)
    queries.add_values(store.engine, rows, study)
    assert ([row.values for row in rows[:2]], rows[0].complete) == ([[], []], None)
    assert "reason" not in rows[0].attributes
    with store.read() as connection:
        left = db.get_attrs(connection, db.trial_attrs, rows[0].trial_id)
    assert "constraints" not in left
    assert numbers(take(store, study)) == [0, 1]


def test_after_the_end_they_are_paused_again_as_they_were_and_end_again(store: Store) -> None:
    study = make(store, 4)
    pack = claims.claim(store, study, 4, OWNER)
    pause(store, pack[0], values=[0.5], constraints={"stopped": 1e-3})
    assert endings.finish(store, pack[1], "PRUNED", None)  # for another reason
    pause(store, pack[2], 32)
    assert endings.finish(store, pack[3], "COMPLETE", [1.0, 2.0])
    with store.read() as connection:
        before = paused.paused(connection, study)
    assert paused.finish(store, study, None) == [0, 2]
    with store.write() as connection:
        assert paused.stand_again(connection, study) == [0, 2]
        assert paused.stand_again(connection, study) == []
        assert paused.paused(connection, study) == before
    assert states(store) == ["PAUSED", "PRUNED", "PAUSED", "COMPLETE"]
    rows = queries.trial_rows(store.engine, study)
    queries.add_values(store.engine, rows, study)
    assert (rows[0].values, rows[0].complete) == ([], None)
    assert rows[0].attributes["reason"] == "paused at 16: beaten by trial 9"
    assert take(store, study) == []
    assert paused.finish(store, study, None) == [0, 2]
    assert [t.values for t in store.study("s").trials][:3] == [[0.5], None, None]


def test_what_was_pruned_for_another_reason_is_not_promoted(store: Store) -> None:
    study = make(store, 1)
    (claim,) = claims.claim(store, study, 1, OWNER)
    assert endings.finish(store, claim, "PRUNED", None)
    assert paused.promote(store, study, [0]) == []
    assert states(store) == ["PRUNED"]


def test_without_their_checkpoints_trials_are_not_promoted_after_the_end(store: Store) -> None:
    study = make(store, 1)
    pause(store, claims.claim(store, study, 1, OWNER)[0])
    assert paused.finish(store, study, None, keep=False) == [0]
    assert paused.promote(store, study, [0]) == []


# ---- merging
def test_survivors_of_several_packs_wait_for_a_full_one_which_then_comes_first(store: Store) -> None:
    study = make(store, 16)
    rounds = []
    for _ in range(3):  # two of four go on each time
        pack = take(store, study)
        rounds.append(numbers(pack))
        if pack[0].stood:
            break
        survive(store, pack[1:3], 16)
        for claim in (pack[0], pack[3]):
            pause(store, claim)
    assert rounds == [[0, 1, 2, 3], [4, 5, 6, 7], [1, 2, 5, 6]]
    assert {c.checkpoint for c in pack} == {16}


def test_the_highest_rung_comes_first_and_a_part_of_a_pack_after_what_nobody_has_begun(store: Store) -> None:
    study = make(store, 12)
    packs = [take(store, study) for _ in range(2)]
    survive(store, packs[0], 16)
    survive(store, packs[1][:3], 32)
    endings.finish(store, packs[1][3], "COMPLETE", [1.0, 2.0])
    assert [numbers(take(store, study)) for _ in range(4)] == [[0, 1, 2, 3], [8, 9, 10, 11], [4, 5, 6], []]


def test_survivors_of_different_streams_do_not_merge(store: Store) -> None:
    study = make(store, space={"data.train_batch_size": [4, 8], "lr": [1e-3, 2e-3]})
    for _ in range(2):
        survive(store, take(store, study), 16)
    assert [numbers(take(store, study)) for _ in range(2)] == [[0, 1], [2, 3]]


def test_who_was_killed_below_or_behind_a_rung_goes_on_before_the_part_of_a_pack(store: Store) -> None:
    study = make(store, 4)
    pack = take(store, study)
    claims.stood(store, pack[:2], 16)
    for claim, checkpoint in zip(pack, (16, 24, 8, 8), strict=True):
        endings.release(store, claim, checkpoint)
    assert [numbers(take(store, study)) for _ in range(3)] == [[1], [2, 3], [0]]


def test_a_sampler_that_learns_gets_results_before_it_is_asked_again(store: Store) -> None:
    spec = grid_spec(
        1, space={"lr": {"low": 1e-4, "high": 1e-2}}, sampler={"type": "tpe", "n_startup_trials": 4}, max_trials=8
    )
    study = create_study(store, spec).study_id
    survive(store, take(store, study)[:2], 16)
    assert numbers(take(store, study, results_first=True)) == [0, 1]
    assert numbers(take(store, study, results_first=True)) == [4, 5, 6, 7]


def test_trouble_and_loneliness_come_last_and_join_nobody(store: Store) -> None:
    study = make(store, 6)
    pack = take(store, study)
    claims.stood(store, pack, 16)
    endings.release(store, pack[0], 16, alone=True)
    endings.release(store, pack[1], 16, reason="no room on the disk")
    survive(store, pack[2:], 16)
    taken = [numbers(take(store, study)) for _ in range(4)]
    assert taken == [[4, 5], [2, 3], [0], [1]]
