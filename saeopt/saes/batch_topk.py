"""The BatchTopK SAE (Bussmann et al. 2024, arXiv 2412.06410), also with nested dictionaries (arXiv 2503.17547)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from saeopt.config.base import Float
from saeopt.config.marks import Member, Slow, Stack
from saeopt.saes.base import Forward, Reduction, StepInputs
from saeopt.saes.prefixes import Prefixes
from saeopt.saes.topk import TopKConfig, TopKSAE

_MEMORY = 0.95
"""What is left, after a window, of the weight that a window has in the threshold, once there were many. A threshold
falls while it is learned: 0.99 left it 4 to 8 % too high after 240 to 490 windows, and L0 too low."""
_RECENT = 4
"""Before, window n has the weight `_RECENT` / (n + `_RECENT` − 1): the mean follows what the last quarter or so gave,
while activations still change fast."""
_START_TOKENS = 2048


class BatchTopKConfig(TopKConfig):
    """`sae_type: batch_topk`. `sparsity_coeff` has no effect: k fixes L0."""

    k: Annotated[Member[Annotated[Float, Field(gt=0, le=2**20)]], Slow(4)] = 32.0  # type: ignore[assignment]
    """Latents kept per token in the mean over a batch."""
    threshold: Member[Literal["running", "held_out"]] = "running"
    """What π is compared with after training. running: the mean of what the windows kept last; held_out: at the end of
    the run it is set so that the `data.n_threshold_samples` held-out samples have k latents per token in the mean."""

    @property
    def set_on_held_out(self) -> bool:
        """As in the base, or here for all sites."""
        return self.threshold == "held_out" or super().set_on_held_out

    @model_validator(mode="after")
    def _threshold_of_a_training(self) -> Self:
        if self.set_on_held_out and not self.retrain_saes:
            raise ValueError("'threshold: held_out' is set by a training: it has no effect on 'retrain_saes: false'")
        return self


class MatryoshkaBatchTopKConfig(BatchTopKConfig):
    """`sae_type: matryoshka_batch_topk`: batch_topk with prefixes."""

    prefixes: Stack[Prefixes] = Field([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0])
    """Matryoshka: each of these first parts of the dictionary reconstructs by itself, and the squared error is the mean
    over them. Shares of the dictionary (up to 1) or numbers of latents (above 1), rising, the whole dictionary last;
    null: the whole alone."""


class BatchTopKSAE(TopKSAE):
    """In training f = the int(k N) largest of relu(π) among the N kept tokens of a batch; afterwards relu(π) 1[π > θ].

    The batch is a micro-batch of one process, as wherever this is trained: other micro-batches select otherwise. θ is
    the running mean of the windows' smallest kept activation (its mean over the window's micro-batches that kept any),
    each window weighing 0.95 of the next one (less in the first 80), without a bias towards its start; before the
    first window it is what the calibration's tokens give. `threshold: held_out` sets it anew once the training is over
    (:mod:`saeopt.training.thresholds`). The loss, its auxiliary part and all deviations are those of
    :class:`~saeopt.saes.topk.TopKSAE`.
    """

    Config: ClassVar[type[BatchTopKConfig]] = BatchTopKConfig
    selects_over_batch: ClassVar[bool] = True
    tallies: Mapping[str, Reduction] = MappingProxyType({"smallest": "sum", "batches": "sum"})
    config: BatchTopKConfig
    threshold: Tensor
    threshold_windows: Tensor

    def build(self) -> None:
        super().build()
        own = torch.promote_types(self.dtype, torch.float32)  # whatever the weights' precision is
        for name in ("threshold", "threshold_windows"):
            self.register_buffer(name, torch.zeros((), dtype=own, device=self.device))
        self.starting = False

    @torch.no_grad()
    def initialise(self, x_Nd: Tensor, generator: torch.Generator, y_Ne: Tensor | None = None) -> None:
        """As in the base, with the code of training; θ is the smallest activation in it."""
        self.starting = True
        super().initialise(x_Nd, generator, y_Ne)
        self.starting = False
        f_Nh = self.select(self.activations(x_Nd[:: math.ceil(len(x_Nd) / _START_TOKENS)].to(self.W_enc)), None)
        self.threshold.copy_(_smallest(f_Nh).nan_to_num(posinf=0.0))
        self.threshold_windows.zero_()

    @torch.no_grad()
    def rescale_rows(self) -> bool:
        """As in the base; θ, one number for all latents, grows as the mean row; the next window replaces it."""
        length = self.W_dec.norm(dim=-1).mean()
        changed = super().rescale_rows()
        if changed:
            self.threshold.mul_(length)
            self.threshold_windows.zero_()
        return changed

    def activations(self, x_Nd: Tensor) -> Tensor:
        """relu(π)."""
        return torch.relu(self.pre_activation(x_Nd))

    def code(self, x_Nd: Tensor) -> Tensor:
        """relu(π) where it is above θ."""
        acts_Nh = self.activations(x_Nd)
        return self.select(acts_Nh, None) if self.starting else acts_Nh * (acts_Nh > self.threshold.to(acts_Nh.dtype))

    def select(self, acts_Nh: Tensor, keep_N: Tensor | None) -> Tensor:
        """The int(k N) largest of the batch."""
        acts_Nh = self.masked(acts_Nh, keep_N)
        n = len(acts_Nh) if keep_N is None else int(keep_N.sum())
        flat = acts_Nh.flatten()
        largest = flat.topk(min(len(flat), int(self.config.k * n)), sorted=False)
        return torch.zeros_like(flat).scatter(0, largest.indices, largest.values).view_as(acts_Nh)

    def evaluation_form(self) -> dict[str, Any] | str:
        """relu(π) above θ, one number for all latents."""
        return {"form": "jumprelu", "b_enc": self.b_enc, "threshold": self.threshold.to(self.b_enc).expand(self.h)}

    def training_forward(self, x_Nd: Tensor, y_Ne: Tensor, inputs: StepInputs) -> Forward:
        """As topk's, with tallies of the smallest activation that was kept."""
        forward = super().training_forward(x_Nd, y_Ne, inputs)
        smallest = _smallest(forward.f_Nh.detach())
        forward.tallies["smallest"] = smallest.nan_to_num(posinf=0.0)
        forward.tallies["batches"] = smallest.isfinite().double()
        return forward

    @torch.no_grad()
    def after_window(self, tallies: Mapping[str, Tensor], n: Tensor) -> None:
        """θ takes the window in."""
        moved = running_mean(self.threshold, self.threshold_windows, tallies["smallest"], tallies["batches"])
        self.threshold.copy_(moved[0])
        self.threshold_windows.copy_(moved[1])


class MatryoshkaBatchTopKSAE(BatchTopKSAE):
    """:class:`BatchTopKSAE` whose dictionary is nested unless `prefixes` says otherwise."""

    Config: ClassVar[type[BatchTopKConfig]] = MatryoshkaBatchTopKConfig
    config: MatryoshkaBatchTopKConfig


def running_mean(mean: Tensor, windows: Tensor, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """A running mean over windows and how many it has taken in, after another one, whose mean is total / count.

    A window of count 0 changes nothing. Of any shape, element by element.
    """
    kept = count > 0
    windows = windows + kept.to(mean.dtype)
    weight = (_RECENT / (windows + _RECENT - 1)).clamp(1 - _MEMORY, 1.0)  # the first window alone: no bias
    return mean.lerp((total / count.clamp_min(1)).to(mean.dtype), weight * kept), windows


def _smallest(f_Nh: Tensor) -> Tensor:
    """The smallest positive entry, float64; infinite where there is none."""
    return torch.where(f_Nh > 0, f_Nh, torch.inf).min().double()
