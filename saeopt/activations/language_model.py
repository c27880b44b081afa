"""The language model whose activations the SAEs learn.

Plain residual-stream hooks are read from the Hugging Face layers themselves, cut off after the deepest one; every other
hook point comes from TransformerLens' `TransformerBridge`, stopped at the deepest one. Each hook point always takes the
same way, whatever other hooks are asked for, so that a trial sees the same numbers alone and in a pack.

Suffixes: B batch, T positions, d width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from saeopt.activations.bridge_lm import BridgedModel
from saeopt.activations.hook_points import boundary, in_model_order, is_residual_pattern, match_hooks, residual_hooks
from saeopt.activations.plain_lm import SAFE_FAMILIES, PlainDecoder, Splice, structural_copy
from saeopt.activations.pretrained import (
    context_length_of,
    load_model,
    load_tokenizer,
    n_layers_of,
    read_model_config,
    special_token_ids,
)
from saeopt.activations.separators import separator_token
from saeopt.config.sites import Site, resolved
from saeopt.errors import UserError
from saeopt.host.pulse import pulse

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from saeopt.config.run import RunConfig
    from saeopt.config.saes import SAEConfig


_NOT_OF_THE_MODEL = {"transformers_version", "dtype", "torch_dtype"}
"""What a configuration holds of the library that wrote it, and of how it was loaded."""


def lm_dtype(name: str, device: torch.device) -> torch.dtype:
    """`lm_dtype` of a config as a torch dtype; auto is bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def compiles(config: RunConfig, device: torch.device) -> bool:
    """Whether harvesting goes through the compiled model."""
    return device.type == "cuda" and config.performance.compile != "off"


class LanguageModel:
    """A frozen causal language model and its hook points. Build one with :meth:`load`."""

    predicts = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        device: torch.device,
        processing: str = "raw",
        special_ids: set[int] | None = None,
    ):
        self.device = device
        self.config = cast("PretrainedConfig", model.config)
        self.tokenizer = tokenizer
        self.processing = processing
        self.dtype = next(model.parameters()).dtype
        self.special_ids = special_token_ids(tokenizer, self.config) if special_ids is None else special_ids
        self.context_length = context_length_of(self.config)
        self.vocab_size: int = self.config.get_text_config().vocab_size
        self.identity = ""
        """The same for the same weights, wherever they lie, in which precision and by which version they are loaded."""
        self._model = model.eval().requires_grad_(False)
        plain = processing == "raw" and PlainDecoder.supports(model, self.config.model_type)
        self._plain = PlainDecoder(self._model) if plain else None

    @classmethod
    def load(cls, config: RunConfig, device: torch.device | str = "cpu") -> LanguageModel:
        """The language model of a run. Hook points and lengths are checked before any weight is read.

        Raises:
            UserError: no such model or folder, a gated model, a hook point that it lacks, a context that is too long.
        """
        device = torch.device(device)
        from_path = config.tlens_model_path is not None
        model_config = read_model_config(config.model, from_path)
        limit = context_length_of(model_config)
        if limit is not None and config.data.context_length > limit:
            raise UserError(
                f"'data.context_length': {config.data.context_length} is longer than "
                f"the {limit} positions of {config.model}"
            )
        raw = config.lm_processing == "raw"
        check_hooks(config.saes.hooks, model_config, raw)
        own = config.data.tokenizer_name
        try:
            tokenizer = load_tokenizer(own or config.model, required=not config.data.is_tokenized)
        except UserError as error:
            raise UserError(f"'data.tokenizer_name': {error}" if own else str(error)) from None
        model = load_model(config.model, lm_dtype(config.lm_dtype, device), device)
        special = special_token_ids(tokenizer, model_config) | separator_token(config.data.separator, tokenizer)
        found = cls(model, tokenizer, device, config.lm_processing, special)
        found.identity = _identity(model)  # before a bridge folds weights
        return found

    @property
    def n_parameters(self) -> int:
        """Numbers in the language model."""
        return sum(p.numel() for p in self._model.parameters())

    @cached_property
    def _bridge(self) -> BridgedModel:
        model = structural_copy(self._model) if self.processing == "raw" else self._model
        return BridgedModel(model, self.device, compatibility=self.processing == "compatibility")

    def _boundary(self, hook: str) -> int | None:
        return boundary(hook) if self._plain is not None else None

    @cached_property
    def hook_points(self) -> list[str]:
        """Every hook point that yields one vector per token, in model order."""
        return in_model_order(self._bridge.widths)

    def resolve(self, patterns: Sequence[str] | str) -> list[str]:
        """The hook points that names and glob patterns mean, in model order.

        Raises:
            UserError: nothing matches; the line lists near names.
        """
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        if self._plain is not None and all(map(is_residual_pattern, patterns)):
            return match_hooks(patterns, residual_hooks(len(self._plain.layers)))
        found = match_hooks(patterns, self.hook_points, self._bridge.misnamed)
        return self._bridge.without_aliases(found, patterns)

    def sites(self, saes: SAEConfig) -> list[Site]:
        """The sites at which a config's SAEs are trained."""
        return resolved(saes.sae_positions, self.resolve)

    def width(self, hook: str) -> int:
        """d at a hook point; heads and other extra axes count as one."""
        if self._boundary(hook) is not None:
            return int(self.config.get_text_config().hidden_size)
        if hook not in self._bridge.widths:
            match_hooks([hook], self.hook_points, self._bridge.misnamed)
        return self._bridge.widths[hook]

    @torch.no_grad()
    def activations(self, tokens_BT: Tensor, hooks: Sequence[str], compiled: bool = False) -> dict[str, Tensor]:
        """x_BTd at each hook point, in the model's dtype, on the model's device; extra axes are flattened.

        The model stops at the deepest hook point; logits are never computed. `compiled` is for long streams of
        batches of one shape, and matters to plain residual-stream hooks only.
        """
        tokens_BT = tokens_BT.to(self.device)
        bounds = {h: b for h in hooks if (b := self._boundary(h)) is not None}
        others = [h for h in hooks if h not in bounds]
        found: dict[str, Tensor] = {}
        if bounds:
            assert self._plain is not None
            at = self._plain.boundaries(tokens_BT, bounds.values(), compiled)
            found |= {h: at[b] for h, b in bounds.items()}
        if others:
            found |= self._bridge.activations(tokens_BT, others)
        pulse()
        return {h: found[h] for h in hooks}

    def identities(self) -> dict[str, str]:
        """What a run that goes on must find again."""
        return {"model": self.identity}

    def fingerprint(self) -> str:
        """Changes when the model changes: its configuration, and some values of every parameter."""
        config = getattr(self._model, "config", None)
        settings = {} if config is None else config.to_dict()
        told = {k: v for k, v in settings.items() if not k.startswith("_") and k not in _NOT_OF_THE_MODEL}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode())
        for name, parameter in self._model.named_parameters():
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.flatten()[:8].tolist()}".encode())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Next-token logits_BTV."""
        tokens_BT = tokens_BT.to(self.device)
        return self._plain.logits(tokens_BT) if self._plain is not None else self._bridge.logits(tokens_BT)

    @torch.no_grad()
    def spliced_logits(self, tokens_BT: Tensor, splices: Mapping[str, Splice]) -> Tensor:
        """logits_BTV with x_BTd at each hook point replaced by its `splice(x_BTd)`, cast back to the model's dtype."""
        tokens_BT = tokens_BT.to(self.device)

        def same_kind(splice: Splice) -> Splice:
            return lambda x: splice(x.flatten(2)).to(x.dtype).reshape(x.shape)

        alike = {hook: same_kind(splice) for hook, splice in splices.items()}
        bounds = {hook: self._boundary(hook) for hook in alike}
        at = {bound: alike[hook] for hook, bound in bounds.items() if bound is not None}
        if self._plain is not None and len(at) == len(alike):
            return self._plain.spliced_logits(tokens_BT, at)
        return self._bridge.spliced_logits(tokens_BT, alike)


def _identity(model: nn.Module) -> str:
    digest = hashlib.sha256()
    told = [f"{tuple(p.shape)} {p.flatten()[:8].to(torch.bfloat16).tolist()}" for p in model.parameters()]
    digest.update("\n".join(sorted(told)).encode())
    return digest.hexdigest()[:16]


def check_hooks(patterns: Sequence[str], model_config: PretrainedConfig, raw: bool = True) -> None:
    """Refuse hook points that the model lacks, from its config alone.

    Raises:
        UserError: a name or pattern that matches nothing.
    """
    if raw and model_config.model_type in SAFE_FAMILIES and all(map(is_residual_pattern, patterns)):
        match_hooks(patterns, residual_hooks(n_layers_of(model_config)))
        return
    names = BridgedModel.names_from_config(model_config)
    if names is not None:
        match_hooks(patterns, *names)
