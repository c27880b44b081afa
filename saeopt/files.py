"""Files appear whole or not at all: temporary name, flush, rename. Imports no torch."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from saeopt.errors import HostError

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is too big",
}
_counter = itertools.count()
_fences: dict[Path, Path] = {}


class LostRun(Exception):
    """The run folder is another process's now: nothing of this one may be written into it."""


def fence(folder: Path, scratch: Path) -> None:
    """Write into `folder` by way of `scratch`, a folder in it: when that is gone, so is the right to write."""
    _fences[folder.absolute()] = scratch.absolute()


def unfence(folder: Path) -> None:
    """The folder is written into like any other."""
    _fences.pop(folder.absolute(), None)


def _scratch(target: Path) -> Path | None:
    """Where files of a fenced folder are made; None for any other folder."""
    if not _fences:
        return None
    return next((_fences[folder] for folder in target.absolute().parents if folder in _fences), None)


def is_owned(folder: Path) -> bool:
    """False where `folder` is a fenced one that another process has taken over."""
    scratch = _scratch(folder / "any")
    return scratch is None or scratch.is_dir()


def check_owned(path: Path) -> None:
    """Raise :class:`LostRun` when `path`, a folder or a file in one, is another process's now."""
    if not is_owned(path):
        raise LostRun(f"{path}: another process has taken the run over")


def write_error(path: str | Path, error: BaseException) -> HostError:
    """What a failed write means for a person. Also understands libraries that only give the system's text."""
    number = getattr(error, "errno", None)
    if number is None:
        number = next((n for n in _FULL if f"(os error {n})" in str(error)), None)
    if number in _FULL:
        return HostError(f"{path}: cannot be written: {_FULL[number]}; files written before are intact")
    return HostError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}")


def read_error(path: str | Path, error: BaseException) -> HostError:
    """What a failed read means for a person: the content is not known, so that nothing may be put in its place."""
    return HostError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power loss (where the system can)."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed, on failure it is removed.

    The folder is made where it is missing. Permissions are those of any new file there (umask), also where a library
    puts a file of its own in place of the temporary one.

    Raises:
        HostError: for any :class:`OSError`; it names the file.
        LostRun: it lies in a run folder that another process has taken over.
    """
    target = Path(path)
    scratch = _scratch(target)
    temporary = (scratch or target.parent) / f".{target.name}.{os.getpid()}-{next(_counter)}.tmp"
    try:
        check_owned(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:
            temporary.chmod(mode & 0o7777)
        # append mode: a library may have made the file, and fsync needs a descriptor open for writing
        with temporary.open("ab") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        check_owned(target)
        raise write_error(target, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Delete a file if it is there; in a fenced folder by a rename, which fails for those who have lost it."""
    scratch = _scratch(path)
    if scratch is None:
        path.unlink(missing_ok=True)
        return
    check_owned(path)
    with suppress(FileNotFoundError):
        path.rename(scratch / f".{path.name}.{next(_counter)}.tmp").unlink(missing_ok=True)
    check_owned(path)


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of the folders in which nothing lies, in their order."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write a whole UTF-8 file atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Mapping[str, object] | list[object]) -> None:
    """Write a JSON file atomically; NaN and infinities become null, which every JSON reader takes."""
    write_text(path, json.dumps(jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def digest(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def jsonable(value: object) -> object:
    """`value` with floats that JSON does not have replaced by None."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    return value


def parse_json(text: str) -> Any:
    """JSON; :class:`ValueError` for whatever is none, nested without end too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_sections(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else.
    """
    found = parse_json(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("not an object")
    return found


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a line cut short by a crash is left out, a missing file is empty."""
    file = Path(path)
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []:
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("samples"), int) and isinstance(row.get("hook_point"), str):
            rows.append(row)
    return rows


MEAN = "mean"
"""Where services get the means over hook points of an evaluation, beside each hook point's own."""


def is_evaluation(row: Mapping[str, object]) -> bool:
    """Whether a line of `metrics.jsonl` is one of an evaluation, and not of a log step."""
    return any(name.startswith("eval_") for name in row)


def remove_temporaries(folder: str | Path) -> None:
    """Remove what a killed process left half-written; only the owner of a folder may call this."""
    for leftover in Path(folder).glob(".*.tmp"):
        with suppress(OSError):
            leftover.unlink()
