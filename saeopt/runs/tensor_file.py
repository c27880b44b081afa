"""Safetensors files that know when they are damaged: the CRC-32 of each tensor and of the header stand in the metadata.

The metadata have one key: the format's library writes several in a random order, and equal weights would give different
files. Files of older versions, whose checksums have a key of their own and leave the header out, are read as well.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from saeopt.errors import UserError
from saeopt.files import atomic_write, read_error, write_error

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
METADATA_KEY = "saeopt"
_SUMS, _HEADER_SUM = "crc32", "header_crc32"
_MARK = f'{_HEADER_SUM}\\": \\"'.encode()
"""What stands in the header before the 8 digits of its own sum (names, types, shapes, places, metadata)."""
_ZEROS = "0" * 8
"""What these digits count as in the sum."""
_CHUNK = 1 << 24
_SUMMING = 4
"""Threads that sum up tensors of one file."""


class CorruptCheckpoint(UserError):
    """The file is truncated, damaged or not one of ours. Of a file that cannot be read nobody knows that."""


class MissingFile(UserError):
    """There is no such file."""


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What the system refuses is told as that, and never as damage: an intact file would be replaced."""
    try:
        yield
    except FileNotFoundError:
        raise MissingFile(f"{path}: no such file") from None
    except OSError as error:
        raise read_error(path, error) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Write tensors and JSON metadata atomically.

    Raises:
        UserError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # copies: members of a stack are views of shared storage, which the format refuses
    cpu = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    raw = [t.view(-1).view(torch.uint8).numpy().data for t in cpu.values()]
    with ThreadPoolExecutor(_SUMMING) as pool:  # zlib lets other threads go on meanwhile
        sums = dict(zip(cpu, pool.map(zlib.crc32, raw), strict=True))
    content = json.dumps({_HEADER_SUM: _ZEROS, _SUMS: sums, **metadata})
    try:
        with atomic_write(path) as temporary:
            save_file(cpu, temporary, metadata={METADATA_KEY: content})
            with temporary.open("r+b") as file:
                header = file.read(int.from_bytes(file.read(8), "little"))
                file.seek(8 + header.index(_MARK) + len(_MARK))
                file.write(_header_sum(header))
    except SafetensorError as error:
        raise write_error(path, error) from error


def read_metadata(path: Path) -> dict[str, object]:
    """The JSON metadata of a file, after its length has been checked; imports no torch.

    Raises:
        CorruptCheckpoint: truncated, or no file of this system.
        UserError: no such file, or one that cannot be read.
    """
    metadata, _, _ = _header(path)
    try:
        found: dict[str, object] = dict(json.loads(metadata[METADATA_KEY]))
    except (KeyError, ValueError, TypeError):
        raise CorruptCheckpoint(f"{path}: holds no saeopt metadata: not a file of this system") from None
    return {name: value for name, value in found.items() if name not in (_SUMS, _HEADER_SUM)}


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, from the header alone; imports no torch.

    Raises:
        CorruptCheckpoint: as :func:`read_metadata`.
        UserError: no such file, or one that cannot be read.
    """
    return {name: tuple(entry["shape"]) for name, entry in _header(path)[1].items()}


def verify(path: Path) -> None:
    """Read the whole file and compare every checksum.

    Raises:
        CorruptCheckpoint: names the tensor whose bytes differ.
        UserError: the file cannot be read.
    """
    sums, tensors, start = _sums(path)
    with _reading(path), path.open("rb") as file:
        for name, expected in sums.items():
            begin, end = tensors[name]["data_offsets"]
            file.seek(start + begin)
            found, left = 0, end - begin
            while left:
                part = file.read(min(left, _CHUNK))
                if not part:
                    raise CorruptCheckpoint(f"{path}: ends inside '{name}'")
                found, left = zlib.crc32(part, found), left - len(part)
            if found != expected:
                raise CorruptCheckpoint(f"{path}: '{name}' has changed since it was written")


def read_tensor(path: Path, name: str, dtype: torch.dtype, pin: bool = False) -> Tensor:
    """One tensor of a known dtype, read once into memory of its own (pinned, if asked for) and verified there.

    Raises:
        CorruptCheckpoint: as :func:`verify`.
    """
    import torch

    sums, tensors, start = _sums(path)
    if name not in sums:
        raise CorruptCheckpoint(f"{path}: holds no '{name}'")
    begin, end = tensors[name]["data_offsets"]
    raw = torch.empty(end - begin, dtype=torch.uint8, pin_memory=pin)
    into = raw.numpy().data
    with _reading(path), path.open("rb", buffering=0) as file:
        file.seek(start + begin)
        done = 0
        while done < len(into):
            read = file.readinto(into[done:])
            if not read:
                raise CorruptCheckpoint(f"{path}: ends inside '{name}'")
            done += read
    if zlib.crc32(into) != sums[name]:
        raise CorruptCheckpoint(f"{path}: '{name}' has changed since it was written")
    try:
        return raw.view(dtype).view(tensors[name]["shape"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise CorruptCheckpoint(f"{path}: its header is damaged: {error}") from None


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All tensors, verified.

    Raises:
        CorruptCheckpoint: as :func:`verify`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    verify(path)
    try:
        with _reading(path):
            tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, KeyError, ValueError) as error:
        if "(os error " in str(error):
            raise read_error(path, error) from None
        raise CorruptCheckpoint(f"{path}: truncated or damaged: {error}") from None
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _sums(path: Path) -> tuple[dict[str, int], dict[str, Any], int]:
    """The checksums, the tensors' entries of the header, and where their bytes begin."""
    metadata, tensors, start = _header(path)
    try:
        own = json.loads(metadata.get(METADATA_KEY, "{}"))
        sums: dict[str, int] = json.loads(metadata[_SUMS]) if _SUMS in metadata else own.get(_SUMS, {})
        places = [tensors[name]["data_offsets"] for name in sums]
        if len(sums) != len(tensors) or any(not 0 <= begin <= end for begin, end in places):
            raise ValueError
    except (KeyError, ValueError, AttributeError, TypeError, IndexError):
        raise CorruptCheckpoint(f"{path}: its header is damaged") from None
    return sums, tensors, start


def _header_sum(header: bytes) -> bytes:
    """The CRC-32 of a header, in 8 hexadecimal digits."""
    at = header.find(_MARK) + len(_MARK)
    return f"{zlib.crc32(header[:at] + _ZEROS.encode() + header[at + 8 :]):08x}".encode()


def _check_header(raw: bytes, metadata: dict[str, str]) -> None:
    """Raise ValueError for a header that has changed; those of older versions are taken as they are."""
    if _SUMS in metadata and METADATA_KEY in metadata:
        return
    at = raw.find(_MARK) + len(_MARK)
    if at < len(_MARK) or raw[at : at + 8] != _header_sum(raw):
        raise ValueError("its header has changed since it was written")


def _header(path: Path) -> tuple[dict[str, str], dict[str, Any], int]:
    try:
        with _reading(path), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError("truncated")
            raw = file.read(length)
        header = json.loads(raw)
        metadata = header.pop("__metadata__", None)
        if metadata is None:
            raise ValueError("it is none of saeopt's (no metadata)")
        _check_header(raw, metadata)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path}: truncated or damaged: {error}") from None
    if size != 8 + length + end:
        raise CorruptCheckpoint(f"{path}: truncated or damaged: {size} bytes instead of {8 + length + end}")
    return metadata, header, 8 + length


def by_site(tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """`SITE/NAME` → tensor as site → name → tensor; a site's key may hold slashes, a tensor's name holds none."""
    found: dict[str, dict[str, T]] = {}
    for key, tensor in tensors.items():
        site, _, name = key.rpartition("/")
        found.setdefault(site, {})[name] = tensor
    return found
