"""The contract of a stack: M members of one architecture and shape at one hook point, stepped together.

A stack owns the tensors; the members' SAE modules are views of them, so evaluation and checkpoints read
the modules and need no copy-out. All per-member numbers live on the device: nothing here synchronises but
:meth:`Stack.metrics` and :meth:`Stack.state`.

Shape suffixes: M members, N tokens, d model width, h dictionary width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from saeopt.saes.base import SAE


class Hyper(NamedTuple):
    """One member's numbers for one optimiser step; `max_grad_norm` is inf where nothing is clipped."""

    lr: float
    sparsity_coeff: float
    beta: float
    max_grad_norm: float


@dataclass(frozen=True)
class Place:
    """Where in the stream an example's tokens lie: token t of slot s is row (s − first_slot) · tokens_per_slot + t."""

    first_slot: int
    n_slots: int
    tokens_per_slot: int


@dataclass(frozen=True)
class Example:
    """One micro-batch at the stack's site: what is read, what is to be given, in raw units (any float dtype).

    `y_Ne` is `x_Nd` itself for an autoencoder; `keep_N` is False on masked tokens (None: all are kept).
    """

    x_Nd: Tensor
    y_Ne: Tensor
    keep_N: Tensor | None
    place: Place


@dataclass(frozen=True)
class StackOptions:
    """What all members of a stack share besides architecture and shape."""

    dead_after_tokens: int
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    autocast: torch.dtype | None = None
    """Dtype of the matrix products (bfloat16, float16), or None for the weights' own."""


EXTRA = "extra."
"""Prefix of state that not every kind of stack has: a checkpoint may go on on another device, or with another stack."""


def check_names(own: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Refuse state of another architecture; extras may be missing or too much."""
    differ = sorted(name for name in own.keys() ^ state.keys() if not name.startswith(EXTRA))
    if differ:
        raise ValueError(f"state holds {differ} too much or too little")


class Stack(ABC):
    """Members stepped together. One window: `accumulate` per micro-batch, reduce `sums()` over ranks, `apply`.

    A window of one micro-batch on one rank: `step`.
    """

    def __init__(self, saes: Sequence[SAE], seeds: Sequence[int], options: StackOptions) -> None:
        self.saes, self.seeds, self.options = list(saes), list(seeds), options

    def step(self, example: Example, hyper: Sequence[Hyper]) -> None:
        """A whole window of one micro-batch on one rank."""
        self.accumulate(example, hyper)
        self.apply(hyper)

    @abstractmethod
    def accumulate(self, example: Example, hyper: Sequence[Hyper]) -> None:
        """Forward and backward of one micro-batch; adds to the window's sums."""

    @abstractmethod
    def sums(self) -> list[Tensor]:
        """The window's sums on this rank (gradients, token count, firing counts), to be all-reduced in place."""

    @abstractmethod
    def apply(self, hyper: Sequence[Hyper]) -> None:
        """End of the window: divide by the token count, clip, Adam, constraints, dead counters; clears the sums.

        A member whose loss or gradient is not finite is left as it was, now and in every later window.
        """

    @abstractmethod
    def metrics(self) -> list[dict[str, float]]:
        """Means per member since the last call (a synchronisation).

        Keys: loss, mse, sparsity, aux (where there is one), l0, fvu, fraction_dead, grad_norm,
        finite (1.0 or 0.0).
        """

    @abstractmethod
    def state(self, member: int) -> dict[str, Tensor]:
        """What member needs besides its weights to go on exactly: moments, step count, flags, pending metrics."""

    @abstractmethod
    def load_state(self, member: int, state: dict[str, Tensor]) -> None:
        """Inverse of :meth:`state`."""

    @abstractmethod
    def remove(self, member: int) -> None:
        """Drop a member; the others go on as if it had never been there."""
