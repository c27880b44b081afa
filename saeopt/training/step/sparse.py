"""The topk step on the CPU: nothing dense after the encoder.

Shape suffixes: N tokens, d model width, h dictionary width, k kept latents. Selection is exact and in two stages
(the k groups with the largest maxima hold the k largest elements); decoder and gradients are weighted sums of
rows, which `embedding_bag` computes without writing the products down.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from saeopt.saes.base import Ratio
from saeopt.training.step.contract import Example, Hyper
from saeopt.training.step.stack import FusedStack
from saeopt.training.step.storage import Store

_GROUP = 16
_SELECT_ELEMENTS = 2**18
"""Pre-activations selected from at a time: they stay in the second-level cache."""


class Code(NamedTuple):
    """k latents per token: values ≥ 0 and indices."""

    values_Nk: Tensor
    index_Nk: Tensor


def largest(pre_Nh: Tensor, k: int) -> Code:
    """The k largest of relu(π) of each row, in no order; exact, ties broken anyhow.

    Selection comes before the relu, which then has k values to look at instead of h.
    """
    n, h = pre_Nh.shape
    groups = h // _GROUP
    if h % _GROUP or groups < 2 * k:
        values_Nk, index_Nk = pre_Nh.topk(k, dim=-1, sorted=False)
        return Code(values_Nk.relu_(), index_Nk)
    by_group = pre_Nh.view(n, groups, _GROUP)
    chosen_Nk = by_group.amax(-1).topk(k, dim=-1, sorted=False).indices
    survivors = by_group.gather(1, chosen_Nk.unsqueeze(-1).expand(n, k, _GROUP)).view(n, k * _GROUP)
    values_Nk, at_Nk = survivors.topk(k, dim=-1, sorted=False)
    group_Nk = chosen_Nk.gather(1, at_Nk // _GROUP)
    return Code(values_Nk.relu_(), group_Nk * _GROUP + at_Nk % _GROUP)


def weighted_rows(code: Code, rows_hd: Tensor) -> Tensor:
    """Σ_j value_j rows[index_j] per token, (N, d)."""
    return embedding_bag(code.index_Nk, rows_hd, per_sample_weights=code.values_Nk, mode="sum")


def pulled_back(code: Code, g_Nd: Tensor, rows_hd: Tensor) -> Tensor:
    """⟨g, rows[index_j]⟩ where the value is not 0: the gradient of the code before its relu, (N, k)."""
    dots_Nk = torch.bmm(rows_hd[code.index_Nk], g_Nd.unsqueeze(-1)).squeeze(-1)
    return dots_Nk * (code.values_Nk > 0)


def _order(index: Tensor, h: int) -> Tensor:
    """Stable argsort; numpy sorts 16-bit keys by radix, many times faster than a comparison sort."""
    if h > 2**16:
        return index.argsort(stable=True)
    return torch.from_numpy(np.argsort(index.numpy().astype(np.uint16), kind="stable"))


class ByLatent:
    """The entries of a code sorted by latent: sums over the tokens of each latent."""

    def __init__(self, code: Code, h: int) -> None:
        flat = code.index_Nk.reshape(-1)
        self.order = _order(flat, h)
        self.tokens = torch.div(self.order, code.index_Nk.shape[1], rounding_mode="floor")
        self.offsets_h = torch.searchsorted(flat[self.order], torch.arange(h, dtype=flat.dtype))

    def __call__(self, weights_Nk: Tensor, rows_Nd: Tensor) -> Tensor:
        """Σ over a latent's tokens of weight · row, (h, d)."""
        weights = weights_Nk.reshape(-1)[self.order]
        return embedding_bag(self.tokens, rows_Nd, self.offsets_h, per_sample_weights=weights, mode="sum")


class SparseStack(FusedStack):
    """topk members on the CPU."""

    architectures: ClassVar[frozenset[str]] = frozenset({"topk"})

    def _prepare(self) -> None:
        self.aux_k: int = self.saes[0].aux_k  # type: ignore[assignment]
        self.aux_share: float = self.saes[0].aux_share  # type: ignore[assignment]
        self.aux_grads: Store = {}
        super()._prepare()
        self.window["ratio"] = self._zeros(len(self.saes), self.d + 2)  # parts of `Ratio`

    def _accumulate_member(
        self, member: int, example: Example, x_Nd: Tensor, keep_N: Tensor | None, numbers: Hyper
    ) -> None:
        weights = {name: tensor[member] for name, tensor in self.packed.weights.items()}
        b_enc_h, b_dec_d = (self.packed.vector(self.packed.weights, n)[member] for n in ("b_enc", "b_dec"))
        dead_h = self.packed.buffers["tokens_since_fired"][member] >= self.options.dead_after_tokens
        centred_Nd = x_Nd - b_dec_d
        code, dead = self._select(member, centred_Nd, weights["W_enc"], b_enc_h, dead_h.nonzero().squeeze(-1), keep_N)
        error_Nd = weighted_rows(code, weights["W_dec"]).add_(b_dec_d).sub_(x_Nd)
        if keep_N is not None:
            error_Nd.mul_(keep_N.unsqueeze(-1))
        grads = {name: tensor[member] for name, tensor in self.grads.items()}
        self._add_gradients(grads, weights, code, error_Nd * (2 * self.form.mse), centred_Nd, decoder_bias=True)
        squared, fired = error_Nd.square().sum(), code.values_Nk > 0
        totals = torch.stack([self.form.mse * squared, squared, torch.zeros_like(squared), fired.sum().to(self.dtype)])
        self.window["totals"][member] += totals
        self.window["fired"][member].index_add_(0, code.index_Nk.reshape(-1), fired.reshape(-1).double())
        ratio = self.window["ratio"][member]
        ratio[1] += squared.double()
        ratio[2:] -= error_Nd.sum(0, dtype=torch.float64)
        if dead is not None:
            self._accumulate_aux(member, weights, dead, error_Nd, centred_Nd, keep_N)

    def _select(
        self, member: int, centred_Nd: Tensor, W_enc_hd: Tensor, b_enc_h: Tensor, dead: Tensor, keep_N: Tensor | None
    ) -> tuple[Code, Code | None]:
        """The code and the code of the dead latents (None where there are none), chunk by chunk."""
        config: Any = self.saes[member].config
        codes, dead_codes = [], []
        step = max(64, _SELECT_ELEMENTS // self.h)
        for at in range(0, len(centred_Nd), step):
            pre_Nh = torch.addmm(b_enc_h, centred_Nd[at : at + step], W_enc_hd.T)
            found = [largest(pre_Nh, config.k)]
            if len(dead):
                of_dead = largest(pre_Nh[:, dead], min(self.aux_k, len(dead)))
                found.append(Code(of_dead.values_Nk, dead[of_dead.index_Nk]))
            if keep_N is not None:
                for code in found:
                    code.values_Nk.mul_(keep_N[at : at + step].unsqueeze(-1))
            codes.append(found[0])
            dead_codes += found[1:]
        code = Code(*(torch.cat(parts) for parts in zip(*codes, strict=True)))
        return code, Code(*(torch.cat(parts) for parts in zip(*dead_codes, strict=True))) if dead_codes else None

    def _add_gradients(
        self, grads: Store, weights: Store, code: Code, g_Nd: Tensor, centred_Nd: Tensor, *, decoder_bias: bool
    ) -> None:
        """Gradients of Σ over tokens with ∂/∂x̂ = g."""
        g_code_Nk = pulled_back(code, g_Nd, weights["W_dec"])
        by_latent = ByLatent(code, self.h)
        grads["W_dec"] += by_latent(code.values_Nk, g_Nd)
        grads["W_enc"] += by_latent(g_code_Nk, centred_Nd)
        g_b_enc_h = torch.zeros(self.h, dtype=self.dtype).index_add_(0, code.index_Nk.view(-1), g_code_Nk.view(-1))
        grads["vectors"][self.packed.slices["b_enc"]] += g_b_enc_h
        g_b_dec = grads["vectors"][self.packed.slices["b_dec"]]
        g_b_dec -= g_b_enc_h @ weights["W_enc"]
        if decoder_bias:
            g_b_dec += g_Nd.sum(0)

    def _accumulate_aux(
        self, member: int, weights: Store, dead: Code, error_Nd: Tensor, centred_Nd: Tensor, keep_N: Tensor | None
    ) -> None:
        weight = self.aux_share * (float(self.packed.buffers["variance"][member]) if self.saes[0].recipe > 1 else 1.0)
        left_Nd = error_Nd.neg().sub_(weighted_rows(dead, weights["W_dec"]))
        self.window["ratio"][member, 0] += weight * left_Nd.square().sum().double()
        self._start_aux()
        grads = {name: tensor[member] for name, tensor in self.aux_grads.items()}
        self._add_gradients(grads, weights, dead, left_Nd * (-2 * weight), centred_Nd, decoder_bias=False)

    def _start_aux(self) -> None:
        if not self.aux_grads:
            self.aux_grads = {name: torch.zeros_like(tensor) for name, tensor in self.packed.weights.items()}

    def sums(self) -> list[Tensor]:
        self._start_aux()
        return [*self.aux_grads.values(), *super().sums()]

    def _settle(self, grads: Store, window: Store, n: Tensor) -> Tensor:
        """The auxiliary loss has a denominator of its own, known now: its gradients join the others times n / it."""
        values = []
        for member in range(len(self.saes)):
            parts = window["ratio"][member]
            over = Ratio(parts[0], parts[1], parts[2:]).inverse_denominator(n)
            values.append(parts[0] * over)
            for name, tensor in self.aux_grads.items():
                grads[name][member].add_(tensor[member] * (over * n).to(self.dtype))
        return torch.stack(values)

    def _clear(self) -> None:
        super()._clear()
        for tensor in self.aux_grads.values():
            tensor.zero_()
