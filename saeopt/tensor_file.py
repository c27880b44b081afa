"""Safetensors files that know when they are damaged: every tensor's CRC-32 stands in the metadata."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from saeopt.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 1 << 24


class DamagedFile(Exception):
    """The file is truncated or its bytes have changed."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Write tensors and JSON metadata atomically.

    Raises:
        UserError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    from safetensors.torch import save_file

    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sums = {name: zlib.crc32(memoryview(tensor.view(-1).numpy()).cast("B")) for name, tensor in cpu.items()}
    header = {"saeopt": json.dumps(metadata), "crc32": json.dumps(sums)}
    with atomic_write(path) as temporary:
        save_file(cpu, temporary, metadata=header)


def read_metadata(path: Path) -> dict[str, object]:
    """The JSON metadata of a file, after its length has been checked; imports no torch.

    Raises:
        DamagedFile: truncated, or no file of this kind.
    """
    metadata, _, _ = _header(path)
    found: dict[str, object] = json.loads(metadata["saeopt"])
    return found


def verify(path: Path) -> None:
    """Read the whole file and compare every checksum.

    Raises:
        DamagedFile: names the tensor whose bytes differ.
    """
    metadata, tensors, start = _header(path)
    sums: dict[str, int] = json.loads(metadata.get("crc32", "{}"))
    with path.open("rb") as file:
        for name, expected in sums.items():
            begin, end = tensors[name]["data_offsets"]
            file.seek(start + begin)
            found, left = 0, end - begin
            while left:
                part = file.read(min(left, _CHUNK))
                if not part:
                    raise DamagedFile(f"{path}: ends inside '{name}'")
                found, left = zlib.crc32(part, found), left - len(part)
            if found != expected:
                raise DamagedFile(f"{path}: '{name}' has changed since it was written")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors, on the CPU, verified."""
    from safetensors.torch import load_file

    verify(path)
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def _header(path: Path) -> tuple[dict[str, str], dict[str, dict[str, list[int]]], int]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise DamagedFile(f"{path}: truncated")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__")
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(f"{path}: not a readable checkpoint file ({error})") from None
    if size != 8 + length + end:
        raise DamagedFile(f"{path}: {size} bytes instead of {8 + length + end}")
    return metadata, header, 8 + length
