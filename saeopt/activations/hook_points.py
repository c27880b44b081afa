"""Names of hook points: which ones are plain boundaries between layers, and which ones a pattern means."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence

from saeopt.errors import UserError

_RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
_NUMBER = re.compile(r"(\d+)")


def boundary(hook: str) -> int | None:
    """The boundary of a plain residual-stream hook: b lies between layer b − 1 and layer b; None for other hooks.

    `blocks.L.hook_resid_pre` is boundary L and `blocks.L.hook_resid_post` is boundary L + 1.
    """
    match = _RESIDUAL.fullmatch(hook)
    if match is None:
        return None
    return int(match[1]) + (match[2] == "post")


def residual_hooks(n_layers: int) -> list[str]:
    """Every plain residual-stream hook of a model with so many layers."""
    return [f"blocks.{layer}.hook_resid_{side}" for layer in range(n_layers) for side in ("pre", "post")]


def in_model_order(hooks: Iterable[str]) -> list[str]:
    """Sorted by layer, numbers as numbers, without doubles."""
    return sorted(set(hooks), key=lambda h: [int(p) if p.isdigit() else p for p in _NUMBER.split(h)])


def is_residual_pattern(pattern: str) -> bool:
    """Whether a name or pattern can only mean plain residual-stream hooks (so that no other list is needed)."""
    return re.fullmatch(r"blocks\.[\d*?\[\]!-]+\.hook_resid_(pre|post|p\*|\*p(re|ost))", pattern) is not None


def misnamed(hooks: Mapping[str, object]) -> dict[str, str]:
    """Hook points that are not what their names say, and the names of what they are.

    Of a block of experts TransformerLens has no neurons: its `hook_pre` is the block's input, its `hook_post` the
    output.
    """
    ends = {"hook_pre": "hook_in", "hook_post": "hook_out"}
    found = {}
    for name, point in hooks.items():
        owner, _, last = name.rpartition(".")
        other = f"{owner}.{ends[last]}" if last in ends else ""
        if other in hooks and hooks[other] is point:
            found[name] = other
    return found


def match_hooks(patterns: Sequence[str], known: Sequence[str], misnamed: Mapping[str, str] | None = None) -> list[str]:
    """The hook points that names and glob patterns mean, in model order.

    Raises:
        UserError: a pattern that matches nothing; the line lists near names. Or one that asks for `misnamed` ones.
    """
    found: list[str] = []
    names = set(known)
    for pattern in patterns:
        if asked := [n for n in fnmatch.filter(misnamed or {}, pattern) if n.endswith(pattern.rpartition(".")[2])]:
            raise UserError(
                f"'saes.sae_positions': {asked[0]} has no neurons (a mixture of experts): TransformerLens means"
                f" {(misnamed or {})[asked[0]]} by it; name that one, or another hook point"
            )
        matched = [pattern] if pattern in names else fnmatch.filter(known, pattern)
        if not matched:
            raise UserError(f"'saes.sae_positions': the model has no hook point '{pattern}'{near(pattern, known)}")
        found += matched
    return in_model_order(found)


_LAYER = re.compile(r"(?:.*\.)?(?:layers?|h|blocks?)\.(\d+|\*)(?:\.(.+))?")
_PARTS = {
    "hook_resid_pre": "input",
    "hook_resid_post": "output",
    "hook_mlp_out": "mlp mlp.output feed_forward ffn block_sparse_moe mlp.down_proj mlp.c_proj mlp.dense_4h_to_h",
    "mlp.hook_post": "mlp.act mlp.act_fn",
    "hook_attn_out": "attn attention self_attn self_attention self_attn.o_proj attn.c_proj attention.dense"
    " attn.output self_attn.output",
    "ln1.hook_normalized": "input_layernorm ln_1 ln1",
    "ln2.hook_normalized": "post_attention_layernorm ln_2 ln2",
}
_HOOK_OF_PART = {part: hook for hook, parts in _PARTS.items() for part in parts.split()} | {"": "hook_resid_post"}


def hook_of_module(name: str) -> str | None:
    """The hook point of what a module of a Hugging Face model puts out; None where there is none.

    `model.layers.2` and `transformer.h.2` are `blocks.2.hook_resid_post`, `….2.mlp` is `blocks.2.hook_mlp_out`.
    """
    if re.fullmatch(r"(?:.*\.)?(?:embed_tokens|wte|embed_in)", name):
        return "hook_embed"
    if states := re.fullmatch(r"hidden_states[.\[](\d+)\]?", name):
        return f"blocks.{states[1]}.hook_resid_pre"
    match = _LAYER.fullmatch(name)
    part = _HOOK_OF_PART.get(match[2] or "") if match else None
    return f"blocks.{match[1]}.{part}" if match and part else None


def near(pattern: str, known: Sequence[str]) -> str:
    """What an unknown name may have meant, as the end of a message: what a module's name is here, or near names."""
    here = hook_of_module(pattern)
    if here is not None and fnmatch.filter(known, here):
        return f"; that is '{here}' here"
    close = difflib.get_close_matches(here or pattern, known, n=3, cutoff=0.4)
    last = in_model_order(known)[-1:] if not close else []
    return "; near ones: " + ", ".join(close or last) if close or last else ""
