"""Stacks: members of one architecture and shape that are stepped together."""

from __future__ import annotations

from collections.abc import Sequence

from saeopt.config.run import PerformanceConfig
from saeopt.saes.base import SAE
from saeopt.training.stacks.base import Stack, StackOptions


def make_stack(
    saes: Sequence[SAE], seeds: Sequence[int], options: StackOptions, performance: PerformanceConfig
) -> Stack:
    """The fastest stack that `performance` allows for these members.

    They must be of one class and shape, at one hook point, with equal configs but for `stack_fields`. The
    modules in `stack.saes` are the members from here on.
    """
    from saeopt.training.stacks.autograd import AutogradStack

    return AutogradStack(saes, seeds, options)
