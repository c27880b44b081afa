"""The contract of a step: M members of one architecture and shape at one site, stepped together.

A :class:`~saeopt.training.step.stack.Stack` is put together from a storage (who owns the tensors), a pass (gradients
of one micro-batch), an optimiser and the books. Only the pass and the optimiser depend on architecture and device.

Shape suffixes: M members, N tokens, d width read, e width written, h dictionary width.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Store = dict[str, Tensor]
Numbers = Mapping[str, float | Tensor]
"""One member's numbers for one window, by name: `lr`, `max_grad_norm` (inf where nothing is clipped) and those that its
architecture declares. What a control keeps on the device is a tensor without dimensions."""
TALLY = "tally."
"""Prefix of the architectures' own tallies among a window's statistics."""
EXTRA = "extra."
"""Prefix of state that not every kind of stack has: a checkpoint may go on on another device, or with another stack."""


@dataclass(frozen=True)
class Place:
    """Where an example's tokens lie: token t of sample s is row (s − first_sample) · tokens_per_sample + t."""

    first_sample: int
    n_samples: int
    tokens_per_sample: int


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
    ranks: int = 1
    """Processes that share a window's samples."""


class Parts(NamedTuple):
    """What a micro-batch or a window gives, summed over its kept tokens, in any unit of the gradients.

    `grads`: by what the pass and its optimiser call them. `window`: `totals` (M, 4): Σ loss terms, Σ‖ŷ − y‖², Σ
    sparsity term, non-zeros; `fired` (M, h); `y` ((M,) e + 2): Σy, Σ‖y‖², number of kept tokens; tallies (M, …).
    """

    grads: Store
    window: Store


class Pass(Protocol):
    """Gradients of one micro-batch: what differs between architectures and devices."""

    def before(self, example: Example, *, first: bool) -> Hashable:
        """What comes before a micro-batch and outside of graphs; gives what shapes depend on besides the example's."""
        return None

    def gradients(self, example: Example, *, first: bool) -> Parts:
        """Forward and backward. A pass may add to the parts that it gave before, unless this is a window's first."""
        ...

    def settle(self, parts: Parts) -> Tensor:
        """Finish a whole window's gradients in place; gives each member's loss that has a denominator of its own."""
        return torch.zeros_like(parts.window["totals"][:, 0])

    def after_window(self, tallies: Store, went_M: Tensor) -> bool:
        """What the members' `after_window` does, for all at once and where they went; False: it is left to them."""
        return False

    def state(self, member: int) -> Store:
        """What the pass needs besides weights and moments to go on with the same bits (`EXTRA`)."""
        return {}

    def load_state(self, member: int, state: Store) -> None:
        """Inverse of :meth:`state`; called after everything else was loaded."""
        return


class Optimiser(Protocol):
    """A whole window's gradients to new weights."""

    def finish(self, parts: Parts, aux_M: Tensor) -> Tensor:
        """Clip, step, restore constraints, and have it noted in the books; gives who went (M)."""
        ...


def check_names(own: Store, state: Store) -> None:
    """Refuse state of another architecture; extras may be missing or too much."""
    differ = sorted(name for name in own.keys() ^ state.keys() if not name.startswith(EXTRA))
    if differ:
        raise ValueError(f"state holds {differ} too much or too little")
