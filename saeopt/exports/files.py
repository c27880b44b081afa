"""Tensors on disk for formats that are not ours: no metadata and no checksums, equal files for equal weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from saeopt.files import atomic_write, write_error

if TYPE_CHECKING:
    from torch import Tensor


def save_tensors(path: Path, tensors: Mapping[str, Tensor | None]) -> Path:
    """Write a safetensors file; what is None is left out.

    Raises:
        HostError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    cpu = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items() if t is not None}
    try:
        with atomic_write(path) as temporary:
            save_file(cpu, temporary)
    except SafetensorError as error:
        raise write_error(path, error) from error
    return path
