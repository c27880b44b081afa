"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from saeopt.errors import UserError
from saeopt.files import atomic_write, read_metrics, remove_temporaries, write_error, write_json, write_text
from saeopt.runs.folder import RunFolder
from saeopt.views.plots import plot_run
from saeopt.views.report import read_evaluation


def write_half(path: Path, error: Exception) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error


def test_a_file_is_replaced_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_the_temporary_name_starts_with_a_dot_and_the_target_stays_old_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert temporary.name.startswith(".")
        assert temporary.parent == tmp_path
        assert path.read_text() == "old"
        file = temporary.stat().st_ino
    assert path.read_text() == "new"
    assert path.stat().st_ino == file  # renamed, not copied: no moment shows half of it


def test_a_failure_inside_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError):
        write_half(path, ZeroDivisionError())
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_one_clear_line_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(UserError, match="disk is full") as error:
        write_half(path, OSError(errno.ENOSPC, "No space left on device"))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_text_of_a_library_is_understood_as_a_full_disk() -> None:
    assert "disk is full" in str(write_error("x", RuntimeError("I/O error: No space left on device (os error 28)")))
    assert "Permission denied" in str(write_error("x", PermissionError(errno.EACCES, "Permission denied")))


def test_a_write_beyond_the_size_limit_of_the_process_leaves_nothing_half_written(tmp_path: Path) -> None:
    """A real short write by the system, in a process of its own because the limit cannot be raised again."""
    program = f"""
import resource, signal
from saeopt.files import write_bytes
from saeopt.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_bytes({str(tmp_path / "file")!r}, b"x" * 100_000)
except UserError as error:
    raise SystemExit(str(error))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "file: cannot be written: the file is too big" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": float("nan"), "y": [float("inf"), 1.5], "z": {"b": True}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "y": [None, 1.5], "z": {"b": True}}


def test_leftovers_of_a_killed_process_can_be_removed(tmp_path: Path) -> None:
    (tmp_path / ".samples_1.safetensors.77-0.tmp").write_text("half")
    (tmp_path / ".keep").write_text("")
    remove_temporaries(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".keep"]


def test_no_flipped_bit_passes_for_a_whole_file_or_ends_in_a_traceback(tmp_path: Path) -> None:
    import torch

    from saeopt.runs.tensor_file import CorruptCheckpoint, read_metadata, read_tensors, verify, write_tensors

    path = tmp_path / "state.safetensors"
    whole = {"hook/a": torch.arange(3.0), "hook/b": torch.tensor(True)}
    write_tensors(path, whole, {"samples": 3})
    original = path.read_bytes()
    for position in range(len(original)):
        for bit in (1, 4, 32):
            changed = bytearray(original)
            changed[position] ^= bit
            path.write_bytes(bytes(changed))
            with pytest.raises(CorruptCheckpoint):
                verify(path)
            with pytest.raises(CorruptCheckpoint):
                (read_metadata(path), read_tensors(path))


UNREADABLE = Path("/proc/self/mem")
"""Opens, and gives EIO when it is read: what a failing disk or a lost file system does."""


def replace_by_unreadable(path: Path) -> bytes:
    """Put something that cannot be read at a file's place; returns what was there."""
    if not UNREADABLE.exists():
        pytest.skip("no /proc/self/mem on this system")
    content = path.read_bytes()
    path.unlink()
    path.symlink_to(UNREADABLE)
    return content


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_umask_decides_who_may_read_a_file_whichever_library_writes_it(tmp_path: Path, umask: int) -> None:
    import torch

    from saeopt.runs.tensor_file import write_tensors

    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(3)}, {})
        write_text(tmp_path / "a.txt", "a")
    finally:
        os.umask(before)
    assert {oct(p.stat().st_mode & 0o777) for p in tmp_path.iterdir()} == {oct(0o666 & ~umask)}


def test_equal_tensors_and_metadata_make_equal_files(tmp_path: Path) -> None:
    import torch

    from saeopt.runs.tensor_file import read_metadata, write_tensors

    tensors = {f"hook/{name}": torch.ones(3) for name in "abc"}
    metadata = {"samples": 3, "cursor": {"header_crc32": 'header_crc32": "'}}
    for i in range(8):  # the order of two metadata keys would be drawn anew each time
        write_tensors(tmp_path / f"{i}.safetensors", tensors, metadata)
    assert len({p.read_bytes() for p in tmp_path.iterdir()}) == 1
    assert read_metadata(tmp_path / "0.safetensors") == metadata


def test_files_with_the_checksums_in_a_key_of_their_own_are_still_verified(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from saeopt.runs.tensor_file import CorruptCheckpoint, read_metadata, read_tensor, read_tensors

    x = torch.arange(3.0)
    sums = {"x": zlib.crc32(x.numpy().tobytes())}
    path = tmp_path / "old.safetensors"
    save_file({"x": x}, path, metadata={"saeopt": json.dumps({"samples": 3}), "crc32": json.dumps(sums)})
    assert read_metadata(path) == {"samples": 3}
    assert torch.equal(read_tensors(path)["x"], x)
    assert torch.equal(read_tensor(path, "x", torch.float32), x)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CorruptCheckpoint, match="'x' has changed"):
        read_tensors(path)


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    import torch

    from saeopt.runs.tensor_file import (
        CorruptCheckpoint,
        read_metadata,
        read_tensor,
        read_tensors,
        verify,
        write_tensors,
    )

    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.ones(3)}, {})
    replace_by_unreadable(path)
    (tmp_path / "folder.safetensors").mkdir()
    readers = (read_metadata, verify, read_tensors, lambda p: read_tensor(p, "x", torch.float32))
    for unreadable, words in {path: "Input/output error", tmp_path / "folder.safetensors": "Is a directory"}.items():
        for reader in readers:
            with pytest.raises(UserError, match=f"cannot be read: {words}") as error:
                reader(unreadable)
            assert not isinstance(error.value, CorruptCheckpoint)


@pytest.mark.parametrize("content", [b"[]", b"5", b"null", b"\xff\xfe", b'{"a": 5}', b"[" * 100_000, b'"text"', b"{}"])
def test_a_run_folder_whose_json_is_something_else_is_read_or_refused_in_one_line(
    content: bytes, tmp_path: Path
) -> None:  # fmt: skip
    folder = RunFolder(tmp_path)
    for path in (folder.status_path, folder.evaluation_path, folder.metrics_path):
        path.write_bytes(content)
    assert "status" not in folder.status()
    assert not folder.evaluation()
    assert read_metrics(folder.metrics_path) == []
    assert plot_run(tmp_path) == []
    folder.rewind_metrics(5)
    if content != b"{}":
        with pytest.raises(UserError, match="holds no evaluation"):
            read_evaluation(tmp_path)
