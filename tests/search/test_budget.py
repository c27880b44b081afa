"""What all workers of a study may spend together, and what happens when it is used up."""

from __future__ import annotations

import json
import multiprocessing
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from _stores import grid_spec
from _worker_kit import TOTAL, Resuming, Trainer, run_together, spec_in, start, states, work_until_killed
from pydantic import ValidationError

from saeopt.config.limits import Budget
from saeopt.errors import UserError
from saeopt.trials import budget, claims, endings
from saeopt.trials.budget import Account, Meter
from saeopt.trials.create import create_study
from saeopt.trials.storage import Store

CONTEXT = 1024
"""Tokens of a sample, by default."""


def account_of(store: Store, spec: Any) -> Account:
    with store.read() as connection:
        return budget.account(connection, store.study_id(spec.name), spec)


def test_a_budget_names_a_unit_and_a_number(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="needs a number for one of gpu_hours, tokens, trials, disk_gb"):
        Budget()
    with pytest.raises(UserError, match=r"'budget\.gpu_hours': .*greater than 0"):
        spec_in(tmp_path, budget={"gpu_hours": 0})
    with pytest.raises(UserError, match=r"unknown key 'budget\.gpu_hour'; did you mean 'gpu_hours'"):
        spec_in(tmp_path, budget={"gpu_hour": 1})
    assert spec_in(tmp_path, budget={"tokens": "1e6"}).budget == Budget(tokens=10**6)


def test_a_study_without_a_budget_is_stored_as_before(tmp_path: Path) -> None:
    assert "budget" not in json.loads(spec_in(tmp_path).to_json())


def test_trials_are_begun_only_while_the_budget_has_room_for_them(store_address: str, tmp_path: Path) -> None:
    store, spec = Store.open(store_address), spec_in(tmp_path, 12, budget={"trials": 5})
    workers = [start(Store.open(store_address), spec, Trainer(), pack=3) for _ in range(3)]
    run_together(workers)
    assert states(store).count("COMPLETE") == 5
    assert states(store).count("WAITING") == 7
    assert account_of(store, spec).why_over == "the budget is used up: 5 of 5 trials"


def test_tokens_are_counted_for_each_trial_of_a_pack_and_stored_once(store_address: str, tmp_path: Path) -> None:
    store, spec = Store.open(store_address), spec_in(tmp_path, 6, budget={"tokens": 10**9})
    start(store, spec, Trainer(), pack=4).run()
    found = account_of(store, spec)
    assert found.spent["tokens"] == 6 * TOTAL * CONTEXT
    assert 0 < found.spent["gpu_hours"] < 60 / 3600
    assert found.left == {"tokens": 10**9 - 6 * TOTAL * CONTEXT}


def test_packs_go_back_with_their_checkpoints_when_the_tokens_are_used_up(store_address: str, tmp_path: Path) -> None:
    store, limit = Store.open(store_address), 2 * TOTAL * CONTEXT
    spec = spec_in(tmp_path, 6, budget={"tokens": limit})
    trainer = Trainer()
    worker = start(store, spec, trainer, pack=2)
    slow = threading.Event()
    trainer.after_step = lambda: slow.wait(0.1)
    worker.run()
    assert trainer.packs == [["0", "1"], ["2", "3"]][: len(trainer.packs)]
    assert "RUNNING" not in states(store)
    assert states(store).count("WAITING") >= 4
    spent = account_of(store, spec).spent["tokens"]
    assert limit <= spent < 2 * limit
    with store.read() as connection:
        assert budget.left(connection, worker.study_id, spec) == {"tokens": limit - spent}
        assert not budget.is_left(connection, worker.study_id, spec)
    assert claims.claim(store, worker.study_id, 4, {}, spec=spec) == []


def test_a_study_that_ends_between_two_signs_of_life_keeps_to_its_tokens(store_address: str, tmp_path: Path) -> None:
    limit = 5 * TOTAL * CONTEXT // 2
    fields: dict[str, Any] = {"heartbeat": 30, "grace": 90, "output_dir": str(tmp_path / "out")}
    store, spec = Store.open(store_address), grid_spec(6, budget={"tokens": limit}, **fields)
    worker, trainer = start(store, spec, Trainer(), pack=2), Trainer()
    worker.train = trainer
    trainer.before = lambda names: worker.heart.settle()  # what the beat at its start has seen
    worker.run()
    spent = account_of(store, spec).spent["tokens"]
    assert limit <= spent < limit + 2 * 4 * CONTEXT  # a log step of the pack
    assert states(store).count("COMPLETE") == 2


def test_what_a_worker_writes_again_counts_once(store_address: str, tmp_path: Path) -> None:
    store, spec = Store.open(store_address), spec_in(tmp_path)
    study = create_study(store, spec).study_id
    meters = [Meter("a"), Meter("b")]
    for meter in meters:
        meter.start("0", 8, 10)
        for samples in (12, 12, 16):
            meter.reached("0", samples)
            for _ in range(2):
                with store.write() as connection:
                    meter.book(connection, study)
    # a worker that was killed says nothing any more; who goes on from its checkpoint does it again, and that counts
    meters[1].start("0", 12, 10)
    meters[1].reached("0", 20)
    with store.write() as connection:
        meters[1].book(connection, study)
    assert account_of(store, spec).spent["tokens"] == 80 + 80 + 80


@pytest.mark.parametrize("dies_at", [28, 48])
def test_of_a_killed_worker_no_more_is_uncounted_than_it_trained_since_its_last_checkpoint(
    store_address: str, tmp_path: Path, dies_at: int
) -> None:
    spec = spec_in(tmp_path, 2, budget={"tokens": 10**9})
    arguments = (store_address, spec.to_json(), dies_at)
    killed = multiprocessing.get_context("spawn").Process(target=work_until_killed, args=arguments)
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    store = Store.open(store_address)
    at_checkpoint = 2 * (dies_at // 16 * 16 - (16 if dies_at % 16 == 0 else 0)) * CONTEXT  # the last word may be lost
    before = account_of(store, spec).spent["tokens"]
    assert at_checkpoint <= before <= 2 * dies_at * CONTEXT
    start(store, spec, Resuming(), pack=2).run()
    assert states(store) == ["COMPLETE"] * 2
    trained = [len((spec.run_dir(n) / "trained").read_text().split()) * 4 for n in (0, 1)]
    assert sum(trained) >= 2 * TOTAL
    counted = account_of(store, spec).spent["tokens"]
    assert 0 <= sum(trained) * CONTEXT - counted <= 2 * 16 * CONTEXT
    assert counted - before == (sum(trained) - 2 * dies_at) * CONTEXT  # the heir counts what it trained, once


def test_a_worker_of_a_deleted_study_books_nothing_on_its_heir(store_address: str, tmp_path: Path) -> None:
    store, spec = Store.open(store_address), spec_in(tmp_path)
    study = create_study(store, spec).study_id
    meter = Meter("a", identity="another")
    meter.start("0", 0, 10)
    meter.reached("0", 8)
    with store.write() as connection:
        meter.book(connection, study)
    assert "tokens" not in account_of(store, spec).spent


def test_failed_and_pruned_trials_are_ended_ones(store_address: str, tmp_path: Path) -> None:
    store, spec = Store.open(store_address), spec_in(tmp_path, budget={"trials": 3})
    study = create_study(store, spec).study_id
    first, second = claims.claim(store, study, 2, {}, spec=spec)
    endings.fail(store, first, "broken")
    assert len(claims.claim(store, study, 6, {}, spec=spec)) == 1  # one has failed, one runs
    endings.finish(store, second, "PRUNED", None)
    assert account_of(store, spec).spent["trials"] == 2
    assert claims.claim(store, study, 6, {}, spec=spec) == []
