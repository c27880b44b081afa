"""A language model by plain transformers and forward hooks: what evaluation is checked against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


class PlainModel:
    """Hook points `blocks.L.hook_resid_pre`; counts its passes."""

    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.special_ids = {0, 1}
        self.passes = {"activations": 0, "logits": 0, "spliced": 0}

    @torch.no_grad()
    def activations(self, tokens_BT: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
        self.passes["activations"] += 1
        states = self.model(tokens_BT, output_hidden_states=True).hidden_states
        return {hook: states[int(hook.split(".")[1])] for hook in hooks}

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor) -> Tensor:
        self.passes["logits"] += 1
        return self.model(tokens_BT).logits

    @torch.no_grad()
    def spliced_logits(self, tokens_BT: Tensor, splices: dict[str, Callable[[Tensor], Tensor]]) -> Tensor:
        ((hook, fn),) = splices.items()
        self.passes["spliced"] += 1

        def replace(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (fn(args[0]), *args[1:])

        handle = self.model.model.layers[int(hook.split(".")[1])].register_forward_pre_hook(replace)
        try:
            return self.model(tokens_BT).logits
        finally:
            handle.remove()
