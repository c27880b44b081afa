"""Files appear whole or not at all: temporary name, flush, rename. Imports no torch."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from saeopt.errors import UserError

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is too big",
}
_counter = itertools.count()


def write_error(path: str | Path, error: BaseException) -> UserError:
    """What a failed write means for a person. Also understands libraries that only give the system's text."""
    number = getattr(error, "errno", None)
    if number is None:
        number = next((n for n in _FULL if f"(os error {n})" in str(error)), None)
    if number in _FULL:
        return UserError(f"{path}: cannot be written: {_FULL[number]}; files written before are intact")
    return UserError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}")


def read_error(path: str | Path, error: BaseException) -> UserError:
    """What a failed read means for a person: the content is not known, so that nothing may be put in its place."""
    return UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}")


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
    puts a file of its own in place of the temporary one. An :class:`OSError` becomes a :class:`UserError` that names
    the file.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{next(_counter)}.tmp")
    try:
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
        raise write_error(target, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


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


def jsonable(value: object) -> object:
    """`value` with floats that JSON does not have replaced by None."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    return value


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a line cut short by a crash is left out, a missing file is empty."""
    file = Path(path)
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "samples" in row and "hook_point" in row:
            rows.append(row)
    return rows


def is_evaluation(row: Mapping[str, object]) -> bool:
    """Whether a line of `metrics.jsonl` is one of an evaluation, and not of a log step."""
    return any(name.startswith("eval_") for name in row)


def remove_temporaries(folder: str | Path) -> None:
    """Remove what a killed process left half-written; only the owner of a folder may call this."""
    for leftover in Path(folder).glob(".*.tmp"):
        with suppress(OSError):
            leftover.unlink()
