"""Who has lost a run folder can write nothing more into it, wherever in a write it had been stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saeopt.files import LostRun, atomic_write, remove, write_text
from saeopt.runs.folder import RunFolder
from saeopt.runs.owner import Owner, owners


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    return run


def another_process_takes(folder: RunFolder, owner: Owner) -> None:
    """As in another process: this one goes on believing that the folder is its own."""
    from saeopt import files

    fences = dict(files._fences)
    owner.take(folder.path)
    files._fences.clear()
    files._fences.update(fences)


def taken(folder: RunFolder) -> Owner:
    mine = Owner("study", 1)
    mine.take(folder.path)
    return mine


def test_a_rename_fails_where_the_folder_was_taken_in_the_middle_of_a_write(folder: RunFolder) -> None:
    mine, heir = taken(folder), Owner("study", 2)
    write_text(folder.path / "status.json", "first")

    def write_late() -> None:
        with atomic_write(folder.path / "status.json") as temporary:
            temporary.write_text("late")
            another_process_takes(folder, heir)

    with pytest.raises(LostRun):
        write_late()
    assert (folder.path / "status.json").read_text() == "first"
    assert [o for o, _ in owners(folder.path)] == [heir]
    mine.leave(folder.path)
    assert heir.owns(folder.path)


def test_nothing_is_written_appended_or_deleted_after_the_folder_was_taken(folder: RunFolder) -> None:
    taken(folder)
    folder.append_metrics([{"samples": 1}])
    write_text(folder.state_path(8), "state")
    another_process_takes(folder, Owner("study", 2))
    before = {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}
    for write in (
        lambda: folder.append_metrics([{"samples": 2}]),
        lambda: folder.write_status("finished", 8, None),
        lambda: write_text(folder.weights_path(8), "weights"),
        lambda: remove(folder.state_path(8)),
        lambda: folder.rewind(0),
    ):
        with pytest.raises(LostRun):
            write()
    assert {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()} == before


def test_a_row_that_was_under_way_when_the_folder_was_taken_goes_nowhere(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saeopt.runs import folder as run_folder

    taken(folder)
    folder.append_metrics([{"samples": 1, "hook_point": "h"}])
    check = run_folder.check_owned

    def stopped_after_the_check(path: Path) -> None:
        check(path)
        another_process_takes(folder, Owner("study", 2))
        heir = Path(str(folder.metrics_path))
        text = heir.read_text()
        heir.unlink()  # as the heir's rewind: a new file in the place of the old
        heir.write_text(text)

    monkeypatch.setattr(run_folder, "check_owned", stopped_after_the_check)
    folder.append_metrics([{"samples": 2, "hook_point": "h"}])
    rows = [json.loads(line)["samples"] for line in folder.metrics_path.read_text().splitlines()]
    assert rows == [1]


def test_an_earlier_claim_of_the_same_study_cannot_take_the_folder_back(folder: RunFolder) -> None:
    heir = Owner("study", 2)
    heir.take(folder.path)
    with pytest.raises(LostRun):
        Owner("study", 1).take(folder.path)
    assert heir.owns(folder.path)
    stranger = Owner("user", 1)
    stranger.take(folder.path)
    assert not heir.owns(folder.path)
    stranger.leave(folder.path)
    assert not folder.path.exists()  # nothing had been written


def test_what_a_killed_owner_left_half_written_goes_with_its_folder(folder: RunFolder) -> None:
    dead = taken(folder)
    (dead.folder(folder.path) / ".samples_8.safetensors.1-1.tmp").write_text("half")
    heir = Owner("study", 2)
    heir.take(folder.path)
    heir.leave(folder.path)
    assert not folder.path.exists()
