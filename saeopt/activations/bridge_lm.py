"""Every hook point of TransformerLens: a `TransformerBridge`, stopped as soon as the wanted hooks have fired.

Suffixes: B batch, T positions, d width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from saeopt.activations.hook_points import misnamed
from saeopt.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_PROBE_TOKENS = 13
"""Length of the probe sequence: an odd prime, so that no axis of a model is taken for the positions."""


class _Stop(Exception):
    """Every wanted hook has fired."""


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """TransformerLens prints and warns while it builds; none of it is about the user's input."""
    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Shapes(TorchFunctionMode):
    """A forward pass without values: nothing differs from anything."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return True if func is torch.equal else func(*args, **(kwargs or {}))


def _same_shape(x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return torch.empty_like(x)


@contextlib.contextmanager
def _split_unread() -> Iterator[None]:
    """Fused projections (GPT-2's, GPT-NeoX's, Phi's) are split also where they have shapes only: no value is read."""
    from transformer_lens.utilities import quantization

    reason = quantization.unreadable_weight_reason
    quantization.unreadable_weight_reason = lambda weight: None if getattr(weight, "is_meta", False) else reason(weight)
    try:
        yield
    finally:
        quantization.unreadable_weight_reason = reason


def _build(model: nn.Module, device: torch.device) -> Any:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    if device.type == "meta":  # which tokens an expert gets depends on values
        for name, module in model.named_modules():
            if name.endswith(".experts"):
                module.forward = _same_shape
    kind = type(model).__name__
    try:
        with _quietly(), _split_unread() if device.type == "meta" else contextlib.nullcontext():
            # Without a tokenizer: the bridge would change the one that it is given.
            return build_bridge_from_module(model, kind, hf_config=model.config, device=device)
    except (ValueError, NotImplementedError, KeyError) as error:
        raise UserError(
            f"TransformerLens has no hook points for {kind}: {' '.join(str(error).split())[:200]}"
        ) from None


class BridgedModel:
    """A model behind TransformerBridge. The bridge takes the model's modules over: give it one of its own."""

    def __init__(self, model: nn.Module, device: torch.device, compatibility: bool = False):
        self.device = device
        self.bridge = _build(model, device)
        if compatibility:
            with _quietly():
                self.bridge.enable_compatibility_mode(disable_warnings=True)

    @staticmethod
    def names_from_config(config: PretrainedConfig) -> tuple[list[str], dict[str, str]] | None:
        """Names of all hook points and :attr:`misnamed`, from a model without weights; None if there cannot be one."""
        from transformers import AutoModelForCausalLM

        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            hooks = _build(model, torch.device("meta")).hook_dict
            return list(hooks), misnamed(hooks)
        except (RuntimeError, TypeError, AttributeError, UserError):
            return None

    @cached_property
    def misnamed(self) -> dict[str, str]:
        """Hook points that are not what their names say: name → what it is."""
        return misnamed(self.bridge.hook_dict)

    @cached_property
    def widths(self) -> dict[str, int]:
        """Width of every hook point that yields one vector per token and is what its name says."""
        hooks = {n: point for n, point in self.bridge.hook_dict.items() if n not in self.misnamed}
        found: dict[str, int] = {}

        def look(name: str) -> Callable[..., None]:
            def hook(x: Any, hook: object = None) -> None:
                per_token = isinstance(x, Tensor) and x.is_floating_point() and x.shape[:2] == (2, _PROBE_TOKENS)
                if per_token and x.ndim >= 3 and _PROBE_TOKENS not in x.shape[2:]:
                    found[name] = x.shape[2:].numel()

            return hook

        tokens_BT = torch.arange(2 * _PROBE_TOKENS, device=self.device).reshape(2, _PROBE_TOKENS)
        tokens_BT %= int(self.bridge.cfg.d_vocab)
        always = [name for name, point in hooks.items() if self._switch(name, point) is None]
        try:
            with torch.no_grad(), _quietly(), _Shapes() if self.device.type == "meta" else contextlib.nullcontext():
                self.bridge.run_with_hooks(tokens_BT, return_type="logits", fwd_hooks=[(n, look(n)) for n in always])
        except (NotImplementedError, RuntimeError) as error:
            if self.device.type != "meta":
                raise
            kind, line = type(self.bridge.original_model).__name__, " ".join(str(error).split())[:100]
            raise UserError(f"a plan without weights cannot be made for {kind}: {line}") from None
        for name, point in hooks.items():
            same = [n for n in found if hooks[n] is point]
            if same:
                found[name] = found[same[0]]
            elif self._switch(name, point) is not None:
                found |= self._switched_width(name)
        return found

    def _switch(self, name: str, point: Any) -> str | None:
        """The setting that a hook point needs before it fires."""
        return self.bridge._gated_hook_reason(point.name or name)

    def _switched_width(self, name: str) -> dict[str, int]:
        cfg = self.bridge.cfg
        if name.endswith(("mlp_in", "attn_in", "hook_result", "q_input", "k_input", "v_input")):
            heads = 1 if name.endswith("mlp_in") else int(cfg.n_heads)
            if name.endswith(("k_input", "v_input")):
                heads = int(getattr(cfg, "n_key_value_heads", None) or heads)
            return {name: heads * int(cfg.d_model)}
        return {}

    def without_aliases(self, names: Sequence[str], patterns: Sequence[str]) -> list[str]:
        """One name per hook point: exact names stay, and of two names that a pattern matched the alias goes."""
        exact = set(patterns)
        hooks = self.bridge.hook_dict
        chosen: dict[int, str] = {}
        for name in sorted(names, key=lambda n: (n not in exact, not n.rpartition(".")[2].startswith("hook_resid"), n)):
            if name in exact:
                chosen[id(hooks[name]) if id(hooks[name]) not in chosen else hash(name)] = name
            else:
                chosen.setdefault(id(hooks[name]), name)
        kept = set(chosen.values())
        return [n for n in names if n in kept]

    def activations(self, tokens_BT: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """x_BTd at each hook point; the forward pass ends when all of them have fired."""
        found: dict[str, Tensor] = {}
        left = set(names)

        def keep(name: str) -> Callable[..., None]:
            def hook(x: Tensor, hook: object = None) -> None:
                # A hook later in the same block must not see, or change, what was kept.
                found[name] = x.flatten(2)
                left.discard(name)
                if not left:
                    raise _Stop

            return hook

        with self._switched_on(names), contextlib.suppress(_Stop):
            self.bridge.run_with_hooks(tokens_BT, return_type=None, fwd_hooks=[(n, keep(n)) for n in names])
        if left:
            raise UserError(f"hook point '{min(left)}' did not fire in a forward pass")
        return found

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Next-token logits_BTV."""
        return self.bridge(tokens_BT, return_type="logits")

    def spliced_logits(self, tokens_BT: Tensor, splices: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
        """logits_BTV with the values at hook points replaced."""

        def replacing(splice: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
            return lambda x, hook=None: splice(x)

        hooks = [(name, replacing(splice)) for name, splice in splices.items()]
        with self._switched_on(list(splices)):
            return self.bridge.run_with_hooks(tokens_BT, return_type="logits", fwd_hooks=hooks)

    @contextlib.contextmanager
    def _switched_on(self, names: Sequence[str]) -> Iterator[None]:
        """Some hook points fire only while a setting is on; two of these settings exclude each other."""
        hooks = self.bridge.hook_dict
        settings = {s for n in names if n in hooks and (s := self._switch(n, hooks[n])) is not None}
        try:
            for setting in settings:
                getattr(self.bridge, f"set_{setting}")(True)
            yield
        except ValueError as error:
            if not settings:
                raise
            raise UserError(f"hook points {', '.join(sorted(names))} exclude each other: {error}") from None
        finally:
            for setting in settings:
                getattr(self.bridge, f"set_{setting}")(False)
