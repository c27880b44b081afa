"""Stacks: members of one architecture and shape that are stepped together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

from saeopt.config.run import PerformanceConfig
from saeopt.console import log
from saeopt.saes.base import SAE
from saeopt.saes.registry import get_sae
from saeopt.training.step.contract import Stack, StackOptions


def make_stack(
    saes: Sequence[SAE], seeds: Sequence[int], options: StackOptions, performance: PerformanceConfig
) -> Stack:
    """The fastest stack that `performance` allows for these members.

    They must be of one class and shape, at one hook point, with equal configs but for `stack_fields`. The
    modules in `stack.saes` are the members from here on.
    """
    from saeopt.training.step.reference import AutogradStack
    from saeopt.training.step.sparse import SparseStack
    from saeopt.training.step.stack import FusedStack

    reason = _why_not_fused(saes, options)
    if reason is not None and performance.stack != "reference":
        _notice(f"the fused step is not used: {reason}")
    if performance.stack == "reference" or reason is not None:
        return AutogradStack(saes, seeds, options)
    if saes[0].W_enc.is_cuda:
        from saeopt.training.step.gpu.dense import GpuStack
        from saeopt.training.step.gpu.relu import GpuReluStack
        from saeopt.training.step.gpu.topk import GpuSparseStack

        own = {"relu": GpuReluStack, "topk": GpuSparseStack}
        return own.get(saes[0].config.sae_type, GpuStack)(saes, seeds, options, performance)
    if "on" in (performance.compile, performance.graphs):
        _notice("'performance.compile' and 'performance.graphs' have no effect on the CPU")
    if saes[0].config.sae_type == "topk" and options.autocast is not None:
        _notice("'mixed_precision' has no effect on topk's fused step on the CPU (performance.stack: reference has it)")
    on_cpu = SparseStack if saes[0].config.sae_type == "topk" else FusedStack
    return on_cpu(saes, seeds, options, performance)


def _why_not_fused(saes: Sequence[SAE], options: StackOptions) -> str | None:
    """Why these members take the autograd step, or None."""
    import torch

    from saeopt.training.step.sparse import SparseStack
    from saeopt.training.step.stack import FusedStack

    first = saes[0]
    sae_type = first.config.sae_type
    if sae_type not in FusedStack.architectures | SparseStack.architectures or type(first) is not get_sae(sae_type):
        return f"'{sae_type}' has none"
    if options.autocast == torch.float16:
        return "float16 needs loss scaling"
    if first.W_enc.is_cuda and (find_spec("triton") is None or first.W_enc.dtype != torch.float32):
        return "it needs Triton and float32 weights on a GPU"
    if first.W_enc.device.type not in ("cpu", "cuda"):
        return f"there is none for {first.W_enc.device.type}"
    if any(not torch.equal(sae.scale, first.scale) for sae in saes):
        return "the members scale their activations differently"
    return None


@cache
def _notice(text: str) -> None:
    log.warning(text)
