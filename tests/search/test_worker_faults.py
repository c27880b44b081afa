"""What goes wrong while a worker trains: stores that vanish, hosts, processes that die, claims that are lost."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from _worker_kit import Trainer, good, spec_in, start, states

from saeopt.errors import UserError, WorkerFault
from saeopt.training.plan import Observer
from saeopt.trials import claims, endings, presence
from saeopt.trials import internals as db
from saeopt.trials.create import create_study
from saeopt.trials.storage import Store
from saeopt.views import monitoring
from saeopt.workers.faults import TrainingDied, TrainingStalled
from saeopt.workers.loop import start_of


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("on_trial_start", "on_trial_end", "on_trial_paused", "on_study_progress"):
        monkeypatch.setattr(monitoring, name, lambda *args, **kwargs: None)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    opened = Store.open(f"sqlite:///{tmp_path}/store.db")
    yield opened
    opened.close()


def test_the_store_may_vanish_while_a_pack_trains(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sqlalchemy.exc import OperationalError

    worker = start(store, spec_in(tmp_path, 2), Trainer())
    begin, outage = Store.write, {"until": 0.0}

    def write(self: Store) -> Any:
        if time.monotonic() < outage["until"]:
            raise OperationalError("SELECT 1", {}, Exception("server closed the connection"))
        return begin(self)

    monkeypatch.setattr(Store, "write", write)
    worker.train.before = lambda names: outage.update(until=time.monotonic() + 2.0)  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING, "saeopt"):
        assert worker.run() == 2
    assert states(store) == ["COMPLETE", "COMPLETE"]
    assert len(store.study("s").trials[0].intermediate_values) > 1
    assert "cannot be reached" in caplog.text


def test_a_folder_of_another_config_is_moved_aside_and_never_resumed(tmp_path: Path) -> None:
    from saeopt.runs.folder import RunFolder

    spec = spec_in(tmp_path, 2)
    first, second = (spec.run_config({"lr": lr}) for lr in (1e-3, 2e-3))
    folder = tmp_path / "out/s/0"
    assert start_of(folder, first) == 0
    folder.mkdir(parents=True)
    RunFolder(folder).write_config(first)
    assert start_of(folder, first.model_copy(update={"wandb_tags": ["other"]})) == 0
    assert folder.exists()
    assert start_of(folder, second) == 0
    assert not folder.exists()
    assert (tmp_path / "out/s/0-old-1/final_config.yaml").exists()


def test_a_trial_that_succeeds_at_last_has_no_reason_any_more(store: Store, tmp_path: Path) -> None:
    trainer = Trainer()

    def before(names: list[str]) -> None:
        if len(trainer.packs) == 1:
            raise ValueError("once")

    trainer.before = before
    start(store, spec_in(tmp_path, 1), trainer).run()
    (trial,) = store.study("s").trials
    assert trial.state.name == "COMPLETE"
    assert "reason" not in trial.user_attrs
    assert trial.user_attrs["failures"] == 1


def test_a_fault_of_the_host_is_booked_on_no_trial_and_ends_the_worker(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from saeopt.workers import loop as worker_loop

    def before(names: list[str]) -> None:
        raise UserError("samples_8.safetensors: the disk is full") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(worker_loop, "_HOST_PAUSE", 0.0)
    trainer = Trainer(before=before)
    worker = start(store, spec_in(tmp_path, 5, retries=0), trainer, pack=1)
    with pytest.raises(WorkerFault, match="the disk is full"):
        worker.run()
    assert trainer.packs == [["0"], ["1"], ["2"]]  # what failed goes behind what nobody has tried
    assert states(store) == ["WAITING"] * 5
    first = store.study("s").trials[0]
    assert "failures" not in first.user_attrs
    assert "the disk is full" in first.user_attrs["reason"]


def test_three_different_trials_that_fail_of_the_same_end_the_worker_and_a_success_between_does_not(
    store: Store, tmp_path: Path
) -> None:
    def before(names: list[str]) -> None:
        if names != ["2"]:
            raise ValueError(f"cannot read /data/{names[0]}")

    trainer = Trainer(before=before)
    with pytest.raises(WorkerFault, match="3 different trials failed of the same"):
        start(store, spec_in(tmp_path, 8, retries=0), trainer, pack=1).run()
    assert trainer.packs == [["0"], ["1"], ["2"], ["3"], ["4"], ["5"]]
    assert states(store) == ["FAIL", "FAIL", "COMPLETE", "FAIL", "FAIL", "WAITING", "WAITING", "WAITING"]


def test_nothing_is_claimed_where_the_probe_fails(store: Store, tmp_path: Path) -> None:
    def probe(config: Any, architecture: bool, observer: Observer) -> None:
        raise UserError("no such model")

    trainer = Trainer()
    worker = start(store, spec_in(tmp_path, 2), trainer)
    worker._probe = probe
    with pytest.raises(WorkerFault, match="no such model"):
        worker.run()
    assert (trainer.packs, states(store)) == ([], ["WAITING", "WAITING"])


def test_cells_that_this_version_does_not_know_go_back_uncounted(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saeopt.search.space import Space

    config = Space.config

    def newer(self: Space, params: dict[str, Any]) -> Any:
        if params["lr"] > 2.5e-3:
            raise UserError("unknown field 'lr_scheduler_2'")
        return config(self, params)

    worker = start(store, spec_in(tmp_path, 6, retries=0), Trainer(), pack=1)
    monkeypatch.setattr(Space, "config", newer)
    with pytest.raises(WorkerFault, match="lr_scheduler_2"):
        worker.run()
    assert states(store) == ["COMPLETE", "COMPLETE"] + ["WAITING"] * 4


def test_a_process_that_dies_counts_against_its_trials_which_go_behind_alone_and_fail_after_three(
    store: Store, tmp_path: Path
) -> None:
    def before(names: list[str]) -> None:
        if "1" in names:
            raise TrainingDied("its training process was ended by SIGKILL")

    trainer = Trainer(before=before)
    start(store, spec_in(tmp_path, 6), trainer, pack=2).run()
    assert trainer.packs == [["0", "1"], ["2", "3"], ["4", "5"], ["0"], ["1"], ["1"]]
    assert states(store) == ["COMPLETE", "FAIL"] + ["COMPLETE"] * 4
    assert "SIGKILL (3 times without a new checkpoint" in store.study("s").trials[1].user_attrs["reason"]


def test_deaths_with_a_checkpoint_in_between_never_fail_a_trial(store: Store, tmp_path: Path) -> None:
    study_id = create_study(store, spec_in(tmp_path, 1)).study_id
    for samples in range(8, 80, 8):
        (claim,) = claims.claim(store, study_id, 1, {"worker": "w"})
        assert claims.checkpointed(store, claim, samples)
        assert endings.died(store, claim, "killed") == "waiting"


def test_a_deaf_training_goes_back_to_the_queue_with_its_reason(store: Store, tmp_path: Path) -> None:
    trainer = Trainer()

    def before(names: list[str]) -> None:
        if len(trainer.packs) == 1:
            raise TrainingStalled("no progress for 60 s")

    trainer.before = before
    start(store, spec_in(tmp_path, 2), trainer, pack=1).run()
    assert trainer.packs == [["0"], ["1"], ["0"]]
    assert states(store) == ["COMPLETE", "COMPLETE"]


def test_a_study_that_was_made_again_under_its_name_is_not_trained_with_the_old_spec(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker = start(store, spec_in(tmp_path, 2), Trainer())
    store.optuna.delete_study(worker.study_id)
    again = create_study(store, spec_in(tmp_path, 2, max_losses=7)).study_id
    assert again == worker.study_id  # SQLite gives the key anew
    with caplog.at_level(logging.WARNING, "saeopt"):
        assert worker.run() == 0
    assert "was deleted, or made again" in caplog.text
    assert states(store) == ["WAITING", "WAITING"]
    with store.read() as connection:
        assert presence.workers(db.get_attrs(connection, db.study_attrs, again)) == []


def test_a_result_that_cannot_be_stored_fails_its_trial_alone(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = endings.finish

    def refuse(store: Store, claim: states.Claim, *args: Any, **kwargs: Any) -> bool:
        if claim.number == 1:
            raise ValueError("not to be stored")
        return finish(store, claim, *args, **kwargs)

    monkeypatch.setattr(endings, "finish", refuse)
    start(store, spec_in(tmp_path, 3, retries=0), Trainer()).run()
    assert states(store) == ["COMPLETE", "FAIL", "COMPLETE"]


def test_a_study_that_is_deleted_ends_its_worker(store: Store, tmp_path: Path) -> None:
    trainer = Trainer(measure=lambda plan, samples: time.sleep(0.02) or good(plan, samples))  # type: ignore[func-returns-value]
    worker = start(store, spec_in(tmp_path, 2), trainer)
    threading.Timer(0.4, store.optuna.delete_study, (worker.study_id,)).start()
    assert worker.run() == 0
