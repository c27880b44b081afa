"""The topk step on a CUDA device: Triton selection, sparse decode, gradients per latent; AuxK over the dead alone.

Shape suffixes: M members, N tokens, d model width, h dictionary width, k kept latents, C places for dead latents.
The auxiliary products are dense over C places. C must be known on the host without waiting for the device: every
so many windows an upper bound of the latents that can be dead soon is sent, and read half a period later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saeopt.config.machine import PerformanceConfig
from saeopt.host.devices import side_stream
from saeopt.saes.base import SAE
from saeopt.saes.topk import TopKSAE
from saeopt.training.step.books import Books, kept
from saeopt.training.step.contract import EXTRA, Example, Optimiser, Parts, Pass, StackOptions, Store
from saeopt.training.step.forms import Form
from saeopt.training.step.gpu.dense import Call, caller, x_sums
from saeopt.training.step.gpu.optimiser import GpuOptimiser
from saeopt.training.step.kernels import ragged as kernels_ragged
from saeopt.training.step.kernels import select as kernels_select
from saeopt.training.step.kernels import topk as kernels_topk
from saeopt.training.step.numbers import Table
from saeopt.training.step.stack import Assembly
from saeopt.training.step.storage import VECTORS, Packed

_PERIOD = 32
AUX = "aux."
_LOOKOUT = EXTRA + "lookout"


class Code(NamedTuple):
    """k entries per token (M · N, k), or E per member (M, E), then with their rows and the tokens' first places."""

    values: Tensor
    latents: Tensor
    rows: tuple[Tensor, Tensor] | None = None


class Decoded(NamedTuple):
    """What a code's reconstructions from the prefixes of the dictionary give; without prefixes there is one.

    `errors`: what latents of each prefix learn from, `dots`: the entries' gradients. `last` (M, N, d): the whole
    reconstruction's error, `last_MN` its square (or (M, S, N), of parts of the columns); `first` and `every_MN`: sums
    over all prefixes, where there are any.
    """

    errors: Tensor
    dots: Tensor
    last: Tensor
    last_MN: Tensor
    first: Tensor | None = None
    every_MN: Tensor | None = None


class GpuTopkPass(Pass):
    """topk members on a CUDA device."""

    k_dtype = torch.int32

    def __init__(self, storage: Packed, options: StackOptions, call: Call) -> None:
        self.storage, self.options, self.call = storage, options, call
        self.members = [sae for sae in storage.saes if isinstance(sae, TopKSAE)]
        first, ks = self.members[0], [sae.config.k for sae in self.members]
        self.k, self.k_M = max(ks), torch.tensor(ks, dtype=self.k_dtype, device=storage.device)
        self.aux_k, self.aux_share = first.aux_k, first.aux_share
        ends = storage.form.prefixes
        self.prefixes = max(1, len(ends))
        self.whole = torch.tensor([storage.h], dtype=torch.int32, device=storage.device)
        self.widths = torch.tensor(ends, dtype=torch.int32, device=storage.device) if ends else None
        ones_M = torch.ones(len(ks), device=storage.device)
        self.variance_M = storage.buffers.get("variance", ones_M)  # read in place: a checkpoint may be loaded
        self.windows = self.rows = self.rows_per_window = self.capacity = 0
        self.coming: tuple[Tensor, torch.cuda.Event] | None = None
        self.side = side_stream("auxiliary loss", storage.device)
        self.loaded: dict[int, tuple[int, ...]] = {}

    def before(self, example: Example, *, first: bool) -> int:
        """As the contract says: the places for dead latents are what shapes depend on."""
        if self.storage.refresh_changed():
            self._look_again()
        if first:
            self._count_rows()
            self._look_for_dead()
        self.rows += len(example.x_Nd)
        return self.capacity

    def _count_rows(self) -> None:
        self.rows_per_window, self.rows = max(self.rows_per_window, self.rows), 0

    def _look_again(self) -> None:
        """The counters may have been loaded."""
        self.windows, self.coming = 0, None

    def state(self, member: int) -> Store:
        """The capacity, on which the last bits of the auxiliary products depend, and what sets the next one."""
        if self.coming is None:
            return {}
        self._count_rows()
        lookout = (self.options.ranks, self.windows, self.rows_per_window, self.capacity, self._bound())
        return {_LOOKOUT: torch.tensor(lookout, device=self.storage.device)}

    def load_state(self, member: int, state: Store) -> None:
        """As the contract says."""
        self._look_again()
        self.loaded[member] = tuple(state[_LOOKOUT].tolist()) if _LOOKOUT in state else ()
        found = set(self.loaded.values())
        first, ranks = self.loaded[member][:1], (self.options.ranks,)
        if len(self.loaded) == len(self.members) and len(found) == 1 and first == ranks:  # the same stack again
            _, self.windows, self.rows_per_window, self.capacity, bound = found.pop()
            self.rows = 0
            self._send(torch.tensor(bound, device=self.storage.device))

    # ---- how many latents can be dead
    def _look_for_dead(self) -> None:
        """Set the capacity for this window. A bound holds for two periods after it was sent."""
        if self.windows < 2:  # what is dead now; then, as the size of a window is known, what can be soon
            self._send_bound()
            self._read_bound()
        elif self.windows % self._period() == 0:
            self._read_bound()
            self._send_bound()
        self.windows += 1

    def _period(self) -> int:
        """Windows between two looks: fewer where latents count as dead soon, or all would be near it all the time."""
        rows = max(1, self.rows_per_window * self.options.ranks)
        return max(1, min(_PERIOD, self.options.dead_after_tokens // (8 * rows)))

    def _send_bound(self) -> None:
        soon = (2 * self._period() + 1) * self.rows_per_window * self.options.ranks
        self._send((self.storage.since_Mh + soon >= self.options.dead_after_tokens).sum(-1).max())

    def _send(self, bound: Tensor) -> None:
        pinned = torch.empty((), dtype=bound.dtype, pin_memory=True)
        pinned.copy_(bound, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.coming = (pinned, event)

    def _bound(self) -> int:
        assert self.coming is not None
        pinned, event = self.coming
        event.synchronize()  # sent a period ago: waits only after a start
        return int(pinned)

    def _read_bound(self) -> None:
        bound = self._bound()
        step = max(64, 2 ** max(0, bound.bit_length() - 3))
        self.capacity = min(self.storage.h, -(-bound // step) * step)

    # ---- a micro-batch
    def gradients(self, example: Example, *, first: bool) -> Parts:
        """As the contract says."""
        packed, x_Nd, keep_N = self.storage, example.x_Nd, example.keep_N
        low = packed.low
        b_enc, b_dec = (packed.vector(packed.weights, n).contiguous() for n in ("b_enc", "b_dec"))
        scale, factor = packed.buffers["scale"], 2 * packed.form.mse / self.prefixes
        keep = None if keep_N is None else keep_N.to(packed.dtype)
        centred, x_stats = self.call(centre, x_Nd, b_dec, scale, keep, low["W_enc"].dtype)
        dead = self._dead_code(centred, b_enc, keep) if self.capacity else None
        pre = torch.bmm(centred, low["W_enc"].mT)
        code = self._select(pre, b_enc, keep, x_stats[-1])
        del pre  # the most that the step has at a time
        found = self._decode(code, low["W_dec"], b_dec, x_Nd.contiguous(), scale, keep, factor)
        aux = self._aux_gradients(dead, found.last, centred) if dead is not None else None
        keys = self.call(kernels_topk.sort_keys, code.latents, len(self.members), self.storage.h)
        rows = None if code.rows is None else code.rows[0]
        g_dec, g_enc, g_bias, fired = kernels_topk.by_latent(
            keys, code.values, found.dots, found.errors, centred, self.storage.h, factor, rows, self.widths
        )
        encoder_first = list(packed.slices) == ["b_enc", "b_dec"]
        g_vectors, totals, ratio = self.call(
            small_sums, found, g_bias, fired, low["W_enc"], packed.form.mse / self.prefixes, factor, encoder_first
        )
        grads = {"W_dec": g_dec, "W_enc": g_enc, VECTORS: g_vectors}
        window = {"totals": totals, "fired": fired, "y": x_stats, "ratio": ratio, **self._tallies(code)}
        if aux is not None:
            torch.cuda.current_stream(self.storage.device).wait_stream(self.side)
            ratio[:, 0] = aux.pop("numerator")
            grads.update(aux)
        return Parts(grads, window)

    def _select(self, pre: Tensor, b_enc: Tensor, keep: Tensor | None, n_kept: Tensor) -> Code:
        """The k largest of every token."""
        return Code(*kernels_select.select(pre, b_enc, keep, self.k_M, self.k))

    def _tallies(self, code: Code) -> Store:
        """What the architecture tells of a micro-batch."""
        return {}

    def _decode(
        self, code: Code, W_dec: Tensor, b_dec: Tensor, x_Nd: Tensor, scale: Tensor, keep: Tensor | None, factor: float
    ) -> Decoded:
        if code.rows is None and self.widths is None:
            given = (W_dec, b_dec, x_Nd, scale, keep, factor)
            error, dots, squares = kernels_topk.decode(code.values, code.latents, *given)
            return Decoded(error, dots, error, squares)
        widths = self.whole if self.widths is None else self.widths
        start = None if code.rows is None else code.rows[1]
        errors, dots, (last, every) = kernels_ragged.decode(
            code.values, code.latents, start, widths, W_dec, b_dec, x_Nd, scale, keep, factor
        )
        if self.widths is None:
            return Decoded(errors[:, 0], dots, errors[:, 0], last)
        return Decoded(errors, dots, errors[:, -1], last, errors[:, 0], every)

    # The auxiliary loss runs on a stream of its own beside the rest, and most of it finds units that the rest leaves
    # idle. Each part waits for what the main stream has done so far, so that memory which either stream gives back
    # is not written to while the other still reads it.
    def _dead_code(self, centred: Tensor, b_enc: Tensor, keep: Tensor | None) -> tuple[Tensor, ...]:
        """The auxiliary code (M, N, C), the dead latents' rows of both matrices, and which latents they are."""
        self.side.wait_stream(torch.cuda.current_stream(self.storage.device))
        with torch.cuda.stream(self.side):
            since_Mh = self.storage.since_Mh
            order_Mh = self.call(order_of_dead, since_Mh, self.options.dead_after_tokens)
            places = any_size(1, dead_places(order_Mh, self.capacity))
            W_enc, W_dec, bias = self.call(of_dead, self.storage.low["W_enc"], self.storage.low["W_dec"], b_enc, places)
            # a product of their own costs less than to pick them out of all pre-activations
            f = kernels_select.keep_largest(torch.bmm(centred, W_enc.mT), bias, keep, self.aux_k)
        return f, W_dec, W_enc, places

    def _aux_gradients(self, dead: tuple[Tensor, ...], error: Tensor, centred: Tensor) -> Store:
        self.side.wait_stream(torch.cuda.current_stream(self.storage.device))
        f, W_dec, W_enc, places = dead
        any_size(1, W_dec)
        with torch.cuda.stream(self.side):
            found = aux_gradients(self.call, f, error, centred, W_dec, W_enc, places, self.variance_M, self.aux_share)
        names = (AUX + "W_dec", AUX + "W_enc", AUX + "b_enc", AUX + "b_dec", "numerator")
        return dict(zip(names, found, strict=True)) | {AUX + "places": places}

    # ---- the end of a window
    def settle(self, parts: Parts) -> Tensor:
        """The auxiliary gradients join the others times n / denominator, now that the window's is known."""
        (grads, window), slices = parts, self.storage.slices
        ratio, n = window["ratio"], kept(window).clamp_min(1)
        if AUX + "places" not in grads:
            value_M: Tensor = self.call(ratio_parts, ratio, n)[0]
            return value_M
        any_size(1, grads[AUX + "b_enc"], grads[AUX + "places"])
        small = (grads[VECTORS], grads[AUX + "b_enc"], grads[AUX + "b_dec"], grads[AUX + "places"])
        value_M, factor_M = self.call(join_vectors, ratio, n, *small, slices["b_enc"], slices["b_dec"])
        kernels_topk.add_rows(
            grads[AUX + "places"],
            factor_M,
            grads["W_dec"],
            grads[AUX + "W_dec"],
            grads["W_enc"],
            grads[AUX + "W_enc"],
        )
        return value_M


def join_vectors(
    ratio: Tensor,
    n: Tensor,
    g_MV: Tensor,
    aux_b_enc: Tensor,
    aux_b_dec: Tensor,
    places: Tensor,
    b_enc: slice,
    b_dec: slice,
) -> tuple[Tensor, Tensor]:
    """The auxiliary loss's value and the factor of its gradients; those of the vectors join theirs here."""
    value_M, over_M = ratio_parts(ratio, n)
    factor_M = (over_M * n).to(g_MV.dtype)
    # empty places hold gradient 0 and are sent to latent 0
    g_MV[:, b_enc].scatter_add_(1, places.clamp_min(0), aux_b_enc * factor_M.unsqueeze(1))
    g_MV[:, b_dec].add_(aux_b_dec * factor_M.unsqueeze(1))
    return value_M, factor_M


def centre(
    x_Nd: Tensor, b_dec_Md: Tensor, scale_M: Tensor, keep_N: Tensor | None, low: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x̄ (M, N, d) and the sums of x."""
    x_Nd = x_Nd.to(b_dec_Md.dtype) * scale_M[0]
    return (x_Nd - b_dec_Md.unsqueeze(1)).to(low), x_sums(x_Nd, keep_N)


def small_sums(
    found: Decoded, g_bias: Tensor, fired: Tensor, W_enc: Tensor, mse: float, factor: float, encoder_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the vectors, the window's totals, and the parts of the auxiliary ratio (numerator 0)."""
    error_Md = found.last.sum(1, dtype=torch.float32)
    all_Md = error_Md if found.first is None else found.first.sum(1, dtype=torch.float32)
    through = torch.bmm(g_bias.to(W_enc.dtype).unsqueeze(1), W_enc).squeeze(1).float()
    g_b_dec = factor * all_Md - through
    squared_M = found.last_MN.flatten(1).sum(1).double()
    every_M = squared_M if found.every_MN is None else found.every_MN.flatten(1).sum(1).double()
    totals = torch.stack([mse * every_M, squared_M, torch.zeros_like(squared_M), fired.sum(1).double()], -1)
    ratio = torch.cat([torch.zeros_like(squared_M).unsqueeze(1), squared_M.unsqueeze(1), -error_Md.double()], 1)
    return torch.cat([g_bias, g_b_dec] if encoder_first else [g_b_dec, g_bias], 1), totals, ratio


def ratio_parts(ratio: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Value and inverse denominator per member; see :class:`saeopt.saes.base.Ratio`."""
    spread_M = ratio[:, 1] - ratio[:, 2:].square().sum(1) / n
    over_M = torch.where(spread_M > 1e-6 * ratio[:, 1], 1 / spread_M, 0.0)
    return ratio[:, 0] * over_M, over_M


def any_size(axis: int, *tensors: Tensor) -> Tensor:
    """The first of them, once a compiled stage takes them with any size of this axis: the places for dead latents
    change many times, and each compilation takes seconds."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, axis)
    return tensors[0]


def order_of_dead(since_Mh: Tensor, dead_after: int) -> Tensor:
    """How many dead latents of its member come before a dead latent, (M, h); h for one that is not dead."""
    dead_Mh = since_Mh >= dead_after
    return torch.where(dead_Mh, dead_Mh.to(torch.int64).cumsum(1) - 1, since_Mh.shape[1])


def dead_places(order_Mh: Tensor, capacity: int) -> Tensor:
    """Indices of the dead latents of every member, (M, C); −1 in places that hold none."""
    members, h = order_Mh.shape
    latent = torch.arange(h, device=order_Mh.device).expand(members, h)
    places = torch.full((members, capacity + 1), -1, dtype=torch.int64, device=order_Mh.device)
    return places.scatter_(1, order_Mh.clamp_max(capacity), latent)[:, :capacity].contiguous()


def of_dead(W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The dead latents' rows (M, C, d) and encoder biases (M, C); that of an empty place never lets it fire."""
    at = places.clamp_min(0)
    rows = at.unsqueeze(-1).expand(-1, -1, W_dec.shape[-1])
    bias = torch.where(places >= 0, b_enc.gather(1, at), -torch.inf)
    return W_enc.gather(1, rows), W_dec.gather(1, rows), bias


def aux_gradients(
    call: Call, f: Tensor, error: Tensor, centred: Tensor, W_dec: Tensor, W_enc: Tensor, places: Tensor,
    variance_M: Tensor, share: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of share · V · Σ‖e − ê‖² on the rows of the dead latents, on b_dec, and that sum; e = −error.

    The sum over tokens of what has C columns is no part of a compiled stage: how one adds up depends on the first size
    that it saw, and a run that goes on in another process must give the same bits.
    """
    g_hat, g_f, sum_M = call(aux_errors, any_size(2, f), error, W_dec, variance_M, share)
    g_bias = g_f.sum(1, dtype=torch.float32)
    g_b_dec = -torch.bmm(g_bias.to(W_enc.dtype).unsqueeze(1), W_enc).squeeze(1).float()
    numerator = sum_M * (places >= 0).any(-1)
    return torch.bmm(f.mT, g_hat), torch.bmm(g_f.mT, centred), g_bias, g_b_dec, numerator


def aux_errors(
    f: Tensor, error: Tensor, W_dec: Tensor, variance_M: Tensor, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients on ê (M, N, d) and on f, and share · V · Σ‖e − ê‖² per member."""
    weight_M = share * variance_M
    left = error.float() + torch.bmm(f, W_dec).float()
    g_hat = (2 * weight_M[:, None, None] * left).to(f.dtype)
    g_f = torch.where(f > 0, torch.bmm(g_hat, W_dec.mT), 0.0)
    return g_hat, g_f, weight_M * left.square().sum((1, 2)).double()


def assembled(
    kind: type[GpuTopkPass], form: Form, saes: Sequence[SAE], options: StackOptions, performance: PerformanceConfig
) -> Assembly:
    """Members that step by this kind of pass."""
    storage = Packed(saes, form, options.autocast or saes[0].W_enc.dtype, own_norms=True)
    compiling = performance.compile != "off"

    def build(table: Table, books: Books, seeds: Sequence[int]) -> tuple[Pass, Optimiser]:
        optimiser = GpuOptimiser(storage, table, books, options, compiling=compiling)
        return kind(storage, options, caller(compiling)), optimiser

    return Assembly("gpu", storage, build, graphs=performance.graphs != "off", fixed_sums=True)


def assembly(form: Form, saes: Sequence[SAE], options: StackOptions, performance: PerformanceConfig) -> Assembly:
    """topk members."""
    return assembled(GpuTopkPass, form, saes, options, performance)
