"""Token ids as arrays on disk: `.npy`, and the raw `.bin` files of nanoGPT and llm.c. Nothing is copied into memory.

Rows of a two-dimensional array are full blocks. A one-dimensional array is one long stream: its documents lie between
the separators in it, and without any it is cut into blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saeopt.activations.pretrained import one_line
from saeopt.errors import UserError

if TYPE_CHECKING:
    from saeopt.config.run import DataConfig

_HEADER_BYTES = 1024
_HEADERS = {20240520: "uint16", 20240801: "uint32"}
"""What llm.c writes at the beginning of its files: a number that says the type, the version, the number of tokens."""
_SCANNED = 1 << 24


def open_token_files(files: Sequence[Path], data: DataConfig) -> list[NDArray[Any]]:
    """The arrays of token files, mapped into memory.

    Raises:
        UserError: a file of another content, or a type that nobody knows.
    """
    try:
        return [_npy(file, data) if file.suffix.lower() == ".npy" else _bin(file, data) for file in files]
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"'data.dataset_name': {data.dataset_name}: cannot be read: {one_line(error)}") from None


def _npy(file: Path, data: DataConfig) -> NDArray[Any]:
    array: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    if not np.issubdtype(array.dtype, np.integer) or array.ndim not in (1, 2):
        raise UserError(
            f"'data.dataset_name': {file}: holds {array.dtype} of {array.ndim} dimensions, not token ids in one or two"
        )
    if data.token_dtype not in (None, array.dtype.name):
        raise UserError(f"'data.token_dtype': {file} holds {array.dtype}, not {data.token_dtype}")
    return array


def _bin(file: Path, data: DataConfig) -> NDArray[Any]:
    size = file.stat().st_size
    begin = np.fromfile(file, dtype="<i4", count=3)
    if len(begin) == 3 and int(begin[0]) in _HEADERS and size > _HEADER_BYTES:
        dtype = np.dtype(_HEADERS[int(begin[0])])
        if data.token_dtype not in (None, dtype.name):
            raise UserError(f"'data.token_dtype': {file} says in its header that it holds {dtype}")
        if _HEADER_BYTES + int(begin[2]) * dtype.itemsize != size:
            raise UserError(f"'data.dataset_name': {file}: {size} bytes, but its header says {begin[2]} tokens")
        return np.memmap(file, dtype=dtype, mode="r", offset=_HEADER_BYTES)
    if data.token_dtype is None:
        raise UserError(f"'data.token_dtype': {file} does not say how its tokens are stored: give uint16, uint32, …")
    dtype = np.dtype(data.token_dtype)
    if size % dtype.itemsize:
        raise UserError(f"'data.token_dtype': {file}: {size} bytes are no whole number of {dtype} values")
    return np.memmap(file, dtype=dtype, mode="r") if size else np.zeros(0, dtype)


def find_separator(arrays: Iterable[NDArray[Any]], candidates: Sequence[int]) -> int | None:
    """The first of the candidates that occurs."""
    streams = [array for array in arrays if array.ndim == 1]
    return next((c for c in candidates if any((p == c).any() for a in streams for p in _parts(a))), None)


def spans(array: NDArray[Any], separator: int | None, before: bool, block: int) -> tuple[NDArray[np.int64], ...]:
    """Begin and end of every document in the flat array."""
    if array.ndim == 2:
        edges = np.arange(len(array) + 1, dtype=np.int64) * array.shape[1]
    elif separator is None:
        edges = np.append(np.arange(0, len(array), block, dtype=np.int64), len(array))
    else:
        found = [np.flatnonzero(part == separator) + i * _SCANNED for i, part in enumerate(_parts(array))]
        inner = np.concatenate(found, dtype=np.int64) + (0 if before else 1) if found else np.zeros(0, np.int64)
        edges = np.unique(np.concatenate([[0], inner, [len(array)]])).astype(np.int64)
    return edges[:-1], edges[1:]


def _parts(array: NDArray[Any]) -> Iterable[NDArray[Any]]:
    return (array[i : i + _SCANNED] for i in range(0, len(array), _SCANNED))
