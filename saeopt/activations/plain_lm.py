"""The fast way to residual-stream activations: a Hugging Face decoder cut off after the layers that are needed.

Suffixes: B batch, T positions, d width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

Splice = Callable[[Tensor], Tensor]

SAFE_FAMILIES = frozenset([
    "gemma", "gemma2", "gpt2", "gpt_neo", "gpt_neox", "llama", "mistral", "olmo", "olmo2", "phi", "phi3", "qwen2",
    "qwen3", "smollm3", "stablelm",
])  # fmt: skip
"""Decoders whose layers map one hidden state to the next and nothing else passes between them."""

_LAYERS = ("layers", "h")
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


class PlainDecoder:
    """Boundaries between the layers of a Hugging Face causal language model."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.base = cast(nn.Module, model.base_model)
        self.layers_name = next(n for n in _LAYERS if isinstance(getattr(self.base, n, None), nn.ModuleList))
        self.layers = cast(nn.ModuleList, getattr(self.base, self.layers_name))
        self.norm_name = next(n for n in _FINAL_NORMS if isinstance(getattr(self.base, n, None), nn.Module))
        self._trunks: dict[int, nn.Module] = {}

    @staticmethod
    def supports(model: nn.Module, family: str) -> bool:
        """Whether this class gives the same numbers as the hook points of TransformerLens for the model."""
        base = getattr(model, "base_model", None)
        return (
            family in SAFE_FAMILIES
            and base is not None
            and any(isinstance(getattr(base, n, None), nn.ModuleList) for n in _LAYERS)
            and any(isinstance(getattr(base, n, None), nn.Module) for n in _FINAL_NORMS)
        )

    def trunk(self, depth: int) -> nn.Module:
        """The model's first `depth` layers, without final norm and unembedding; shares every weight."""
        if depth not in self._trunks:
            trunk = copy.copy(self.base)
            trunk._modules = dict(self.base._modules)
            trunk._modules[self.layers_name] = nn.ModuleList(list(self.layers)[:depth])
            trunk._modules[self.norm_name] = nn.Identity()
            self._trunks[depth] = trunk
        return self._trunks[depth]

    def boundaries(self, tokens_BT: Tensor, wanted: Iterable[int]) -> dict[int, Tensor]:
        """The residual stream x_BTd at each wanted boundary."""
        wanted = set(wanted)
        depth = max(wanted)
        found: dict[int, Tensor] = {}

        def keep(b: int) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
                found[b] = args[0] if args else kwargs["hidden_states"]

            return hook

        handles = [self.layers[b].register_forward_pre_hook(keep(b), with_kwargs=True) for b in wanted if b < depth]
        try:
            found[depth] = self.trunk(depth)(input_ids=tokens_BT, use_cache=False).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        return found

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Next-token logits_BTV."""
        return self.model(input_ids=tokens_BT, use_cache=False).logits

    def spliced_logits(self, tokens_BT: Tensor, at: int, splice: Splice) -> Tensor:
        """logits_BTV with the residual stream at a boundary replaced by `splice` of it."""

        def before(
            _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
        ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
            if args:
                return (splice(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": splice(kwargs["hidden_states"])}

        def after(_module: nn.Module, _args: object, out: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
            return (splice(out[0]), *out[1:]) if isinstance(out, tuple) else splice(out)

        if at < len(self.layers):
            handle = self.layers[at].register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = self.layers[-1].register_forward_hook(after)
        try:
            return self.logits(tokens_BT)
        finally:
            handle.remove()


def structural_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters and buffers are the very same tensors.

    TransformerBridge rebuilds the modules of the model that it is given; the plain decoder keeps its own.
    """
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, object] = {id(t): t for t in tensors}
    with torch.no_grad():
        return copy.deepcopy(model, memo)
