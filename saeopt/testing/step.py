"""What every way to step promises: it gives the reference step's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from saeopt.saes.base import SAE
from saeopt.testing.cases import OPTIONS, build, examples, row
from saeopt.training.step.choose import reference_stack
from saeopt.training.step.contract import StackOptions
from saeopt.training.step.stack import Stack


class StepContract:
    """Inherit, give :meth:`make`, and name the architectures (`sae_type` and other config fields) that it can step."""

    members: ClassVar[Sequence[dict[str, Any]]] = ({"sae_type": "relu"},)
    rtol: ClassVar[float] = 1e-7

    def make(self, saes: Sequence[SAE], seeds: Sequence[int], options: StackOptions) -> Stack:
        """A stack of these members, float64 on the CPU, that steps in the way under test."""
        raise NotImplementedError

    def pair(self, fields: dict[str, Any]) -> tuple[Stack, Stack]:
        """The reference and the step under test, with equal members."""
        sae_type, own = fields["sae_type"], {k: v for k, v in fields.items() if k != "sae_type"}
        saes = [[build(sae_type, own, seed=seed) for seed in (1, 2, 3)] for _ in range(2)]
        return reference_stack(saes[0], [1, 2, 3], OPTIONS), self.make(saes[1], [1, 2, 3], OPTIONS)

    def test_weights_counters_and_metrics_are_the_references(self) -> None:
        for fields in self.members:
            stacks = self.pair(fields)
            for at, example in enumerate(examples(12)):
                for stack in stacks:
                    stack.accumulate(example, self.rows(stack))
                    if at % 2:
                        stack.apply(self.rows(stack))
            for ours, theirs in zip(stacks[1].metrics(), stacks[0].metrics(), strict=True):
                assert ours.keys() == theirs.keys()
                for name, value in theirs.items():
                    torch.testing.assert_close(torch.tensor(ours[name]), torch.tensor(value), rtol=1e-4, atol=1e-5)
            self.same_members(stacks)

    def test_a_member_that_leaves_does_not_disturb_the_others(self) -> None:
        for fields in self.members:
            stacks, data = self.pair(fields), examples(6)
            for at, example in enumerate(data):
                for stack in stacks:
                    if at == 3:
                        stack.remove(1)
                    stack.accumulate(example, self.rows(stack))
                    stack.apply(self.rows(stack))
            self.same_members(stacks)

    def rows(self, stack: Stack) -> list[Any]:
        """Each member's numbers."""
        return [row(sae, lr=1e-3 * (i + 1), max_grad_norm=0.5 + i) for i, sae in enumerate(stack.saes)]

    def same_members(self, stacks: tuple[Stack, Stack]) -> None:
        """Weights and buffers of both are close."""
        assert len(stacks[0].saes) == len(stacks[1].saes)
        for ours, theirs in zip(stacks[1].saes, stacks[0].saes, strict=True):
            expected = theirs.state_dict()
            for name, tensor in ours.state_dict().items():
                torch.testing.assert_close(tensor, expected[name], rtol=self.rtol, atol=1e-9)
