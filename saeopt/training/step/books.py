"""What a window means for a member, once for all steps: whether it may step, its counters and its metrics.

A window that is not finite changes nothing, and its member is finite 0 from then on. Shape suffixes as in `contract`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saeopt.saes.base import SAE
from saeopt.training.step.contract import StackOptions, Store

_PENDING = {"n": (), "steps": (), "means": (6,), "grad_norm": ()}
_START_SCALE = 2.0**12
_GROWTH_STEPS = 2000  # float16: the loss scale doubles after so many finite steps (torch.amp.GradScaler's default)
_LEAST_SCALE = 2.0**-10
_LARGEST_RATE = 1e12
"""A learning rate above it is taken for what it is: an overflow. Below it, no finite gradient makes Adam overflow."""


class Books:
    """`flags` and `pending` metrics of M members, in float64 on the device."""

    def __init__(self, saes: Sequence[SAE], options: StackOptions) -> None:
        device, size = saes[0].W_enc.device, len(saes)
        self.options, self.has_aux, self.scaled = options, saes[0].needs_dead, options.autocast == torch.float16
        scale = _START_SCALE if self.scaled else 1.0
        self.pending: Store = {n: zeros(size, *shape, device=device) for n, shape in _PENDING.items()}
        self.flags: Store = {
            "step": zeros(size, device=device),
            "finite": torch.ones(size, dtype=torch.bool, device=device),
            "loss_scale": torch.full((size,), scale, dtype=torch.float32, device=device),
            "good_steps": zeros(size, device=device),
        }

    def state(self, member: int) -> Store:
        """One member's pages."""
        pending = {f"pending.{name}": tensor[member] for name, tensor in self.pending.items()}
        return {**pending, **{name: tensor[member] for name, tensor in self.flags.items()}}

    def remove(self, member: int) -> None:
        """Without one member."""
        for store in (self.pending, self.flags):
            for name, tensor in store.items():
                store[name] = without(tensor, member)

    def metrics(self, since_Mh: Tensor) -> list[dict[str, float]]:
        """Means per member since the last call: the one synchronisation."""
        dead_Mh = since_Mh >= self.options.dead_after_tokens
        rows = [*self.pending["means"].unbind(-1), self.pending["n"], self.pending["steps"]]
        rows += [self.pending["grad_norm"], dead_Mh.double().mean(-1), self.flags["finite"].double()]
        found = [self._named(numbers) for numbers in torch.stack(rows, -1).tolist()]
        for tensor in self.pending.values():
            tensor.zero_()
        return found

    def _named(self, numbers: list[float]) -> dict[str, float]:
        n, steps = max(numbers[6], 1.0), max(numbers[7], 1.0)
        loss, mse, sparsity, aux, l0, spread = (number / n for number in numbers[:6])
        named = {
            "loss": loss,
            "mse": mse,
            "sparsity": sparsity,
            "l0": l0,
            "fvu": mse / spread if spread > 0 else float("nan"),
            "fraction_dead": numbers[9],
            "grad_norm": numbers[8] / steps,
            "finite": numbers[10],
        }
        if self.has_aux:
            named["aux"] = aux
        return named


def zeros(*shape: int, device: torch.device) -> Tensor:
    """Sums and numbers are kept in float64."""
    return torch.zeros(*shape, dtype=torch.float64, device=device)


def without(tensor: Tensor, member: int) -> Tensor:
    """A copy without one row."""
    return torch.cat([tensor[:member], tensor[member + 1 :]])


def kept(window: Store) -> Tensor:
    """Tokens that a window kept: one number, or one per member."""
    return window["y"][..., -1]


def judge(norm_M: Tensor, window: Store, flags: Store, lr_M: Tensor, most_M: Tensor) -> tuple[Tensor, Tensor]:
    """Who may step, and what their gradients are clipped by."""
    healthy_M = torch.isfinite(norm_M) & torch.isfinite(window["totals"]).all(-1) & (lr_M.abs() < _LARGEST_RATE)
    return flags["finite"] & healthy_M, (most_M / (norm_M + 1e-6)).clamp(max=1.0)


def count(
    went_M: Tensor,
    norm_M: Tensor,
    aux_M: Tensor,
    window: Store,
    flags: Store,
    pending: Store,
    since_Mh: Tensor,
    scaled: bool = False,
) -> None:
    """The end of a window. `aux_M`: the losses that have a denominator of their own."""
    n_kept, y = kept(window), window["y"]
    n = n_kept.clamp_min(1)
    silent_Mh = torch.where(window["fired"] > 0, 0, since_Mh + n_kept[..., None].to(since_Mh.dtype))
    since_Mh.copy_(torch.where(went_M[:, None], silent_Mh, since_Mh))
    loss_M, mse_M, sparsity_M, nonzero_M = window["totals"].unbind(-1)
    spread = y[..., -2] - y[..., :-2].square().sum(-1) / n
    means = [loss_M + aux_M * n, mse_M, sparsity_M, aux_M * n, nonzero_M, spread.expand_as(loss_M)]
    pending["n"].add_(n_kept)
    pending["steps"].add_(1)
    pending["means"].add_(torch.stack(means, -1))
    pending["grad_norm"].add_(norm_M)
    flags["step"].copy_(torch.where(went_M, flags["step"] + 1, flags["step"]))
    if scaled:  # an overflow halves the loss scale instead of ending the member
        scale, good = flags["loss_scale"], flags["good_steps"]
        good.copy_(torch.where(went_M, good + 1, 0.0))
        grown = torch.where(good % _GROWTH_STEPS == 0, scale * 2, scale)
        scale.copy_(torch.where(went_M, grown, scale / 2))
        went_M = went_M | (scale >= _LEAST_SCALE)
    flags["finite"].copy_(flags["finite"] & went_M)
