"""Tensors of files that others wrote: safetensors, and torch's own files without their code."""

from __future__ import annotations

import errno
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeopt.errors import UserError
from saeopt.files import read_error


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        UserError: it is none, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Tensor] = load_file(path)
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path}: truncated or damaged: {error}") from None
    except OSError as error:
        raise read_error(path, error) from error
    return {name: _full(tensor) for name, tensor in found.items()}


def _full(tensor: Tensor) -> Tensor:
    """Numbers in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


def load_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict that `torch.save` wrote; what else a pickle could do is not done.

    Raises:
        UserError: it holds other things, or is damaged.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles by others than torch
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error):
            raise UserError(f"{path}: truncated or damaged: {_first(error)}") from None
        raise UserError(f"{path}: holds pickled objects besides tensors, which are not loaded") from None
    except OSError as error:
        if error.errno == errno.EINVAL:  # a place before the file's start was looked for
            raise UserError(f"{path}: truncated or damaged") from None
        raise read_error(path, error) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path}: truncated or damaged: {_first(error)}") from None
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"{path}: holds no state dict (names and tensors)")
    return {str(name): _full(tensor) for name, tensor in found.items()}


def _first(error: Exception) -> str:
    return str(error).split("\n")[0][:200] or type(error).__name__


def need(path: Path, tensors: Mapping[str, Tensor], names: Sequence[str], also: Sequence[str] = ()) -> None:
    """Refuse a file in which one of these is missing, or in which there is one that is not known.

    Raises:
        UserError: naming it.
    """
    missing = [name for name in names if name not in tensors]
    if missing:
        raise UserError(f"{path}: holds no '{missing[0]}' (but {', '.join(sorted(tensors))[:200]})")
    unknown = sorted(set(tensors) - set(names) - set(also))
    if unknown:
        raise UserError(f"{path}: holds '{unknown[0]}', which is not known of this format")
    for name in names:
        if not bool(tensors[name].isfinite().all()):
            raise UserError(f"{path}: '{name}' is not finite")


def check_shapes(path: Path, W_enc: Tensor, W_dec: Tensor, vectors: Mapping[str, Tensor | None]) -> None:
    """Refuse tensors that do not fit each other (W_enc d × h, W_dec h × e, vectors of h, `b_dec` of e).

    Raises:
        UserError: naming one.
    """
    if W_enc.dim() != 2 or W_dec.dim() != 2 or W_enc.shape[1] != W_dec.shape[0]:
        raise UserError(f"{path}: encoder {tuple(W_enc.shape)} and decoder {tuple(W_dec.shape)} do not fit each other")
    for name, vector in vectors.items():
        width = W_dec.shape[1] if name == "b_dec" else W_dec.shape[0]
        if vector is not None and vector.shape != (width,):
            raise UserError(f"{path}: '{name}' has the shape {tuple(vector.shape)} instead of ({width},)")
