"""The steps of topk and batch_topk on the CPU: nothing dense after the encoder.

Shape suffixes: N tokens, d model width, h dictionary width, k kept latents, E entries of a code, B bags: the sums that
it is decoded to, one per token, or one per token and prefix of the dictionary. Selection is exact: of a token in two
stages (the k groups with the largest maxima hold the k largest elements), of a micro-batch among what is above the
best bound so far. Decoder and gradients are weighted sums of rows, which `embedding_bag` computes without writing the
products down.
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
from saeopt.training.step.contract import TALLY, Example, Optimiser, Parts, Pass, StackOptions, Store
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
    """k latents per token: values ≥ 0 and indices. Or E entries in all, in the order of their bags."""

    values_Nk: Tensor
    index_Nk: Tensor
    bags_E: Tensor | None = None
    starts_B: Tensor | None = None
    """Each bag's first entry."""


def in_bags(values_E: Tensor, index_E: Tensor, tokens_E: Tensor, n: int, ends: Tensor) -> Code:
    """Entries of n tokens, ascending by token and latent; `ends` are those of the dictionary's prefixes."""
    bags_E = tokens_E * len(ends) + torch.bucketize(index_E, ends, right=True)
    return Code(values_E, index_E, bags_E, torch.searchsorted(bags_E, torch.arange(n * len(ends))))


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
    """Σ_j value_j rows[index_j] per token or bag, (B, d)."""
    return embedding_bag(code.index_Nk, rows_hd, code.starts_B, per_sample_weights=code.values_Nk, mode="sum")


def pulled_back(code: Code, g_Bd: Tensor, rows_hd: Tensor) -> Tensor:
    """⟨g, rows[index_j]⟩ where the value is not 0: the gradient of the code before its relu, (N, k)."""
    if code.bags_E is None:
        return torch.bmm(rows_hd[code.index_Nk], g_Bd.unsqueeze(-1)).squeeze(-1) * (code.values_Nk > 0)
    some = max(64, _SELECT_ELEMENTS // rows_hd.shape[1])
    pairs = zip(code.index_Nk.split(some), code.bags_E.split(some), strict=True)
    dots_E = torch.cat([torch.linalg.vecdot(rows_hd[index], g_Bd[bags]) for index, bags in pairs])
    return dots_E * (code.values_Nk > 0)


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
        if code.bags_E is None:
            self.bags = torch.div(self.order, code.index_Nk.shape[1], rounding_mode="floor")
        else:
            self.bags = code.bags_E[self.order]
        self.offsets_h = torch.searchsorted(flat[self.order], torch.arange(h, dtype=flat.dtype))

    def __call__(self, weights_Nk: Tensor, rows_Bd: Tensor, bags_of_row: int = 1) -> Tensor:
        """Σ over a latent's bags of weight · row, (h, d)."""
        weights = weights_Nk.reshape(-1)[self.order]
        rows = self.bags if bags_of_row == 1 else self.bags // bags_of_row
        return embedding_bag(rows, rows_Bd, self.offsets_h, per_sample_weights=weights, mode="sum")


class Largest:
    """The largest positive numbers of all that is offered, piece by piece, in the order in which they came.

    What is kept is at most twice what is wanted: then a bound is found, below which nothing is looked at any more. For
    numbers that come in no order, about log(offered / wanted) times what is wanted are looked at twice.
    """

    def __init__(self, wanted: int) -> None:
        self.wanted, self.count, self.offered, self.bound = wanted, 0, 0, 0.0
        self.values: list[Tensor] = []
        self.places: list[Tensor] = []

    def offer(self, numbers: Tensor) -> None:
        """The next piece, any shape; what is not a number counts as large."""
        flat = numbers.reshape(-1)
        places = (~(flat <= self.bound)).nonzero().squeeze(-1)
        self.values.append(flat[places])
        self.places.append(places + self.offered)
        self.offered, self.count = self.offered + len(flat), self.count + len(places)
        if self.count > 2 * self.wanted:
            self.found()

    def found(self) -> tuple[Tensor, Tensor]:
        """Values and places in all that was offered, ascending; of equals at the bound those that came first."""
        values, places = torch.cat(self.values), torch.cat(self.places)
        if len(values) > self.wanted:
            keep = torch.zeros(0, dtype=torch.int64)
            if self.wanted:
                bound = values.kthvalue(len(values) - self.wanted + 1).values
                above, equal = (~(values <= bound)).nonzero(), (values == bound).nonzero()
                keep = torch.cat([above, equal])[: self.wanted].squeeze(-1).sort().values
                self.bound = float(bound)
            values, places = values[keep], places[keep]
        self.values, self.places, self.count = [values], [places], len(values)
        return values, places


class SparsePass(Pass):
    """topk members on the CPU. The auxiliary loss's gradients lie beside the others under `AUX`."""

    def __init__(self, storage: Packed, dead_after: int) -> None:
        self.storage, self.dead_after = storage, dead_after
        self.members = [sae for sae in storage.saes if isinstance(sae, TopKSAE)]
        self.sums = InPlace(storage, self._aux)
        self.share, self.has_variance = self.members[0].aux_share, "variance" in storage.buffers
        self.prefixes = max(1, len(storage.form.prefixes))
        self.ends = torch.tensor(storage.form.prefixes or [storage.h])

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
        error_Nd, every, g_Bd = self._errors(weighted_rows(code, weights["W_dec"]), b_dec_d, x_Nd, keep_N)
        grads = {name: parts.grads[name][member] for name in weights}
        self._add_gradients(grads, weights, code, g_Bd, centred_Nd, decoder_bias=True)
        squared, fired = error_Nd.square().sum(), code.values_Nk > 0
        mse = storage.form.mse / self.prefixes * (squared if every is None else every)
        window["totals"][member] += torch.stack([mse, squared, 0 * squared, fired.sum().to(storage.dtype)])
        window["fired"][member].index_add_(0, code.index_Nk.reshape(-1), fired.reshape(-1).double())
        self._tally(window, member, code)
        ratio = window["ratio"][member]
        ratio[1] += squared.double()
        ratio[2:] -= error_Nd.sum(0, dtype=torch.float64)
        if dead is not None:
            weight = self.share * (float(storage.buffers["variance"][member]) if self.has_variance else 1.0)
            left_Nd = error_Nd.neg().sub_(weighted_rows(dead, weights["W_dec"]))
            ratio[0] += weight * left_Nd.square().sum().double()
            grads = {name: parts.grads[AUX + name][member] for name in weights}
            self._add_gradients(grads, weights, dead, left_Nd * (-2 * weight), centred_Nd, decoder_bias=False)

    def _tally(self, window: Store, member: int, code: Code) -> None:
        """What the architecture tells of a micro-batch."""

    def _errors(
        self, decoded_Bd: Tensor, b_dec_d: Tensor, x_Nd: Tensor, keep_N: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The whole reconstruction's error, with prefixes the sum of all their squares, and ∂/∂(what bags add up to).

        A bag has a part in the error of its own prefix and of all longer ones.
        """
        if self.prefixes == 1:
            error_Nd = decoded_Bd.add_(b_dec_d).sub_(x_Nd)
            if keep_N is not None:
                error_Nd.mul_(keep_N.unsqueeze(-1))
            return error_Nd, None, error_Nd * (2 * self.storage.form.mse)
        errors_NPd = decoded_Bd.view(len(x_Nd), self.prefixes, -1).cumsum(1).add_((b_dec_d - x_Nd).unsqueeze(1))
        if keep_N is not None:
            errors_NPd.mul_(keep_N[:, None, None])
        g_NPd = errors_NPd.flip(1).cumsum(1).flip(1).mul_(2 * self.storage.form.mse / self.prefixes)
        return errors_NPd[:, -1], errors_NPd.square().sum(), g_NPd.view(decoded_Bd.shape)

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
        code = joined(codes)
        if self.prefixes > 1:
            index_Nk, order_Nk = code.index_Nk.sort(-1)
            tokens_Nk = torch.arange(len(index_Nk)).unsqueeze(-1).expand_as(index_Nk)
            values_Nk = code.values_Nk.gather(-1, order_Nk)
            code = in_bags(values_Nk.view(-1), index_Nk.view(-1), tokens_Nk.reshape(-1), len(index_Nk), self.ends)
        return code, joined(dead_codes) if dead_codes else None

    def _add_gradients(
        self, grads: Store, weights: Store, code: Code, g_Bd: Tensor, centred_Nd: Tensor, *, decoder_bias: bool
    ) -> None:
        """Gradients of Σ over tokens, where ∂/∂(what a bag adds up to) = g."""
        storage, bags_of_token = self.storage, len(g_Bd) // len(centred_Nd)
        g_code_Nk = pulled_back(code, g_Bd, weights["W_dec"])
        by_latent = ByLatent(code, storage.h)
        grads["W_dec"] += by_latent(code.values_Nk, g_Bd)
        grads["W_enc"] += by_latent(g_code_Nk, centred_Nd, bags_of_token)
        g_b_enc_h = torch.zeros(storage.h, dtype=storage.dtype)
        g_b_enc_h.index_add_(0, code.index_Nk.view(-1), g_code_Nk.view(-1))
        grads[VECTORS][storage.slices["b_enc"]] += g_b_enc_h
        g_b_dec = grads[VECTORS][storage.slices["b_dec"]]
        g_b_dec -= g_b_enc_h @ weights["W_enc"]
        if decoder_bias:
            g_b_dec += g_Bd[::bags_of_token].sum(0)  # a token's first bag has a part in all its errors

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


def joined(codes: list[Code]) -> Code:
    """Of all chunks."""
    return Code(torch.cat([code.values_Nk for code in codes]), torch.cat([code.index_Nk for code in codes]))


class BatchSparsePass(SparsePass):
    """batch_topk members: the largest of all kept tokens of a micro-batch, and the tallies of what was kept."""

    def _aux(self) -> Parts:
        parts, size = super()._aux(), len(self.members)
        tallies = {TALLY + name: zeros(size, device=self.storage.device) for name in self.members[0].tallies}
        return Parts(parts.grads, parts.window | tallies)

    def _tally(self, window: Store, member: int, code: Code) -> None:
        if len(code.values_Nk):
            window[TALLY + "smallest"][member] += code.values_Nk.min().double()
            window[TALLY + "batches"][member] += 1

    def _member(self, parts: Parts, member: int, x_Nd: Tensor, keep_N: Tensor | None) -> None:
        kept_Nd = x_Nd if keep_N is None else x_Nd[keep_N > 0]
        if len(kept_Nd):
            super()._member(parts, member, kept_Nd, None)

    def _select(
        self, member: int, centred_Nd: Tensor, W_enc_hd: Tensor, b_enc_h: Tensor, dead: Tensor, keep_N: Tensor | None
    ) -> tuple[Code, Code | None]:
        """As the base; the tokens are the kept ones."""
        sae, n, h = self.members[member], len(centred_Nd), self.storage.h
        best, dead_codes = Largest(int(sae.config.k * n)), []
        for some_Nd in centred_Nd.split(max(64, _SELECT_ELEMENTS // h)):
            pre_Nh = torch.addmm(b_enc_h, some_Nd, W_enc_hd.T)
            best.offer(pre_Nh)
            if len(dead):
                of_dead = largest(pre_Nh[:, dead], min(sae.aux_k, len(dead)))
                dead_codes.append(Code(of_dead.values_Nk, dead[of_dead.index_Nk]))
        values_E, places_E = best.found()
        tokens_E = torch.div(places_E, h, rounding_mode="floor")
        code = in_bags(values_E, places_E - tokens_E * h, tokens_E, n, self.ends)
        return code, joined(dead_codes) if dead_codes else None


def topk_on_cpu(form: Form, saes: Sequence[SAE], options: StackOptions) -> Assembly:
    """topk and batch_topk members."""
    storage = Packed(saes, form, saes[0].W_enc.dtype)
    kind = BatchSparsePass if saes[0].selects_over_batch else SparsePass

    def build(table: Table, books: Books, seeds: Sequence[int]) -> tuple[Pass, Optimiser]:
        return kind(storage, options.dead_after_tokens), CpuOptimiser(storage, table, books)

    return Assembly("cpu", storage, build)
