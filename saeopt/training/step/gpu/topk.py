"""The topk step on a CUDA device: Triton selection, sparse decode, gradients per latent; AuxK over the dead alone.

Shape suffixes: M members, N tokens, d model width, h dictionary width, k kept latents, C places for dead latents.
The auxiliary products are dense over C places. C must be known on the host without waiting for the device: every
so many windows an upper bound of the latents that can be dead soon is sent, and read half a period later.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from saeopt.host.devices import side_stream
from saeopt.training.step.contract import EXTRA
from saeopt.training.step.gpu.dense import GpuStack, x_sums
from saeopt.training.step.kernels import select as kernels_select
from saeopt.training.step.kernels import topk as kernels_topk
from saeopt.training.step.storage import VECTORS, Store

_PERIOD = 32
AUX = "aux."
_LOOKOUT = EXTRA + "lookout"


class GpuSparseStack(GpuStack):
    """topk members on a CUDA device."""

    architectures: ClassVar[frozenset[str]] = frozenset({"topk"})

    def _prepare(self) -> None:
        ks = [sae.config.k for sae in self.saes]  # type: ignore[attr-defined]
        self.k, self.k_M = max(ks), torch.tensor(ks, dtype=torch.int32, device=self.device)
        self.aux_k: int = self.saes[0].aux_k  # type: ignore[assignment]
        self.aux_share: float = self.saes[0].aux_share  # type: ignore[assignment]
        ones_M = torch.ones(len(ks), device=self.device)
        self.variance_M = self.packed.buffers.get("variance", ones_M)  # read in place: a checkpoint may be loaded
        self.windows = self.rows_per_window = self.capacity = 0
        self.coming: tuple[Tensor, torch.cuda.Event] | None = None
        self.side = side_stream("auxiliary loss", self.device)
        self.loaded: dict[int, tuple[int, ...]] = {}
        super()._prepare()

    def _refresh(self, rows: slice = slice(None)) -> None:
        super()._refresh(rows)
        self.windows, self.coming = 0, None  # the counters may have been loaded: look again

    def state(self, member: int) -> dict[str, Tensor]:
        """With the capacity, on which the last bits of the auxiliary products depend, and what sets the next one."""
        if self.coming is None:
            return super().state(member)
        lookout = (_world(), self.windows, self.rows_per_window, self.capacity, self._bound())
        return super().state(member) | {_LOOKOUT: torch.tensor(lookout, device=self.device)}

    def load_state(self, member: int, state: dict[str, Tensor]) -> None:
        super().load_state(member, state)
        self.loaded[member] = tuple(state[_LOOKOUT].tolist()) if _LOOKOUT in state else ()
        found = set(self.loaded.values())
        first = self.loaded[member][:1]
        if len(self.loaded) == len(self.saes) and len(found) == 1 and first == (_world(),):  # the same stack again
            _, self.windows, self.rows_per_window, self.capacity, bound = found.pop()
            self._send(torch.tensor(bound, device=self.device))

    def _places(self) -> int:
        self._look_for_dead()
        return self.capacity

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
        return max(1, min(_PERIOD, self.options.dead_after_tokens // (8 * max(1, self.rows_per_window * _world()))))

    def _send_bound(self) -> None:
        soon = (2 * self._period() + 1) * self.rows_per_window * _world()
        self._send((self.packed.buffers["tokens_since_fired"] + soon >= self.options.dead_after_tokens).sum(-1).max())

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
        self.capacity = min(self.h, -(-bound // step) * step)

    # ---- a micro-batch
    def _gradients(self, x_Nd: Tensor, keep_N: Tensor | None, slots: int, tokens_per_slot: int) -> tuple[Store, Store]:
        packed, low = self.packed, self.low
        b_enc, b_dec = (packed.vector(packed.weights, n).contiguous() for n in ("b_enc", "b_dec"))
        scale, factor = packed.buffers["scale"], 2 * self.form.mse
        keep = None if keep_N is None else keep_N.to(self.dtype)
        centred, x_stats = self._call(centre, x_Nd, b_dec, scale, keep, low["W_enc"].dtype)
        dead = self._dead_code(centred, b_enc, keep) if self.capacity else None
        pre = torch.bmm(centred, low["W_enc"].mT)
        values, index = kernels_select.select(pre, b_enc, keep, self.k_M, self.k)
        del pre  # the most that the step has at a time
        x_given = x_Nd.contiguous()
        error, dots, squares = kernels_topk.decode(values, index, low["W_dec"], b_dec, x_given, scale, keep, factor)
        aux = self._aux_gradients(dead, error, centred) if dead is not None else None
        keys = self._call(kernels_topk.sort_keys, index, len(self.saes), self.h)
        g_dec, g_enc, g_bias, fired = kernels_topk.by_latent(keys, values, dots, error, centred, self.h, factor)
        first = list(packed.slices) == ["b_enc", "b_dec"]
        g_vectors, totals, ratio = self._call(
            small_sums, error, squares, g_bias, fired, low["W_enc"], self.form.mse, factor, first
        )
        grads = {"W_dec": g_dec, "W_enc": g_enc, VECTORS: g_vectors}
        window = {"totals": totals, "fired": fired, "x": x_stats, "ratio": ratio}
        if aux is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.side)
            ratio[:, 0] = aux.pop("numerator")
            grads.update(aux)
        return grads, window

    # The auxiliary loss runs on a stream of its own beside the rest, and most of it finds units that the rest leaves
    # idle. Each part waits for what the main stream has done so far, so that memory which either stream gives back
    # is not written to while the other still reads it.
    def _dead_code(self, centred: Tensor, b_enc: Tensor, keep: Tensor | None) -> tuple[Tensor, ...]:
        """The auxiliary code (M, N, C), the dead latents' rows of both matrices, and which latents they are."""
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            since_Mh = self.packed.buffers["tokens_since_fired"]
            places = self._call(dead_places, since_Mh, self.options.dead_after_tokens, self.capacity)
            W_enc, W_dec, bias = self._call(of_dead, self.low["W_enc"], self.low["W_dec"], b_enc, places)
            # a product of their own costs less than to pick them out of all pre-activations
            f = kernels_select.keep_largest(torch.bmm(centred, W_enc.mT), bias, keep, self.aux_k)
        return f, W_dec, W_enc, places

    def _aux_gradients(self, dead: tuple[Tensor, ...], error: Tensor, centred: Tensor) -> Store:
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        f, W_dec, W_enc, places = dead
        with torch.cuda.stream(self.side):
            found = self._call(aux_gradients, f, error, centred, W_dec, W_enc, places, self.variance_M, self.aux_share)
        names = (AUX + "W_dec", AUX + "W_enc", AUX + "b_enc", AUX + "b_dec", "numerator")
        return dict(zip(names, found, strict=True)) | {AUX + "places": places}

    # ---- the end of a window
    def _settle(self, grads: Store, window: Store, n: Tensor) -> Tensor:
        """The auxiliary gradients join the others times n / denominator, now that the window's is known."""
        ratio, slices = window["ratio"], self.packed.slices
        if AUX + "places" not in grads:
            return self._call(ratio_parts, ratio, n)[0]
        small = (grads[VECTORS], grads[AUX + "b_enc"], grads[AUX + "b_dec"], grads[AUX + "places"])
        value_M, factor_M = self._call(join_vectors, ratio, n, *small, slices["b_enc"], slices["b_dec"])
        kernels_topk.add_rows(
            grads[AUX + "places"],
            factor_M,
            grads["W_dec"],
            grads[AUX + "W_dec"],
            grads["W_enc"],
            grads[AUX + "W_enc"],
        )
        return value_M


def _world() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


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
    error: Tensor, squares_MN: Tensor, g_bias: Tensor, fired: Tensor, W_enc: Tensor, mse: float, factor: float,
    encoder_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the vectors, the window's totals, and the parts of the auxiliary ratio (numerator 0)."""
    error_Md = error.sum(1, dtype=torch.float32)
    through = torch.bmm(g_bias.to(W_enc.dtype).unsqueeze(1), W_enc).squeeze(1).float()
    g_b_dec = factor * error_Md - through
    squared_M = squares_MN.sum(1).double()
    totals = torch.stack([mse * squared_M, squared_M, torch.zeros_like(squared_M), fired.sum(1).double()], -1)
    ratio = torch.cat([torch.zeros_like(squared_M).unsqueeze(1), squared_M.unsqueeze(1), -error_Md.double()], 1)
    return torch.cat([g_bias, g_b_dec] if encoder_first else [g_b_dec, g_bias], 1), totals, ratio


def ratio_parts(ratio: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Value and inverse denominator per member; see :class:`saeopt.saes.base.Ratio`."""
    spread_M = ratio[:, 1] - ratio[:, 2:].square().sum(1) / n
    over_M = torch.where(spread_M > 1e-6 * ratio[:, 1], 1 / spread_M, 0.0)
    return ratio[:, 0] * over_M, over_M


def dead_places(since_Mh: Tensor, dead_after: int, capacity: int) -> Tensor:
    """Indices of the dead latents of every member, (M, C); −1 in places that hold none."""
    dead_Mh = since_Mh >= dead_after
    members, h = dead_Mh.shape
    rank = dead_Mh.to(torch.int64).cumsum(1) - 1
    slot = torch.where(dead_Mh & (rank < capacity), rank, capacity)
    latent = torch.arange(h, device=dead_Mh.device).expand(members, h)
    places = torch.full((members, capacity + 1), -1, dtype=torch.int64, device=dead_Mh.device)
    return places.scatter_(1, slot, latent)[:, :capacity].contiguous()


def of_dead(W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The dead latents' rows (M, C, d) and encoder biases (M, C); that of an empty place never lets it fire."""
    at = places.clamp_min(0)
    rows = at.unsqueeze(-1).expand(-1, -1, W_dec.shape[-1])
    bias = torch.where(places >= 0, b_enc.gather(1, at), -torch.inf)
    return W_enc.gather(1, rows), W_dec.gather(1, rows), bias


def aux_gradients(
    f: Tensor, error: Tensor, centred: Tensor, W_dec: Tensor, W_enc: Tensor, places: Tensor, variance_M: Tensor,
    share: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of share · V · Σ‖e − ê‖² on the rows of the dead latents, on b_dec, and that sum; e = −error."""
    weight_M = share * variance_M
    left = error.float() + torch.bmm(f, W_dec).float()
    g_hat = (2 * weight_M[:, None, None] * left).to(f.dtype)
    g_f = torch.where(f > 0, torch.bmm(g_hat, W_dec.mT), 0.0)
    g_bias = g_f.sum(1, dtype=torch.float32)
    g_b_dec = -torch.bmm(g_bias.to(W_enc.dtype).unsqueeze(1), W_enc).squeeze(1).float()
    numerator = weight_M * left.square().sum((1, 2)).double() * (places >= 0).any(-1)
    return torch.bmm(f.mT, g_hat), torch.bmm(g_f.mT, centred), g_bias, g_b_dec, numerator
