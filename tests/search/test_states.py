"""The table of transitions, the one function that follows it, and the promises of the queue."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from _stores import grid_spec
from optuna.trial import TrialState
from sqlalchemy import event

import saeopt.trials
from saeopt.trials import claims, endings
from saeopt.trials import internals as db
from saeopt.trials.create import create_study
from saeopt.trials.paused import finish, promote, stand_again
from saeopt.trials.states import TRANSITIONS, State, move
from saeopt.trials.storage import Store

HERE = Path(__file__).parent
PACKAGE = Path(saeopt.trials.__file__).parents[1]
OWNER = {"worker": "w"}


@pytest.fixture
def store(store_address: str) -> Store:
    return Store.open(store_address)


def state(store: Store) -> str:
    """Of the first study's only trial, as the tables have it: Optuna's objects remember ended trials."""
    return next(name for name, n in claims.counts(store, 1).items() if n)


def test_every_transition_of_the_table_is_taken_by_the_queue(store: Store) -> None:
    study, seen = create_study(store, grid_spec(1)).study_id, {(None, TrialState.WAITING)}

    def note(before: str) -> None:
        seen.add((TrialState[before], TrialState[state(store)]))

    for end in ("release", "FAIL", "retry", "COMPLETE"):
        if end == "retry":
            assert endings.retry(store, study) == [0]
            note("FAIL")
            continue
        (claim,) = claims.claim(store, study, 1, OWNER)
        note("WAITING")
        if end == "release":
            assert endings.release(store, claim)
        elif end == "FAIL":
            assert endings.fail(store, claim, "no") == "failed"
        else:
            assert endings.finish(store, claim, "COMPLETE", [1.0, 2.0])
        note("RUNNING")
    other = create_study(store, grid_spec(1, name="t")).study_id
    (claim,) = claims.claim(store, other, 1, OWNER)
    assert endings.finish(store, claim, "PRUNED", None)
    assert store.study("t").trials[0].state == TrialState.PRUNED
    seen.add((TrialState.RUNNING, TrialState.PRUNED))
    seen |= taken_by_what_is_paused(store)
    assert seen == set(TRANSITIONS)


def taken_by_what_is_paused(store: Store) -> set[tuple[State | None, State]]:
    study = create_study(store, grid_spec(1, name="u")).study_id
    seen: set[tuple[State | None, State]] = set()
    before: State = TrialState.RUNNING

    def note() -> None:
        nonlocal before
        name = next(name for name, n in claims.counts(store, study).items() if n)
        now: State = "PAUSED" if name == "PAUSED" else TrialState[name]
        seen.add((before, now))
        before = now

    for after in ("promoted", "ended"):
        (claim,) = claims.claim(store, study, 1, OWNER)
        before = TrialState.RUNNING
        assert endings.pause(store, claim, 16, "behind")
        note()
        if after == "ended":
            assert finish(store, study, None) == [0]
            note()
            with store.write() as connection:
                assert stand_again(connection, study) == [0]
            note()
            assert finish(store, study, None) == [0]
            note()
        assert promote(store, study, [0]) == [0]
        note()
    return seen


@pytest.mark.parametrize("of", [None, *TrialState, "PAUSED"])
@pytest.mark.parametrize("to", [*TrialState, "PAUSED"])
def test_a_move_that_the_table_does_not_know_is_refused(of: State | None, to: State, tmp_path: Path) -> None:
    if (of, to) in TRANSITIONS:
        return
    store = Store.open(f"sqlite:///{tmp_path}/store.db")
    create_study(store, grid_spec(1))
    with store.write() as connection, pytest.raises(ValueError, match=f"to {to if isinstance(to, str) else to.name}"):
        move(connection, [1], to, of=of)  # type: ignore[arg-type]
    assert state(store) == "WAITING"


def test_only_a_claim_that_holds_moves_its_trial(store: Store) -> None:
    study = create_study(store, grid_spec(1)).study_id
    (zombie,) = claims.claim(store, study, 1, OWNER)
    assert endings.reap(store, study, [zombie.trial_id], grace=-1.0, max_losses=9) == [zombie.trial_id]
    (heir,) = claims.claim(store, study, 1, OWNER)
    with store.write() as connection:
        assert move(connection, zombie, TrialState.COMPLETE) == set()
        assert move(connection, [heir.trial_id], TrialState.RUNNING, of=TrialState.WAITING) == set()
    assert state(store) == "RUNNING"
    with store.write() as connection:
        assert move(connection, heir, TrialState.COMPLETE) == {heir.trial_id}
        assert db.get_attrs(connection, db.trial_attrs, heir.trial_id, "saeopt:claim") == {}
    assert store.study("s").trials[0].datetime_complete is not None


def test_a_result_is_stored_as_a_whole_or_not_at_all(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    study = create_study(store, grid_spec(1)).study_id
    (claim,) = claims.claim(store, study, 1, OWNER)
    with pytest.raises(TypeError):
        endings.finish(store, claim, "COMPLETE", [1.0, 2.0], attrs={"not JSON": object()})
    trial = store.study("s").trials[0]
    assert (trial.state.name, trial.values, trial.user_attrs) == ("RUNNING", None, {})
    assert endings.finish(store, claim, "COMPLETE", [1.0, 2.0])


def test_signs_of_life_of_a_pack_cost_as_many_statements_as_one(store: Store) -> None:
    study = create_study(store, grid_spec(8)).study_id
    pack, asked = claims.claim(store, study, 8, OWNER, store.identity(study)), []
    event.listen(store.engine, "before_cursor_execute", lambda *seen: asked.append(seen[2]))
    assert claims.beat(store, pack) == {c.trial_id for c in pack}
    whole = len(asked)
    claims.beat(store, pack[:1])
    assert len(pack) == 8
    assert whole == len(asked) - whole


def test_every_promise_names_tests_that_exist() -> None:
    named = re.findall(r"\btest_\w+", saeopt.trials.__doc__ or "")
    there = {name for file in HERE.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)}
    assert len(named) > 20
    assert set(named) <= there


def sources(*without: str) -> dict[str, str]:
    files = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    return {name: text for name, text in files.items() if not name.startswith(without)}


def test_states_are_written_in_one_place() -> None:
    writing = re.compile(r"\b(change_state|insert_trials)\(")
    found = [name for name, text in sources("trials/internals/").items() if writing.search(text)]
    assert found == ["trials/states.py"]
    assert not [name for name, text in sources().items() if re.search(r"set_trial_state_values|\.tell\(", text)]


def test_tables_and_private_names_of_optuna_are_known_in_one_place() -> None:
    private = re.compile(
        r"optuna[\w.]*\._|optuna_dashboard\._|\b(study|trial|storage|optuna)\._[a-z]|\.c\.[a-z]|"
        r"\bsa\.(select|update|insert|delete)\(|\bFROM (trials|studies|trial_|study_)"
    )
    assert {
        name: found[0]
        for name, text in sources("trials/internals/", "search/ranking").items()
        if (found := private.search(text))
    } == {}


def test_what_to_try_knows_no_database_and_the_queue_no_view() -> None:
    def importing(folder: str, *others: str) -> list[str]:
        wanted = re.compile(rf"^\s*(from|import) saeopt\.({'|'.join(others)})\b", re.M)
        wanted_too = re.compile(rf"^\s*from saeopt import .*\b({'|'.join(others)})\b", re.M)
        here = {name: text for name, text in sources().items() if name.startswith(folder)}
        return [name for name, text in here.items() if wanted.search(text) or wanted_too.search(text)]

    assert importing("search/", "trials", "views", "workers", "training", "activations") == []
    assert importing("trials/", "views", "workers", "training") == []
    assert importing("views/", "workers") == []
    assert not [name for name, text in sources().items() if name.startswith("search/") and "sqlalchemy" in text]
