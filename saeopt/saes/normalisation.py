"""How activations are normalised, x ↦ ((x − mean) T) · scale, and how that is undone: buffers that lie with the SAE.

`scale` alone: one number per hook point so that E‖x‖ = √d. `mean_scale`: the mean of the first batches' unmasked
tokens is taken away before, E‖x − mean‖ = √d. `whiten`: T = (C + ε·I)^(−1/2) besides, C the covariance and ε
`RIDGE` times its mean eigenvalue, of a size that makes E‖(x − mean) T‖ = √d; scale is 1. Every hook point that is read
or written has its own. An SAE that only scales has none of the further buffers.

Shape suffixes: N tokens, d width read, e width written, h dictionary width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from saeopt.config.saes import SAEConfig

RIDGE = 1e-3
"""What is added to a covariance's eigenvalues, in units of their mean: directions of less variance stay small."""


class Widths(NamedTuple):
    """Widths of the hook points that a dictionary reads and of those that it writes; x and y are these side by side."""

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    same: bool
    """Whether it writes what it reads (a crosscoder); else it is a transcoder."""


class Measured(NamedTuple):
    """What normalises activations whose hook points lie side by side."""

    mean_d: Tensor
    scales: list[float]
    """One number per hook point."""
    whitening_dd: Tensor | None
    unwhitening_dd: Tensor | None


def kind_of(config: SAEConfig, *, legacy_scaling: bool, recipe: int) -> str:
    """`none`, `scale`, `mean_scale` or `whiten`."""
    given = config.normalize_activations
    if legacy_scaling or given is False:
        return "none"
    if given is None:
        return "scale" if recipe < 3 else "mean_scale"
    return "scale" if given is True else given


def measured(x_Nd: Tensor, hooks: Sequence[str], widths: Sequence[int], kind: str) -> Measured:
    """From unmasked activations, in float64.

    Raises:
        ValueError: naming the hook point whose activations cannot be normalised.
    """
    means, scales, blocks, inverses = [], [], [], []
    for hook, part_Nd, width in zip(hooks, x_Nd.double().split(list(widths), dim=-1), widths, strict=True):
        mean_d = part_Nd.mean(0) if kind in ("mean_scale", "whiten") else torch.zeros_like(part_Nd[0])
        centred_Nd = part_Nd - mean_d
        scale = math.sqrt(width) / _mean_norm(hook, centred_Nd)
        if kind == "whiten":
            vectors_dd, roots_d = _eigen(centred_Nd)
            block_dd = (vectors_dd / roots_d) @ vectors_dd.T
            gain = math.sqrt(width) / _mean_norm(hook, centred_Nd @ block_dd)
            blocks.append(block_dd * gain)
            inverses.append((vectors_dd * roots_d) @ vectors_dd.T / gain)
        if kind in ("none", "whiten"):
            scale = 1.0
        means.append(mean_d)
        scales.append(scale)
    whole = (torch.block_diag(*blocks), torch.block_diag(*inverses)) if blocks else (None, None)
    return Measured(torch.cat(means), scales, *whole)


def _eigen(centred_Nd: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the covariance, and the roots of its eigenvalues with the ridge."""
    values_d, vectors_dd = torch.linalg.eigh(centred_Nd.T @ centred_Nd / len(centred_Nd))
    return vectors_dd, (values_d.clamp_min(0) + RIDGE * values_d.mean()).sqrt()


def _mean_norm(hook: str, x_Nd: Tensor) -> float:
    norm = x_Nd.norm(dim=-1).mean().item()
    if not math.isfinite(norm):
        raise ValueError(f"the activations at {hook} are not finite (see lm_dtype)")
    if norm == 0:
        raise ValueError(f"the activations at {hook} are all 0, or all the same")
    return norm


def outlier_severity(x_Nd: Tensor) -> float:
    """γ = ‖μ‖ / ‖σ‖, the mean's length against that of the standard deviations (arXiv 2605.31518)."""
    x_Nd = x_Nd.double()
    spread = x_Nd.var(0, correction=0).sum().sqrt().item()
    return x_Nd.mean(0).norm().item() / spread if spread > 0 else math.inf


class Normalised(nn.Module):
    """The normalising half of an SAE. Methods take and give any number of leading axes."""

    widths: Widths | None
    normalisation: str
    """`none`, `scale`, `mean_scale` or `whiten`."""
    scale: Tensor
    """What normalises x: one number, or one per hook point read."""
    scale_written: Tensor
    """One number per hook point written, where these are not one hook point that is read as well."""
    mean: Tensor
    """d; with `mean_scale` and `whiten` alone, like all that follow."""
    mean_written: Tensor
    """e; beside `scale_written`."""
    whitening: Tensor
    """d × d: T."""
    whitening_written: Tensor
    """e × e; beside `scale_written`."""
    unwhitening: Tensor
    """e × e: the inverse of what whitens y."""

    def _start_normalisation(self, d: int, e: int, like: Tensor) -> None:
        """The buffers of an SAE that leaves activations as they are; `like` has their type and device."""
        widths = self.widths
        self.register_buffer("scale", like.new_ones(() if widths is None else len(widths.reads)))
        if widths is not None:
            self.register_buffer("scale_written", like.new_ones(len(widths.writes)))
        if not self.centres:
            return
        self.register_buffer("mean", like.new_zeros(d))
        if widths is not None:
            self.register_buffer("mean_written", like.new_zeros(e))
        if self.whitens:
            unit = torch.eye(d, dtype=like.dtype, device=like.device)
            self.register_buffer("whitening", unit)
            if widths is not None:
                self.register_buffer("whitening_written", torch.eye(e).to(like))
            self.register_buffer("unwhitening", torch.eye(e).to(like))

    @torch.no_grad()
    def normalise_by(self, read: Measured, written: Measured) -> None:
        """Take over what was measured of x and of y (the same for an autoencoder)."""
        self.scale.copy_(torch.tensor(read.scales, dtype=torch.float64).view_as(self.scale))
        if self.widths is not None:
            self.scale_written.copy_(torch.tensor(written.scales, dtype=torch.float64))
        if self.centres:
            self.mean.copy_(read.mean_d)
            if self.widths is not None:
                self.mean_written.copy_(written.mean_d)
        if self.whitens:
            assert read.whitening_dd is not None
            assert written.whitening_dd is not None
            assert written.unwhitening_dd is not None
            self.whitening.copy_(read.whitening_dd)
            if self.widths is not None:
                self.whitening_written.copy_(written.whitening_dd)
            self.unwhitening.copy_(written.unwhitening_dd)

    @torch.no_grad()
    def _forget_normalisation(self) -> None:
        """Activations are left as they are."""
        for name, buffer in self.normalising():
            if name.startswith("scale"):
                buffer.fill_(1.0)
            elif name.startswith("mean"):
                buffer.zero_()
            else:
                buffer.copy_(torch.eye(len(buffer)))

    def normalising(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of what normalises."""
        named = ("scale", "scale_written", "mean", "mean_written", "whitening", "whitening_written", "unwhitening")
        return ((name, buffer) for name, buffer in self.named_buffers(recurse=False) if name in named)

    @property
    def centres(self) -> bool:
        """Whether something is done to activations before they are scaled."""
        return self.normalisation in ("mean_scale", "whiten")

    @property
    def whitens(self) -> bool:
        """Whether they are multiplied by a matrix."""
        return self.normalisation == "whiten"

    @property
    def read_scale(self) -> Tensor:
        """What x is multiplied by: one number, or d of them."""
        return self.scale if self.widths is None else _spread(self.scale, self.widths.reads)

    @property
    def write_scale(self) -> Tensor:
        """What y is multiplied by: one number, or e of them."""
        return self.scale if self.widths is None else _spread(self.scale_written, self.widths.writes)

    # ---- there
    def centre(self, x_Nd: Tensor) -> Tensor:
        """(x − mean) T in the weights' type; x as it is (in its own type) where nothing is done before the scale."""
        if not self.centres:
            return x_Nd
        centred_Nd = x_Nd.to(self.mean.dtype) - self.mean
        return centred_Nd @ self.whitening if self.whitens else centred_Nd

    def centre_written(self, y_Ne: Tensor) -> Tensor:
        """The same of what is written."""
        if self.widths is None or not self.centres:
            return self.centre(y_Ne)
        centred_Ne = y_Ne.to(self.mean.dtype) - self.mean_written
        return centred_Ne @ self.whitening_written if self.whitens else centred_Ne

    def normalised(self, x_Nd: Tensor) -> Tensor:
        """x as architectures read it."""
        return self.centre(x_Nd).to(self.scale.dtype) * self.read_scale

    def normalised_written(self, y_Ne: Tensor) -> Tensor:
        """y as architectures give it."""
        return self.centre_written(y_Ne).to(self.scale.dtype) * self.write_scale

    # ---- back
    def raw(self, y_Ne: Tensor) -> Tensor:
        """The inverse of :meth:`normalised_written`."""
        raw_Ne = self.raw_rows(y_Ne)
        if not self.centres:
            return raw_Ne
        return raw_Ne + (self.mean if self.widths is None else self.mean_written)

    def raw_rows(self, rows_he: Tensor) -> Tensor:
        """Directions in raw units: without the mean."""
        raw_he = rows_he / self.write_scale
        return raw_he @ self.unwhitening if self.whitens else raw_he

    def raw_reading(self, W_dh: Tensor) -> Tensor:
        """The matrix that gives of (x − mean) what W gives of normalised x."""
        raw_dh = W_dh * self.read_scale.view(-1, 1)
        return self.whitening @ raw_dh if self.whitens else raw_dh

    # ---- and there again, for weights that read and give raw activations
    def normalised_rows(self, rows_he: Tensor) -> Tensor:
        """The inverse of :meth:`raw_rows`."""
        if not self.whitens:
            return rows_he * self.write_scale
        return rows_he @ (self.whitening if self.widths is None else self.whitening_written) * self.write_scale

    def normalised_reading(self, W_dh: Tensor) -> Tensor:
        """The inverse of :meth:`raw_reading`."""
        own_dh = torch.linalg.solve(self.whitening, W_dh) if self.whitens else W_dh
        return own_dh / self.read_scale.view(-1, 1)


def _spread(scale: Tensor, widths: tuple[int, ...]) -> Tensor:
    return scale.repeat_interleave(torch.tensor(widths, device=scale.device), output_size=sum(widths))
