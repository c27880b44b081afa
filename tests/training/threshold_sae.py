"""A relu SAE that keeps a running threshold, and a control that steers L0: what uses the window channel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from saeopt.saes.base import Forward, Reduction, StepInputs
from saeopt.saes.relu import ReluSAE
from saeopt.training.controls import Control


class ThresholdSAE(ReluSAE):
    """θ: running mean of a window's smallest positive activation, bias-corrected from the first window."""

    tallies: ClassVar[dict[str, Reduction]] = {"smallest": "min", "largest": "max", "positive": "sum"}
    threshold: Tensor
    windows: Tensor
    share: Tensor

    def build(self) -> None:
        self.register_buffer("threshold", torch.zeros_like(self.scale))
        self.register_buffer("windows", torch.zeros_like(self.scale))
        self.register_buffer("share", torch.zeros_like(self.scale))

    def training_forward(self, x_Nd: Tensor, y_Ne: Tensor, inputs: StepInputs) -> Forward:
        forward = super().training_forward(x_Nd, y_Ne, inputs)
        f_Nh = forward.f_Nh.detach()
        forward.tallies["smallest"] = torch.where(f_Nh > 0, f_Nh, math.inf).min()
        forward.tallies["largest"] = f_Nh.max()
        forward.tallies["positive"] = (f_Nh > 0).sum().double()
        return forward

    def after_window(self, tallies: Mapping[str, Tensor], n: Tensor) -> None:
        decay = 0.9
        self.windows += 1
        weight = (1 - decay) / (1 - decay**self.windows)
        smallest = tallies["smallest"]
        self.threshold.copy_(torch.where(smallest.isinf(), self.threshold, self.threshold.lerp(smallest, weight)))
        self.share = (tallies["positive"] / n / tallies["largest"].clamp_min(1)).to(self.share)  # another tensor


class CountingSAE(ReluSAE):
    """Counts windows: what every step can do, as it tallies nothing."""

    windows: Tensor

    def build(self) -> None:
        self.register_buffer("windows", torch.zeros_like(self.scale))

    def after_window(self, tallies: Mapping[str, Tensor], n: Tensor) -> None:
        self.windows += 1


class Steering(Control):
    """Moves ln λ by the running L0; still after 200 samples."""

    name = "steering"

    def __init__(self, target: float = 3.0, last: int = 200) -> None:
        self.target, self.last = target, last

    def state(self, members: Sequence[object]) -> dict[str, Tensor]:
        size = len(members)
        return {"ln": torch.full((size,), -2.0).double(), "l0": torch.zeros(size, 2, dtype=torch.float64)}

    def numbers(self, state: dict[str, Tensor], samples: int) -> Mapping[str, Tensor]:
        return {"sparsity_coeff": state["ln"].exp()}

    def observe(self, state: dict[str, Tensor], window: Mapping[str, Tensor]) -> None:
        newest = torch.stack([window["l0"], window["n"]], -1)
        state["l0"] = 0.8 * state["l0"] + 0.2 * newest
        move = 0.3 * (state["l0"][:, 0] / self.target).clamp_min(1e-3).log().clamp(-1, 1)
        state["ln"].add_(torch.where(window["samples"] <= self.last, move, 0.0))
