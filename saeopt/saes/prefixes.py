"""Prefixes of the dictionary that reconstruct by themselves: Matryoshka SAEs (Bussmann et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from saeopt.config.base import Float
from saeopt.config.marks import Stack
from saeopt.config.saes import SAEConfig
from saeopt.errors import UserError
from saeopt.saes.base import SAE

Prefixes = Annotated[list[Annotated[Float, Field(gt=0)]], Field(min_length=1)] | None


class PrefixConfig(SAEConfig):
    """Fields of the architectures whose dictionary may be nested."""

    prefixes: Stack[Prefixes] = None
    """Matryoshka: each of these first parts of the dictionary reconstructs by itself, and the squared error is the mean
    over them. Shares of the dictionary (up to 1) or numbers of latents (above 1), rising, the whole dictionary last;
    null: the whole alone."""


class PrefixSAE(SAE):
    """An SAE whose squared error may be that of nested dictionaries (arXiv 2503.17547); all else is of the whole."""

    config: PrefixConfig

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.prefixes = prefix_widths(self.config.prefixes or [1.0], self.h)

    def reconstructed(self, f_Nh: Tensor, y_Ne: Tensor, keep_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """ŷ from the whole code, and :meth:`squared_error` in the mean over the prefixes."""
        if not self.prefixes:
            y_hat_Ne = self.reconstruct(f_Nh)
            return y_hat_Ne, self.squared_error(y_hat_Ne, y_Ne, keep_N)
        y_hat_Ne, errors = self.b_dec, []
        for start, end in pairwise((0, *self.prefixes)):
            y_hat_Ne = y_hat_Ne + f_Nh[:, start:end] @ self.W_dec[start:end]
            errors.append(self.squared_error(y_hat_Ne, y_Ne, keep_N))
        return y_hat_Ne, torch.stack(errors).mean()


def prefix_widths(given: Sequence[float], h: int) -> tuple[int, ...]:
    """Latents of each prefix, at least 1; shares that are the same number of latents count once.

    Nothing where the only prefix is the whole.

    Raises:
        UserError: they do not rise, or do not end with the whole dictionary.
    """
    widths: list[int] = []
    for before, prefix in pairwise((0.0, *given)):
        width = max(1, round(prefix * h)) if prefix <= 1 else round(prefix)
        same = widths and width == widths[-1] and before < prefix <= 1
        widths += [] if same else [width]
    if any(a >= b for a, b in pairwise(widths)) or widths[-1] != h:
        shown = ", ".join(map(str, widths))
        raise UserError(
            f"'saes.prefixes': must rise and end with 1 (the whole dictionary, {h} latents); they have {shown} latents"
        )
    return tuple(widths) if len(widths) > 1 else ()
