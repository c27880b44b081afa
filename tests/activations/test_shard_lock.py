"""Nobody waits for a process that has stopped with a shard's lock in its hands."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from filelock import FileLock

from saeopt.activations import shard_lock
from saeopt.activations.shard_lock import Turn, turn


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_lock, "PATIENCE_SECONDS", 0.6)
    monkeypatch.setattr(shard_lock, "_POLL_SECONDS", 0.05)


def test_a_holder_that_makes_no_progress_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / ".000000.lock"
    with FileLock(path), turn(path) as mine:
        assert mine is None


def test_a_holder_that_works_is_waited_for(tmp_path: Path) -> None:
    path, holder, started = tmp_path / ".000000.lock", Turn(tmp_path / ".000000.lock"), threading.Event()

    def work() -> None:
        with FileLock(path):
            started.set()
            for _ in range(30):
                holder.progress()
                threading.Event().wait(0.05)
        holder.over()

    thread = threading.Thread(target=work)
    thread.start()
    started.wait(10)
    with turn(path) as mine:
        assert mine is not None
        assert not thread.is_alive() or thread.join(5) is None
    assert not list(tmp_path.glob("*.progress"))
