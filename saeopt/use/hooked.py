"""What a splice needs of a model of TransformerLens 4: a `TransformerBridge`, or any `HookedRootModule`.

TransformerLens' private names stand here and nowhere else under `saeopt/use`: `_hook_registry` (to be found by
`run_with_cache` and `run_with_hooks` a hook point must be in it), `_gated_hook_reason`, `_weights_processed`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from saeopt.activations.hook_points import misnamed, near
from saeopt.activations.pretrained import special_token_ids
from saeopt.errors import UserError


class Hooked:
    """A model with hook points, and what its running forward pass was given."""

    def __init__(self, model: nn.Module) -> None:
        points = getattr(model, "hook_dict", None)
        if not isinstance(model, nn.Module) or not isinstance(points, Mapping):
            raise UserError(
                f"splice: a {type(model).__name__} has no hook points: give a model of TransformerLens 4, such as"
                " TransformerBridge.boot_transformers(NAME or FOLDER)"
            )
        self.model = model
        self.points: dict[str, HookPoint] = dict(points)
        self.tokens_BT: Tensor | None = None
        self.past = 0
        """Positions that lie in the model's key-value cache."""

    def check(self, hook: str, key: str) -> None:
        """Refuse a hook point that the model lacks, or that is not what its name says.

        Raises:
            UserError: naming the SAE's key.
        """
        if hook not in self.points:
            raise UserError(f"splice: '{key}': the model has no hook point '{hook}'{near(hook, list(self.points))}")
        if other := misnamed(self.points).get(hook):
            raise UserError(f"splice: '{key}': TransformerLens means {other} by '{hook}' in a mixture of experts")

    def names(self, hook: str) -> list[str]:
        """All names of a hook point, the given one first."""
        point = self.points[hook]
        return list(dict.fromkeys([hook, *(name for name, other in self.points.items() if other is point)]))

    @property
    def processed(self) -> bool | None:
        """Whether its weights are folded and centred; None where that cannot be known."""
        found = getattr(self.model, "_weights_processed", None)
        return found if isinstance(found, bool) else None

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, or None."""
        return getattr(self.model, "tokenizer", None)

    @property
    def special_ids(self) -> set[int] | None:
        """BOS, EOS and padding; None where the model has neither a tokenizer nor a Hugging Face config."""
        config: Any = getattr(getattr(self.model, "original_model", None), "config", None)
        if self.tokenizer is None and config is None:
            return None
        return special_token_ids(self.tokenizer, config)

    # ---- while SAEs are spliced in
    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Keep the tokens of each forward pass. `run_with_hooks` does not go through the model's own hooks."""
        inner = getattr(self.model, "original_model", None) or getattr(self.model, "embed", None)
        handle = inner.register_forward_pre_hook(self._begin, with_kwargs=True) if inner is not None else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()
            self.tokens_BT = None

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], given: Mapping[str, Any]) -> None:
        tokens = given.get("input_ids", args[0] if args else None)
        self.tokens_BT = tokens if isinstance(tokens, Tensor) and not tokens.is_floating_point() else None
        cache: Any = given.get("past_key_values")
        self.past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0

    @contextlib.contextmanager
    def listed(self, points: Mapping[str, HookPoint]) -> Iterator[None]:
        """More hook points; names that are there already come back at the end."""
        with contextlib.ExitStack() as stack:
            for registry in self._registries():
                stack.callback(_restore, registry, {name: registry.get(name) for name in points})
                registry.update(points)
            yield

    def _registries(self) -> list[dict[str, Any]]:
        """Where the model looks for names: a bridge makes its other lists from this one."""
        own = getattr(self.model, "_hook_registry", None)
        return [own] if isinstance(own, dict) else [self.model.hook_dict, self.model.mod_dict]  # type: ignore[list-item]

    @contextlib.contextmanager
    def hooked(self, hook: str, function: Callable[..., Tensor | None]) -> Iterator[None]:
        """A function at a hook point, after those that are there; `reset_hooks()` of a user leaves it."""
        point = self.points[hook]
        handle = point.add_hook(function, is_permanent=True)
        try:
            yield
        finally:
            handle.hook.remove()
            point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]

    @contextlib.contextmanager
    def switched_on(self, hooks: Iterable[str]) -> Iterator[None]:
        """Some hook points fire only while a setting is on; two of these settings exclude each other."""
        reason = getattr(self.model, "_gated_hook_reason", lambda name: None)
        wanted = {name for hook in hooks if (name := reason(self.points[hook].name or hook)) is not None}
        done: list[str] = []
        try:
            for name in wanted:
                getattr(self.model, f"set_{name}")(True)
                done.append(name)
            yield
        except ValueError as error:
            if len(done) == len(wanted):
                raise
            raise UserError(f"splice: these hook points exclude each other: {error}") from None
        finally:
            for name in done:
                getattr(self.model, f"set_{name}")(False)


def _restore(registry: dict[str, Any], before: Mapping[str, Any]) -> None:
    for name, point in before.items():
        registry.pop(name, None)
        if point is not None:
            registry[name] = point
