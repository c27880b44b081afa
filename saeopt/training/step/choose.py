"""Which way a stack steps: one row per architecture that has more than the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from saeopt.config.machine import PerformanceConfig
from saeopt.console import log
from saeopt.saes.base import SAE
from saeopt.saes.registry import get_sae
from saeopt.training.step import dense, forms, gates
from saeopt.training.step.contract import StackOptions
from saeopt.training.step.cpu import dense_on_cpu
from saeopt.training.step.forms import Form
from saeopt.training.step.jumprelu import JUMPRELU
from saeopt.training.step.reference import one_by_one
from saeopt.training.step.sparse import topk_on_cpu
from saeopt.training.step.stack import Assembly, Stack, Watcher


def _on_gpu(module: str, *own: Any) -> Callable[..., Assembly]:
    """A module of `gpu`, imported where it is needed: it needs Triton."""

    def make(*given: Any) -> Assembly:
        made: Assembly = import_module(f"saeopt.training.step.gpu.{module}").assembly(*own, *given)
        return made

    return make


class Fast(NamedTuple):
    """An architecture's fast steps and what they cost.

    `form`: the numbers that never change, also whether the decoder's rows are free, of norm 1, or directions.
    `cpu` makes an :class:`Assembly` from form, members and options, `gpu` from the config's performance section
    besides. `cpu_bytes`: bytes per token and latent of the reference step, of which the fused one has a chunk at a
    time. `gpu_bytes`: per token, latent and member of the fused step: behind the code's gradient, and beside the
    weights' own. `keeps_code`: up to this width the GPU's step never writes its code. `rounds`: whether the CPU's step
    heeds `mixed_precision`.
    """

    form: Callable[[SAE], Form]
    cpu: Callable[[Form, Sequence[SAE], StackOptions], Assembly]
    gpu: Callable[[Form, Sequence[SAE], StackOptions, PerformanceConfig], Assembly]
    cpu_bytes: float
    gpu_bytes: tuple[float, float]
    keeps_code: int = 0
    rounds: bool = True


def _dense(architecture: dense.Architecture) -> tuple[Any, Any]:
    return partial(dense_on_cpu, architecture), _on_gpu("dense", architecture)


FAST = {
    "relu": Fast(
        forms.plain, partial(dense_on_cpu, dense.RELU), _on_gpu("relu"), 16.0, (4.0, 4.0), keeps_code=dense.NARROW
    ),
    "gated": Fast(forms.gated, *_dense(gates.GATED), 32.0, (10.0, 4.0)),
    "hard_concrete": Fast(forms.hard_concrete, *_dense(gates.HARD_CONCRETE), 48.0, (12.0, 6.0)),
    "gated_hard_concrete": Fast(forms.gated_hard_concrete, *_dense(gates.GATED_HARD_CONCRETE), 48.0, (10.0, 4.0)),
    "topk": Fast(forms.plain, topk_on_cpu, _on_gpu("topk"), 20.0, (2.0, 2.0), rounds=False),
    "batch_topk": Fast(forms.plain, topk_on_cpu, _on_gpu("batch_topk"), 20.0, (2.3, 2.0), rounds=False),
    "jumprelu": Fast(forms.jumprelu, partial(dense_on_cpu, JUMPRELU), _on_gpu("jumprelu"), 28.0, (4.0, 4.0)),
}
FAST["matryoshka_batch_topk"] = FAST["batch_topk"]


def make_stack(
    saes: Sequence[SAE],
    seeds: Sequence[int],
    options: StackOptions,
    performance: PerformanceConfig,
    watcher: Watcher | None = None,
) -> Stack:
    """The fastest stack that `performance` allows for these members.

    They must be of one class and shape, at one site, with equal configs but for `stack_fields`. The modules in
    `stack.saes` are the members from here on.
    """
    reason = _why_not_fused(saes, options)
    if reason is not None and performance.stack != "reference":
        _notice(f"the fused step is not used: {reason}")
    if performance.stack == "reference" or reason is not None:
        return reference_stack(saes, seeds, options, watcher)
    row = FAST[saes[0].config.sae_type]
    form = row.form(saes[0])._replace(dead_after=options.dead_after_tokens)
    if saes[0].W_enc.is_cuda:
        assembly = row.gpu(form, saes, options, performance)
    else:
        if "on" in (performance.compile, performance.graphs):
            _notice("'performance.compile' and 'performance.graphs' have no effect on the CPU")
        if not row.rounds and options.autocast is not None:
            _notice(
                f"'mixed_precision' has no effect on {saes[0].config.sae_type}'s fused step on the CPU"
                " (performance.stack: reference has it)"
            )
        assembly = row.cpu(form, saes, options)
    return Stack(saes, seeds, options, assembly, watcher)


def reference_stack(
    saes: Sequence[SAE], seeds: Sequence[int], options: StackOptions, watcher: Watcher | None = None
) -> Stack:
    """Plain autograd, any architecture and device."""
    return Stack(saes, seeds, options, one_by_one(saes, options), watcher)


def _why_not_fused(saes: Sequence[SAE], options: StackOptions) -> str | None:
    """Why these members take the reference step, or None."""
    first = saes[0]
    sae_type = first.config.sae_type
    if sae_type not in FAST or type(first) is not get_sae(sae_type):
        return f"'{sae_type}' has none"
    if getattr(first.config, "auxk_coeff", 0) > 0:
        return "'saes.auxk_coeff' has none"
    if first.widths is not None:
        return "it is for what reads and writes one hook point"
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
