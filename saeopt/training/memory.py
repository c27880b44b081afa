"""What a pack needs on its device, estimated from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from saeopt.config.run import RunConfig

_OPTIMISER_BYTES = 16
"""Per parameter: weight, gradient and two Adam moments in float32."""
_CODE_COPIES = {"relu": 4, "topk": 5, "gated": 8, "hard_concrete": 12, "gated_hard_concrete": 12}
"""Arrays of N x h that the reference step of an architecture keeps for its backward pass."""
_LAYER_COPIES = 16
"""Arrays of N x d that one layer of the language model has at a time."""


@dataclass(frozen=True)
class MemberShape:
    """One SAE: where it sits, its widths and number of parameters."""

    hook_point: str
    sae_type: str
    d: int
    h: int
    n_parameters: int


def member_bytes(member: MemberShape, config: RunConfig) -> int:
    """Weights, gradient and optimiser of one member."""
    return member.n_parameters * _OPTIMISER_BYTES


def step_bytes(member: MemberShape, config: RunConfig) -> int:
    """What one micro-batch of one member needs while it is stepped."""
    n_tokens = config.data.train_batch_size * config.data.context_length
    return 4 * n_tokens * (_CODE_COPIES.get(member.sae_type, 8) * member.h + 4 * member.d)


def estimate(
    config: RunConfig, members: Iterable[MemberShape], lm_parameters: int, lm_bytes: int, vocabulary: int
) -> dict[str, int]:
    """Bytes by purpose; `lm_bytes` is the size of one number of the language model.

    Members are stepped one after another, so that the largest counts; harvesting and evaluation do not overlap.
    """
    members = list(members)
    data = config.data
    n_tokens = data.train_batch_size * data.context_length
    by_hook = {m.hook_point: m.d for m in members}
    harvest = n_tokens * lm_bytes * (_LAYER_COPIES * max(by_hook.values()) + 2 * sum(by_hook.values()))
    logits = 3 * 4 * data.eval_batch_size * data.context_length * vocabulary if data.n_eval_samples else 0
    return {
        "language model": lm_parameters * lm_bytes,
        "weights, gradients, optimiser": sum(member_bytes(m, config) for m in members),
        "step": max(step_bytes(m, config) for m in members),
        "harvest or evaluation": max(harvest, logits),
        "shuffle buffer": data.shuffle_buffer_tokens * sum(by_hook.values()) * lm_bytes,
    }
