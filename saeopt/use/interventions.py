"""What is done to a code before it is decoded, and at which positions.

Shape suffixes: B samples, T positions of one forward pass, h latents, n of them that are changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saeopt.errors import UserError
from saeopt.saes.base import SAE

Positions = str | int | slice | Sequence[int] | Tensor
"""`all`, `last`, a number, a slice, several numbers, or a bool tensor (samples, positions)."""


def check_positions(positions: Positions) -> None:
    """Refuse what cannot mean positions.

    Raises:
        UserError: another word, or a tensor that is not bool (samples, positions).
    """
    if isinstance(positions, str) and positions not in ("all", "last"):
        raise UserError(
            f"positions: '{positions}' must be all, last, a number, a slice, several numbers or a bool tensor"
        )
    if isinstance(positions, Tensor) and (positions.dtype != torch.bool or positions.ndim != 2):
        raise UserError(f"positions: a tensor must be bool (samples, positions), not {_described(positions)}")


def chosen(positions: Positions, shape: tuple[int, int], past: int, device: torch.device) -> Tensor:
    """Which positions of a forward pass are meant, bool (B, T).

    Positions count from the beginning of the text: `past` of them are in the model's key-value cache already.

    Raises:
        UserError: a number beyond the text, or a tensor of another shape.
    """
    end = past + shape[1]
    if isinstance(positions, Tensor):
        if positions.shape not in ((shape[0], shape[1]), (shape[0], end)):
            raise UserError(f"positions: a bool tensor {tuple(positions.shape)} does not fit samples {shape}")
        return positions[:, -shape[1] :].to(device)
    if isinstance(positions, str):
        positions = slice(None) if positions == "all" else -1
    numbers = [positions] if isinstance(positions, int) else positions
    if not isinstance(numbers, slice) and (wrong := [p for p in numbers if not -end <= p < end]):
        raise UserError(f"positions: {wrong[0]} is beyond the {end} positions of the text")
    mask = torch.zeros(end, dtype=torch.bool, device=device)
    mask[numbers if isinstance(numbers, slice) else list(numbers)] = True
    return mask[past:].expand(shape)


@dataclass(frozen=True)
class Intervention:
    """`values` are added to some latents, or put in their place; they broadcast to (B, T, n)."""

    latents_n: Tensor
    values: Tensor
    positions: Positions
    adds: bool

    def apply(self, f_BTh: Tensor, past: int) -> Tensor:
        """The changed code; gradients flow through what is left and through the values."""
        latents_n, values = self.latents_n.to(f_BTh.device), self.values.to(f_BTh)
        f_BTn = f_BTh[..., latents_n]
        new_BTn = f_BTn + values if self.adds else values.expand_as(f_BTn)
        at_BT = chosen(self.positions, (f_BTh.shape[0], f_BTh.shape[1]), past, f_BTh.device)
        return f_BTh.index_copy(-1, latents_n, torch.where(at_BT.unsqueeze(-1), new_BTn, f_BTn))


def indices(sae: SAE, latents: int | Sequence[int] | Tensor) -> Tensor:
    """The latents that are meant, each once.

    Raises:
        UserError: there is none of this number, or one stands twice.
    """
    found = torch.as_tensor([latents] if isinstance(latents, int) else latents)
    if found.is_floating_point() or found.dtype == torch.bool or found.ndim != 1:
        raise UserError(f"latents: give whole numbers, not {_described(found)}")
    if wrong := [i for i in found.tolist() if not 0 <= i < sae.h]:
        raise UserError(f"latents: there is no {wrong[0]}; this SAE has 0 to {sae.h - 1}")
    if len(found.unique()) < len(found):
        raise UserError("latents: one stands twice")
    return found.long().to(sae.W_dec.device)


def amounts(given: float | Tensor, n: int, name: str) -> Tensor:
    """Numbers for n latents, which broadcast to (B, T, n).

    Raises:
        UserError: no numbers, not finite ones, or as many as fit nothing.
    """
    try:
        values = torch.as_tensor(given, dtype=None if isinstance(given, Tensor) else torch.float32)
    except (TypeError, ValueError):
        raise UserError(f"{name}: {given!r} is no number") from None
    if not values.isfinite().all():
        raise UserError(f"{name}: must be finite numbers")
    if values.ndim and values.shape[-1] not in (1, n):
        raise UserError(f"{name}: {tuple(values.shape)} numbers do not fit {n} latents")
    return values


def decoder_lengths(sae: SAE, latents_n: Tensor) -> Tensor:
    """How far the reconstruction moves, in raw units, when a latent's code grows by 1.

    Raises:
        UserError: a latent that writes nothing.
    """
    with torch.no_grad():
        length_n = sae.raw_rows(sae.decoder_rows()[latents_n]).norm(dim=-1)
    if (length_n == 0).any():
        raise UserError(f"latents: {int(latents_n[length_n == 0][0])} has no direction: its decoder row is 0")
    return length_n


def _described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
