"""What a pack needs on its device, from shapes alone.

The numbers per element were read off H100s and H200s with the fused stacks (torch.cuda.max_memory_allocated over the
sizes of scripts/bench_step.py); `scripts/bench_sweep.py` prints the estimate beside what a whole pipeline took.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from saeopt.config.run import RunConfig
from saeopt.training.step.choose import FAST
from saeopt.training.step.cpu import CHUNK
from saeopt.training.step.dense import ALONE

_PER_PARAMETER, _PER_PARAMETER_GPU = 16, 14
"""Weight, two moments and gradient in float32; fused step on a GPU: those three, and the weight in bfloat16."""
_GRADIENT = 2
"""Fused step on a GPU: the gradient, in bfloat16, of the stack whose turn it is."""
_PER_PARAMETER_ACCUMULATED = 4
"""A float32 sum of gradients where a window has several micro-batches."""
_GPU_PER_SELECTED = (48, 24)
"""Bytes per token and selected latent of the topk step, likewise: values, indices, what sorting takes."""
_GPU_PER_DEAD = 8
"""Bytes per token, dead latent and topk member: the auxiliary code and its gradient, in and out of the products."""
_DEAD_SHARE = 0.05
"""Dead latents that the estimate of a topk stack has room for; how many there will be is not known before."""
_GPU_PER_WIDTH = 6
"""Bytes per token, input and member: x̄, the reconstruction, its error."""
_GPU_LIBRARIES = 2 * 2**25
"""Workspaces of the matrix products, one per stream."""
_OTHER = 48.0
"""Bytes per token and latent of an architecture that has no fast step (`step.choose.FAST` has those of the others)."""
_CENTRED = 4
"""Activations that were centred or whitened, and what does it, are in the weights' float32."""
_LAYER_COPIES = 14
"""Arrays of tokens x d that one layer of the language model has at a time."""
_ATTENTION_SCORE = 6
"""Bytes per score of an attention that is written out, compiled: float32, and once in the model's precision."""
_GPU_PASS_TOKENS = 32768
_LOGITS = {"cpu": 2**28, "cuda": 2**31}


@dataclass(frozen=True)
class ModelShape:
    """The language model: its parameters, vocabulary, bytes of buffers, and heads whose scores are written out."""

    parameters: int
    vocabulary: int
    buffer_bytes: int = 0
    written_heads: int = 0


@dataclass(frozen=True)
class MemberShape:
    """One SAE: its site's key, its widths, its number of parameters, and k where it has one.

    `e` 0: what is written is as wide as what is read. `by_hook`: the widths of the site's hook points, where it is no
    autoencoder's; `centring`: the numbers by which activations are centred and whitened.
    """

    hook_point: str
    sae_type: str
    d: int
    h: int
    n_parameters: int
    k: int = 0
    e: int = 0
    by_hook: Mapping[str, int] | None = None
    centring: int = 0

    @property
    def both(self) -> int:
        """What is read and what is written, side by side."""
        return self.d + (self.e or self.d)


def estimate(
    config: RunConfig,
    members: Iterable[MemberShape],
    lm: ModelShape,
    lm_bytes: int,
    device_type: str = "cuda",
) -> dict[str, int]:
    """Bytes by purpose; their sum is the peak. `lm_bytes` is the size of one number of the language model."""
    members = list(members)
    on_gpu, data = device_type == "cuda", config.data
    micro = data.train_batch_size * data.context_length
    samples = config.lm_batch_size or (_GPU_PASS_TOKENS if on_gpu else micro) // data.context_length
    per_pass = max(1, samples) * data.context_length
    group = max(micro, per_pass // micro * micro, _round_up(data.shuffle_buffer_tokens, micro))
    widths = {hook: width for m in members for hook, width in (m.by_hook or {m.hook_point: m.d}).items()}
    activations = group * lm_bytes * sum(widths.values()) * (2 if on_gpu else 1)
    centred = {m.hook_point: m.d if m.by_hook is None else m.both for m in members if m.centring}
    activations += _CENTRED * micro * sum(centred.values())  # once for all members of a site
    per_token = lm_bytes * _LAYER_COPIES * max(widths.values())
    passing = min(per_pass, group) * (per_token + _ATTENTION_SCORE * lm.written_heads * data.context_length)
    step = gpu_step(members, micro, _gpu_products(config)) if on_gpu else _cpu_step(config, members, micro)
    logits = _evaluation(config, lm.vocabulary, lm_bytes, device_type) if data.n_eval_samples and lm.vocabulary else 0
    per_parameter = _PER_PARAMETER_GPU if on_gpu and _gpu_products(config) else _PER_PARAMETER
    accumulated = _PER_PARAMETER_ACCUMULATED if on_gpu and config.gradient_accumulation_steps > 1 else 0
    return {
        "language model": lm.parameters * lm_bytes + lm.buffer_bytes,
        "weights, gradients, optimiser": sum(m.n_parameters for m in members) * (per_parameter + accumulated)
        + _CENTRED * sum(m.centring for m in members),
        "activations": activations,
        "step and harvest": step + passing,
        "evaluation, beyond the step": max(0, logits - step - passing),
    }


def _gpu_products(config: RunConfig) -> int:
    """Bytes of a number in the fused step's products; 0 where the step is the reference."""
    if config.performance.stack == "reference" or config.mixed_precision == "fp16":
        return 0
    return 4 if config.mixed_precision == "no" else 2


def gpu_step(members: list[MemberShape], tokens: int, product_bytes: int = 2) -> int:
    """What the largest stack takes, its gradients included: stacks run one after another and share their memory.

    The step needs most either behind the code's gradient, before there are any of the weights, or at its end.
    Members of a topk stack have room for the largest k among them.
    """
    slow = [m for m in members if product_bytes == 0 or m.by_hook]  # one member after another
    needed = max((int(tokens * (_OTHER * m.h + 8 * m.both)) for m in slow), default=0)
    if len(slow) == len(members):
        return needed + _GPU_LIBRARIES
    stacks: dict[tuple[str, str, int, int], list[MemberShape]] = {}
    for m in members:
        if not m.by_hook:
            stacks.setdefault((m.hook_point, m.sae_type, m.d, m.h), []).append(m)
    fast = max(_gpu_stack(stack, tokens, product_bytes) for stack in stacks.values())
    return max(needed, fast) + _GPU_LIBRARIES


def _gpu_stack(members: list[MemberShape], tokens: int, product_bytes: int) -> int:
    first, k = members[0], max(m.k for m in members)
    row = FAST.get(first.sae_type)
    per_code = (_OTHER, _OTHER) if row is None else row.gpu_bytes
    if row is not None and first.d <= row.keeps_code and product_bytes == 2:
        per_code = (0.0, 0.0)  # its kernels keep the code to themselves
    dead = _GPU_PER_DEAD * _DEAD_SHARE * first.h if k else 0.0
    dense = [(c * first.h + dead + _GPU_PER_WIDTH * first.d) * product_bytes / 2 for c in per_code]
    need = [tokens * (d + s * k) for d, s in zip(dense, _GPU_PER_SELECTED, strict=True)]
    gradients = _GRADIENT * first.n_parameters
    if len(members) > 1 and k == 0 and per_code[0] and tokens * first.h >= ALONE:
        return int(max(need) + len(members) * gradients)  # one after another, into gradients that are there already
    return int(len(members) * max(need[0], need[1] + gradients))


def _cpu_step(config: RunConfig, members: list[MemberShape], tokens: int) -> int:
    fused = config.performance.stack != "reference"

    def own(m: MemberShape) -> float:
        row = FAST.get(m.sae_type)
        chunks = fused and row is not None and row.cpu is not None and not m.by_hook
        elements = min(tokens * m.h, CHUNK) if chunks else tokens * m.h
        return (_OTHER if row is None else row.cpu_bytes) * elements + 8 * tokens * m.both

    return int(max(own(m) for m in members))


def _evaluation(config: RunConfig, vocabulary: int, lm_bytes: int, device_type: str) -> int:
    """Clean and spliced logits of as many samples as evaluation takes at once, and one sample in float32."""
    sample = config.data.context_length * vocabulary
    at_once = min(config.data.eval_batch_size, max(1, _LOGITS.get(device_type, 2**28) // (4 * sample)))
    return sample * (2 * lm_bytes * at_once + 3 * 4)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
