"""The topk step on the CPU: nothing dense after the encoder.

Shape suffixes: N tokens, d model width, h dictionary width, k kept latents. Selection is exact and in two stages
(the k groups with the largest maxima hold the k largest elements); decoder and gradients are weighted sums of
rows, which `embedding_bag` computes without writing the products down.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from saeopt.saes.base import SAE, Ratio
from saeopt.saes.topk import TopKSAE
from saeopt.training.step.books import Books, kept, zeros
from saeopt.training.step.contract import Example, Optimiser, Parts, Pass, StackOptions, Store
from saeopt.training.step.cpu import InPlace
from saeopt.training.step.forms import Form
from saeopt.training.step.numbers import Table
from saeopt.training.step.optimiser import CpuOptimiser
from saeopt.training.step.stack import Assembly
from saeopt.training.step.storage import VECTORS, Packed

AUX = "aux."

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


class SparsePass(Pass):
    """topk members on the CPU. The auxiliary loss's gradients lie beside the others under `AUX`."""

    def __init__(self, storage: Packed, dead_after: int) -> None:
        self.storage, self.dead_after = storage, dead_after
        self.members = [sae for sae in storage.saes if isinstance(sae, TopKSAE)]
        self.sums = InPlace(storage, self._aux)
        self.share, self.has_variance = self.members[0].aux_share, "variance" in storage.buffers

    def _aux(self) -> Parts:
        """The auxiliary loss's gradients, which have a denominator of their own, and the parts of its `Ratio`."""
        storage = self.storage
        ratio = zeros(len(self.members), storage.d + 2, device=storage.device)
        return Parts({AUX + n: torch.zeros_like(tensor) for n, tensor in storage.weights.items()}, {"ratio": ratio})

    def before(self, example: Example, *, first: bool) -> None:
        """As the contract says."""
        self.storage.refresh_changed()

    def gradients(self, example: Example, *, first: bool) -> Parts:
        """As the contract says."""
        parts, x_Nd, keep_N = self.sums.start(example, first=first)
        for member in range(len(self.members)):
            self._member(parts, member, x_Nd, keep_N)
        return parts

    def _member(self, parts: Parts, member: int, x_Nd: Tensor, keep_N: Tensor | None) -> None:
        storage, window = self.storage, parts.window
        weights = {name: tensor[member] for name, tensor in storage.weights.items()}
        b_enc_h, b_dec_d = (storage.vector(storage.weights, n)[member] for n in ("b_enc", "b_dec"))
        dead_h = storage.since_Mh[member] >= self.dead_after
        centred_Nd = x_Nd - b_dec_d
        code, dead = self._select(member, centred_Nd, weights["W_enc"], b_enc_h, dead_h.nonzero().squeeze(-1), keep_N)
        error_Nd = weighted_rows(code, weights["W_dec"]).add_(b_dec_d).sub_(x_Nd)
        if keep_N is not None:
            error_Nd.mul_(keep_N.unsqueeze(-1))
        mse, grads = storage.form.mse, {name: parts.grads[name][member] for name in weights}
        self._add_gradients(grads, weights, code, error_Nd * (2 * mse), centred_Nd, decoder_bias=True)
        squared, fired = error_Nd.square().sum(), code.values_Nk > 0
        totals = torch.stack([mse * squared, squared, torch.zeros_like(squared), fired.sum().to(storage.dtype)])
        window["totals"][member] += totals
        window["fired"][member].index_add_(0, code.index_Nk.reshape(-1), fired.reshape(-1).double())
        ratio = window["ratio"][member]
        ratio[1] += squared.double()
        ratio[2:] -= error_Nd.sum(0, dtype=torch.float64)
        if dead is not None:
            weight = self.share * (float(storage.buffers["variance"][member]) if self.has_variance else 1.0)
            left_Nd = error_Nd.neg().sub_(weighted_rows(dead, weights["W_dec"]))
            ratio[0] += weight * left_Nd.square().sum().double()
            grads = {name: parts.grads[AUX + name][member] for name in weights}
            self._add_gradients(grads, weights, dead, left_Nd * (-2 * weight), centred_Nd, decoder_bias=False)

    def _select(
        self, member: int, centred_Nd: Tensor, W_enc_hd: Tensor, b_enc_h: Tensor, dead: Tensor, keep_N: Tensor | None
    ) -> tuple[Code, Code | None]:
        """The code and the code of the dead latents (None where there are none), chunk by chunk."""
        sae = self.members[member]
        codes, dead_codes = [], []
        step = max(64, _SELECT_ELEMENTS // self.storage.h)
        for at in range(0, len(centred_Nd), step):
            pre_Nh = torch.addmm(b_enc_h, centred_Nd[at : at + step], W_enc_hd.T)
            found = [largest(pre_Nh, sae.config.k)]
            if len(dead):
                of_dead = largest(pre_Nh[:, dead], min(sae.aux_k, len(dead)))
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
        storage = self.storage
        g_code_Nk = pulled_back(code, g_Nd, weights["W_dec"])
        by_latent = ByLatent(code, storage.h)
        grads["W_dec"] += by_latent(code.values_Nk, g_Nd)
        grads["W_enc"] += by_latent(g_code_Nk, centred_Nd)
        g_b_enc_h = torch.zeros(storage.h, dtype=storage.dtype)
        g_b_enc_h.index_add_(0, code.index_Nk.view(-1), g_code_Nk.view(-1))
        grads[VECTORS][storage.slices["b_enc"]] += g_b_enc_h
        g_b_dec = grads[VECTORS][storage.slices["b_dec"]]
        g_b_dec -= g_b_enc_h @ weights["W_enc"]
        if decoder_bias:
            g_b_dec += g_Nd.sum(0)

    def settle(self, parts: Parts) -> Tensor:
        """The auxiliary loss's denominator is known now: its gradients join the others times n / it."""
        (grads, window), values = parts, []
        n = kept(window).clamp_min(1)
        for member, ratio in enumerate(window["ratio"]):
            over = Ratio(ratio[0], ratio[1], ratio[2:]).inverse_denominator(n)
            values.append(ratio[0] * over)
            for name in self.storage.weights:
                grads[name][member].add_(grads[AUX + name][member] * (over * n).to(self.storage.dtype))
        return torch.stack(values)


def topk_on_cpu(form: Form, saes: Sequence[SAE], options: StackOptions) -> Assembly:
    """topk members."""
    storage = Packed(saes, form, saes[0].W_enc.dtype)

    def build(table: Table, books: Books, seeds: Sequence[int]) -> tuple[Pass, Optimiser]:
        return SparsePass(storage, options.dead_after_tokens), CpuOptimiser(storage, table, books)

    return Assembly("cpu", storage, build)
