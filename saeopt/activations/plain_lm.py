"""The fast way to residual-stream activations: a Hugging Face decoder cut off after the layers that are needed.

Suffixes: B batch, T positions, d width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saeopt.console import log

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
        self._trunks: dict[tuple[frozenset[int], bool], _Trunk] = {}

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

    def boundaries(self, tokens_BT: Tensor, wanted: Iterable[int], compiled: bool = False) -> dict[int, Tensor]:
        """The residual stream x_BTd at each wanted boundary.

        `compiled` goes through torch.compile, which is worth its start-up where many batches of one shape follow.
        """
        key = (frozenset(wanted), compiled)
        if key not in self._trunks:
            # Hook points that leave a pack must not cost another compilation.
            wider = next((t for (w, c), t in self._trunks.items() if c and compiled and w > key[0]), None)
            self._trunks[key] = wider or _Trunk(self, key[0], compiled)
        return self._trunks[key](tokens_BT)

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Next-token logits_BTV."""
        return self.model(input_ids=tokens_BT, use_cache=False).logits

    def spliced_logits(self, tokens_BT: Tensor, splices: Mapping[int, Splice]) -> Tensor:
        """logits_BTV with the residual stream at each boundary replaced by its `splice`."""
        handles = [self._hook(at, splice) for at, splice in splices.items()]
        try:
            return self.logits(tokens_BT)
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, at: int, splice: Splice) -> RemovableHandle:
        def before(
            _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
        ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
            if args:
                return (splice(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": splice(kwargs["hidden_states"])}

        def after(_module: nn.Module, _args: object, out: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
            return (splice(out[0]), *out[1:]) if isinstance(out, tuple) else splice(out)

        if at < len(self.layers):
            return self.layers[at].register_forward_pre_hook(before, with_kwargs=True)
        return self.layers[-1].register_forward_hook(after)


class _Trunk:
    """A model's layers up to the deepest wanted boundary, without final norm and unembedding; shares every weight."""

    def __init__(self, decoder: PlainDecoder, wanted: frozenset[int], compiled: bool):
        self.kept: dict[int, Tensor] = {}
        self.depth = max(wanted)
        layers = list(decoder.layers)[: self.depth]
        tapped = [_Tap(layer, self.kept, b) if b in wanted else layer for b, layer in enumerate(layers)]
        self.module = copy.copy(decoder.base)
        self.module._modules = dict(decoder.base._modules)
        self.module._modules[decoder.layers_name] = nn.ModuleList(tapped)
        self.module._modules[decoder.norm_name] = nn.Identity()
        self.run: Callable[..., Any] = torch.compile(self.module, dynamic=False) if compiled else self.module

    def __call__(self, tokens_BT: Tensor) -> dict[int, Tensor]:
        last = self._run(tokens_BT)
        found = {**self.kept, self.depth: last}
        self.kept.clear()
        return found

    def _run(self, tokens_BT: Tensor) -> Tensor:
        try:
            return self.run(input_ids=tokens_BT, use_cache=False).last_hidden_state
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self.run is self.module:
                raise
            log.info("the language model cannot be compiled, and runs as it is (%s)", type(error).__name__)
            self.run = self.module
            return self._run(tokens_BT)


class _Tap(nn.Module):
    """A layer whose input is kept. A wrapper and no forward hook, because torch.compile sees through it."""

    def __init__(self, layer: nn.Module, kept: dict[int, Tensor], at: int):
        super().__init__()
        self.layer, self.kept, self.at = layer, kept, at

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own output."""
        self.kept[self.at] = args[0] if args else kwargs["hidden_states"]
        return self.layer(*args, **kwargs)


def structural_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters and buffers are the very same tensors.

    TransformerBridge rebuilds the modules of the model that it is given; the plain decoder keeps its own.
    """
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, object] = {id(t): t for t in tensors}
    with torch.no_grad():
        return copy.deepcopy(model, memo)
