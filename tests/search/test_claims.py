"""Claims: taken once, fenced, given back; on SQLite and on a real PostgreSQL server."""

from __future__ import annotations

import datetime as dt
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from _processes import create_and_claim
from _stores import PASSWORD, Server, grid_spec, new_database
from sqlalchemy import event

from saeopt.errors import UserError
from saeopt.search.space import Space
from saeopt.trials import claims, endings, presence, states
from saeopt.trials import internals as db
from saeopt.trials.create import create_study
from saeopt.trials.heart import Heart
from saeopt.trials.presence import Presence
from saeopt.trials.storage import IDENTITY_KEY, Store, StudyGone, persistently, store_url

OWNER = {"worker": "test"}


@pytest.fixture
def store(store_address: str) -> Any:
    opened = Store.open(store_address)
    yield opened
    opened.close()


def make(store: Store, n: int = 12, **fields: Any) -> int:
    return create_study(store, grid_spec(n, **fields)).study_id


def run_together(address: str, folder: Path, processes: int, cells: int, limit: int = 1) -> list[int]:
    """Start processes that create, claim and finish at one instant; the numbers that they finished."""
    (folder / "spec.json").write_text(grid_spec(cells).to_json())
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["saeopt.trials.create", "saeopt.saes.relu", "psycopg"])  # imported once, not N times
    at = time.time() + 6
    outs = [folder / f"out{i}" for i in range(processes)]
    started = [
        forks.Process(
            target=create_and_claim, args=(address, folder / "spec.json", out, at, limit, i % 4 == 0), daemon=True
        )
        for i, out in enumerate(outs)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=120)
        assert process.exitcode == 0
    return sorted(int(n) for out in outs for n in out.read_text().split())


@pytest.mark.slow  # twelve processes on two cores
def test_twelve_workers_that_start_at_one_instant_on_a_fresh_store_share_the_cells(
    store_address: str, tmp_path: Path
) -> None:
    assert run_together(store_address, tmp_path, 12, 60) == list(range(60))
    assert claims.counts(Store.open(store_address), 1)["COMPLETE"] == 60


@pytest.mark.slow
def test_packs_are_claimed_exactly_once(store_address: str, tmp_path: Path) -> None:
    assert run_together(store_address, tmp_path, 4, 100, limit=8) == list(range(100))


def test_a_claim_takes_the_first_waiting_trials_of_one_stream(store: Store) -> None:
    study = make(store, space={"data.train_batch_size": [4, 8], "lr": [1e-3, 2e-3, 3e-3]})
    first = claims.claim(store, study, 8, OWNER)
    second = claims.claim(store, study, 8, OWNER)
    assert [c.number for c in first] == [0, 1, 2]
    assert [c.number for c in second] == [3, 4, 5]
    assert first[0].stream != second[0].stream
    assert first[1].params == {"data.train_batch_size": 4, "lr": 2e-3}
    assert claims.claim(store, study, 8, OWNER) == []


def test_trials_at_different_checkpoints_do_not_share_a_pack(store: Store) -> None:
    study = make(store, 4)
    for claim, checkpoint in zip(claims.claim(store, study, 4, OWNER), (32, None, 32, None), strict=True):
        assert endings.release(store, claim, checkpoint)
    packs = [claims.claim(store, study, 4, OWNER) for _ in range(2)]
    assert [[(c.number, c.checkpoint) for c in pack] for pack in packs] == [[(0, 32), (2, 32)], [(1, 0), (3, 0)]]


def lose(store: Store, study: int, claim: states.Claim, max_losses: int = 10) -> None:
    time.sleep(0.02)
    assert endings.reap(store, study, [claim.trial_id], grace=0.01, max_losses=max_losses) == [claim.trial_id]


def test_a_lost_trial_keeps_its_number_and_the_zombie_can_do_nothing(store: Store) -> None:
    study = make(store, 1)
    (zombie,) = claims.claim(store, study, 1, OWNER)
    assert claims.checkpointed(store, zombie, 16)
    lose(store, study, zombie)
    (heir,) = claims.claim(store, study, 1, OWNER)
    assert (heir.number, heir.trial_id, heir.checkpoint) == (0, zombie.trial_id, 16)
    assert claims.beat(store, [zombie]) == set()
    assert not claims.report(store, zombie, 1, 0.5)
    assert not claims.checkpointed(store, zombie, 99)
    assert not endings.release(store, zombie)
    assert not endings.finish(store, zombie, "COMPLETE", [9.0, 9.0])
    assert endings.fail(store, zombie, "late") == "waiting"
    assert claims.beat(store, [heir]) == {heir.trial_id}
    assert endings.finish(store, heir, "COMPLETE", [1.0, 0.5])
    assert not endings.finish(store, heir, "COMPLETE", [2.0, 0.5])
    assert store.study("s").trials[0].values == [1.0, 0.5]


def test_a_living_trial_is_not_reaped(store: Store) -> None:
    study = make(store, 1)
    (claim,) = claims.claim(store, study, 1, OWNER)
    assert endings.reap(store, study, [claim.trial_id], grace=20, max_losses=10) == []
    assert claims.counts(store, study)["RUNNING"] == 1


def test_losses_count_until_a_new_checkpoint(store: Store) -> None:
    study = make(store, 1)
    for round_ in range(5):
        (claim,) = claims.claim(store, study, 1, OWNER)
        if round_ % 2:
            claims.checkpointed(store, claim, 16 * (round_ + 1))
        lose(store, study, claim, max_losses=3)
    assert claims.counts(store, study)["WAITING"] == 1
    (claim,) = claims.claim(store, study, 1, OWNER)
    lose(store, study, claim, max_losses=3)
    trial = store.study("s").trials[0]
    assert trial.state.name == "FAIL"
    assert "lost 3 times" in trial.user_attrs["reason"]


def test_a_trial_that_was_lost_twice_is_claimed_alone(store: Store) -> None:
    study = make(store, 3)
    for _ in range(2):
        taken = claims.claim(store, study, 1, OWNER)
        lose(store, study, taken[0])
    assert [c.number for c in claims.claim(store, study, 3, OWNER)] == [0]
    assert [c.number for c in claims.claim(store, study, 3, OWNER)] == [1, 2]


def test_a_failed_trial_is_tried_again_until_its_retries_are_used_up(store: Store) -> None:
    study = make(store, 1)
    for where in ("waiting", "waiting", "failed"):
        (claim,) = claims.claim(store, study, 1, OWNER)
        assert endings.fail(store, claim, "ValueError: no", "Traceback …", retries=2) == where
    trial = store.study("s").trials[0]
    assert (trial.state.name, trial.user_attrs["reason"]) == ("FAIL", "ValueError: no")
    assert trial.user_attrs["traceback"] == "Traceback …"
    assert endings.retry(store, study) == [0]
    assert [c.number for c in claims.claim(store, study, 1, OWNER)] == [0]


def test_a_released_trial_counts_nothing(store: Store) -> None:
    study = make(store, 1)
    for _ in range(15):
        (claim,) = claims.claim(store, study, 1, OWNER)
        assert endings.release(store, claim)
    assert "saeopt:losses" not in store.study("s").trials[0].system_attrs


def test_a_stopped_study_gives_no_trials(store: Store) -> None:
    study = make(store, 1)
    claims.set_stopped(store, study, True)
    assert claims.claim(store, study, 1, OWNER) == []
    claims.set_stopped(store, study, False)
    assert len(claims.claim(store, study, 1, OWNER)) == 1


def test_creation_is_idempotent_and_refuses_another_spec(store: Store) -> None:
    assert create_study(store, grid_spec(6)).is_new
    again = create_study(store, grid_spec(6))
    assert (again.is_new, again.n_trials) == (False, 6)
    with pytest.raises(UserError, match=r"different 'space\.lr'"):
        create_study(store, grid_spec(7))
    assert store.spec("s").model_dump() == grid_spec(6).model_dump()
    assert store.study("s").metric_names == ["l0", "explained_variance"]


@contextmanager
def statements(store: Store) -> Iterator[list[str]]:
    """What the store is asked meanwhile; a statement with many rows counts once."""
    asked: list[str] = []

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        asked.append(statement)

    event.listen(store.engine, "before_cursor_execute", note)
    yield asked
    event.remove(store.engine, "before_cursor_execute", note)


@pytest.mark.slow  # a thousand run configs are validated
def test_a_thousand_cells_cost_the_store_few_statements(store: Store) -> None:
    space = {"lr": [(i + 1) * 1e-4 for i in range(50)], "seed": list(range(20))}
    small, spec = make(store, 2), grid_spec(1, name="large", space=space)
    with statements(store) as creating:
        study = create_study(store, spec).study_id
    with statements(store) as claiming_of_two:
        assert len(claims.claim(store, small, 1, OWNER)) == 1
    with statements(store) as claiming:
        assert len(claims.claim(store, study, 1, OWNER)) == 1
    assert len(creating) < 30
    assert len(claiming) == len(claiming_of_two)
    (row,) = [p for p in Space(spec).parameters if p.name == "lr"]
    assert len(row.choices) == 50


@pytest.mark.slow  # a server crashes, recovers and is waited for
def test_a_database_that_restarts_loses_nothing(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    import threading

    address = new_database(server, f"restart_{os.getpid()}")
    store = Store.open(address)
    study = make(store, 3)
    (claim,) = claims.claim(store, study, 1, OWNER)
    restarting = threading.Thread(target=server.restart, args=(3.0,))
    restarting.start()
    time.sleep(1.0)
    with caplog.at_level(logging.WARNING, "saeopt"):
        assert persistently(lambda: endings.finish(store, claim, "COMPLETE", [1.0, 2.0]), "telling", 60)
    restarting.join()
    assert claims.counts(store, study)["COMPLETE"] == 1
    assert PASSWORD not in caplog.text
    store.close()


def test_the_password_is_never_shown(server: Server) -> None:
    wrong = server.url("postgres").replace(PASSWORD, "not-the-password-77")
    with pytest.raises(UserError) as error:
        Store.open(wrong)
    assert "not-the-password-77" not in str(error.value)
    assert "authentication failed" in str(error.value)
    store = Store.open(new_database(server, f"shown_{os.getpid()}"))
    assert PASSWORD not in store.shown
    assert PASSWORD not in repr(store.url)
    store.close()


@pytest.mark.parametrize(
    ("given", "driver"),
    [
        ("postgres://u:p@h/d", "postgresql+psycopg"), ("postgresql://u@h/d", "postgresql+psycopg"),
        ("sqlite:///x.db", "sqlite"), ("x.db", "sqlite"),
    ],
)  # fmt: skip
def test_addresses_are_normalised(given: str, driver: str) -> None:
    assert store_url(given).drivername == driver


@pytest.mark.parametrize("given", ["mysql://u:secret-word@h/d", "nonsense", "sqlite://"])
def test_other_stores_are_refused_in_one_line(given: str) -> None:
    with pytest.raises(UserError) as error:
        store_url(given)
    assert "secret-word" not in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        "postgresql://u:a@b:sesame@h/db",
        "postgresql://u:a@sesame@h/db",
        "postgresql://u@x:sesame@h:5432:1/db",
        "postgresql://u:se:sa@me@h/db",
    ],
)
def test_a_mistake_in_an_address_shows_nothing_of_it(given: str) -> None:
    with pytest.raises(UserError, match="%40") as error:
        store_url(given)
    assert "same" not in str(error.value)
    assert error.value.__cause__ is None


def test_passwords_in_the_query_of_an_address_are_hidden() -> None:
    from saeopt.config.settings import redact
    from saeopt.trials.storage import shown

    parsed = store_url("postgresql://u:p@h/db?sslmode=require&sslpassword=open-sesame")
    assert "sesame" not in shown(parsed)
    assert "sslmode=require" in shown(parsed)
    assert "sesame" not in redact("connection failed: open-sesame")
    assert redact("dsn host=h sslpassword=barley password=rye db=x") == "dsn host=h sslpassword=*** password=*** db=x"


def test_a_server_that_is_not_there_is_one_line() -> None:
    with pytest.raises(UserError, match="cannot open the store"):
        Store.open("postgresql://u:secret-word@127.0.0.1:9/d", patience=0.5)


def test_a_claim_of_another_study_under_the_same_key_is_refused(store: Store) -> None:
    study = make(store, 2)
    identity = store.identity(study)
    assert store.identity(study) == identity
    (claim,) = claims.claim(store, study, 1, OWNER, identity)
    with store.write() as connection:
        db.set_attrs(connection, db.study_attrs, study, {IDENTITY_KEY: "another"})
    with pytest.raises(StudyGone):
        claims.claim(store, study, 1, OWNER, identity)
    assert claims.beat(store, [claim]) == set()
    assert not claims.report(store, claim, 1, 0.5)
    assert not endings.finish(store, claim, "COMPLETE", [1.0, 0.5])
    assert not endings.release(store, claim)


def test_a_study_of_an_older_version_is_given_an_identity_once(store: Store) -> None:
    study = make(store, 1)
    with store.write() as connection:
        db.drop_attrs(connection, db.study_attrs, study, [IDENTITY_KEY])
    assert store.identity(study) == store.identity(study) != ""


def test_trials_that_had_trouble_come_after_the_untouched_and_never_join_them(store: Store) -> None:
    study = make(store, 6)
    first = claims.claim(store, study, 2, OWNER)
    assert endings.died(store, first[0], "killed") == "waiting"
    assert endings.release(store, first[1], reason="the disk is full")
    packs = [[c.number for c in claims.claim(store, study, 8, OWNER)] for _ in range(3)]
    assert packs == [[2, 3, 4, 5], [0], [1]]


def test_three_deaths_without_a_checkpoint_in_between_fail_a_trial_and_a_retry_forgets_them(store: Store) -> None:
    study = make(store, 1)
    where = []
    for samples in (8, None, None):
        (claim,) = claims.claim(store, study, 1, OWNER)
        if samples:
            assert claims.checkpointed(store, claim, samples)
        where.append(endings.died(store, claim, "its training process was ended by SIGSEGV"))
    assert where == ["waiting", "waiting", "failed"]
    assert "SIGSEGV (3 times" in store.study("s").trials[0].user_attrs["reason"]
    assert endings.retry(store, study) == [0]
    (claim,) = claims.claim(store, study, 1, OWNER)
    assert endings.died(store, claim, "killed") == "waiting"


def test_a_trial_without_progress_counts_as_lost_and_says_why(store: Store) -> None:
    study = make(store, 1)
    for _ in range(2):
        (claim,) = claims.claim(store, study, 1, OWNER)
        assert endings.stalled(store, claim, "no progress for 60 s", max_losses=2)
    (trial,) = store.study("s").trials
    assert trial.state.name == "FAIL"
    assert "no progress for 60 s" in trial.user_attrs["reason"]


def test_the_sign_of_a_dead_worker_whose_clock_ran_ahead_does_not_keep_its_trial(store: Store) -> None:
    study = make(store, 1)
    (claim,) = claims.claim(store, study, 1, OWNER)
    ahead = dt.datetime.now(dt.UTC).replace(tzinfo=None, microsecond=0) + dt.timedelta(hours=1)
    with store.write() as connection:
        connection.execute(db.heartbeats.update().values(heartbeat=ahead))
    assert endings.reap(store, study, [claim.trial_id], grace=20, max_losses=10) == []
    moved = {claim.trial_id: ahead - dt.timedelta(seconds=1)}
    assert endings.reap(store, study, [claim.trial_id], 20, 10, moved) == []
    assert endings.reap(store, study, [claim.trial_id], 20, 10, {claim.trial_id: ahead}) == [claim.trial_id]


def test_a_heart_reaps_by_what_it_has_seen_itself(store: Store) -> None:
    spec = grid_spec(1, heartbeat=0.1, grace=0.6)
    study = create_study(store, spec).study_id
    claims.claim(store, study, 1, OWNER)
    ahead = dt.datetime.now(dt.UTC).replace(tzinfo=None) + dt.timedelta(hours=1)
    with store.write() as connection:
        connection.execute(db.heartbeats.update().values(heartbeat=ahead))
    heart = Heart(store, study, spec, Presence("w", "h", "cpu", 1, time.time()))
    heart.start()
    end = time.monotonic() + 20
    while claims.counts(store, study)["WAITING"] == 0:
        assert time.monotonic() < end
        time.sleep(0.05)
    heart.stop()


def test_a_worker_seen_in_the_future_is_not_alive_and_progress_has_an_age(store: Store) -> None:
    study = make(store, 1)
    for name, quiet in (("a", 40.0), ("b", None)):
        presence.beat(store, study, Presence(name, "h", "cpu", 1, time.time(), quiet=quiet))
    with store.read() as connection:
        attributes = db.get_attrs(connection, db.study_attrs, study)
        now = db.db_time(connection)
    here = {w.worker: w for w in presence.workers(attributes, now)}
    assert here["a"].alive
    assert here["a"].progress_age == pytest.approx(40, abs=5)
    assert here["b"].progress_age is None
    assert not any(w.alive for w in presence.workers(attributes, now - 3600))
