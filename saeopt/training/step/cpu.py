"""The dense architectures' pass on the CPU, and what passes there share.

Shape suffixes: M members, N tokens, d model width, h dictionary width. Members and chunks of tokens are computed one
after another, so that what lies between two products stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from saeopt.saes.base import SAE
from saeopt.saes.noise import uniform
from saeopt.saes.numbers import EVALUATED
from saeopt.training.step.books import Books, zeros
from saeopt.training.step.contract import TALLY, Example, Optimiser, Parts, Pass, Place, StackOptions
from saeopt.training.step.dense import FIRED, Architecture, Found, Given, run
from saeopt.training.step.forms import Form
from saeopt.training.step.numbers import Table
from saeopt.training.step.optimiser import PULL, CpuOptimiser
from saeopt.training.step.stack import Assembly
from saeopt.training.step.storage import Packed

CHUNK = 2**20
"""Elements (tokens x latents) at a time."""


class InPlace:
    """A window's sums that members and micro-batches are added to in place, and what is measured of x.

    Args:
        more: further sums of a pass, made with the first micro-batch.
    """

    def __init__(self, storage: Packed, more: Callable[[], Parts]) -> None:
        self.storage, self.more = storage, more
        self.parts: Parts | None = None

    def start(self, example: Example, *, first: bool) -> tuple[Parts, Tensor, Tensor | None]:
        """The sums (of nothing, if this is a window's first), x in normalised units, and the mask as weights."""
        storage = self.storage
        if self.parts is None:
            self.parts = self._empty()
        elif first:
            for tensor in (*self.parts.grads.values(), *self.parts.window.values()):
                tensor.zero_()
        x_Nd = example.x_Nd.to(storage.dtype) * storage.buffers["scale"][0]
        keep_N = None if example.keep_N is None else example.keep_N.to(storage.dtype)
        kept_Nd = x_Nd if keep_N is None else x_Nd * keep_N.unsqueeze(-1)
        y, d = self.parts.window["y"], storage.d
        y[:d] += kept_Nd.sum(0)
        y[d] += kept_Nd.square().sum()
        y[d + 1] += len(x_Nd) if keep_N is None else keep_N.sum()
        return self.parts, x_Nd, keep_N

    def _empty(self) -> Parts:
        storage, more = self.storage, self.more()
        size = len(storage.saes)
        window = {
            "totals": zeros(size, 4, device=storage.device),
            "fired": zeros(size, storage.h, device=storage.device),
            "y": zeros(storage.d + 2, device=storage.device),
        }
        if EVALUATED in storage.saes[0].tallies:
            window[TALLY + EVALUATED] = zeros(size, device=storage.device)
        grads = {name: torch.zeros_like(tensor) for name, tensor in storage.weights.items()}
        return Parts(grads | more.grads, window | more.window)


class DensePass(Pass):
    """Chunk by chunk through `dense.run`."""

    def __init__(self, architecture: Architecture, storage: Packed, table: Table, seeds: Sequence[int]) -> None:
        self.architecture, self.storage, self.table, self.seeds = architecture, storage, table, seeds
        self.sums, self.tells_fired = InPlace(storage, self._more), FIRED in storage.saes[0].tallies

    def _more(self) -> Parts:
        """The penalty's part of W_dec's gradient, where the norm of its rows counts, and the tally of firings."""
        storage = self.storage
        fixed, size = storage.form.unit or storage.form.directions, (len(storage.saes), storage.h)
        window = {TALLY + FIRED: zeros(*size, device=storage.device)} if self.tells_fired else {}
        return Parts({} if fixed else {PULL: torch.zeros_like(storage.norm_Mh)}, window)

    def before(self, example: Example, *, first: bool) -> None:
        """As the contract says."""
        self.storage.refresh_changed()

    def gradients(self, example: Example, *, first: bool) -> Parts:
        """As the contract says."""
        storage = self.storage
        parts, x_Nd, keep_N = self.sums.start(example, first=first)
        own = {n: self.table.column(n) for n in type(storage.saes[0]).numbers}
        for name in own.keys() & storage.buffers.keys():  # a buffer with a number's name holds its last value
            storage.buffers[name].copy_(own[name])
        for member in range(len(self.seeds)):
            row = slice(member, member + 1)
            low = {name: tensor[row] for name, tensor in storage.low.items()}
            vectors = {n: storage.vector(storage.weights, n)[row] for n in storage.slices}
            numbers = {name: column[row].to(storage.dtype) for name, column in own.items()}
            buffers = {name: tensor[row] for name, tensor in storage.buffers.items()}
            u_Nh = self._noise(member, example.place)
            step = max(64, CHUNK // storage.h)
            for at in range(0, len(x_Nd), step):
                rows = slice(at, at + step)
                keep = None if keep_N is None else keep_N[rows]
                u_MNh = None if u_Nh is None else u_Nh[rows].unsqueeze(0)
                given = Given(low, vectors, storage.norm_Mh[row], x_Nd[rows], keep, u_MNh, None, numbers, buffers)
                self._add(parts, member, run(self.architecture, storage.form, given))
        return parts

    def _noise(self, member: int, place: Place) -> Tensor | None:
        storage = self.storage
        if not storage.saes[member].needs_noise:
            return None
        where = (place.first_sample, place.n_samples, place.tokens_per_sample)
        return uniform(self.seeds[member], *where, storage.h, storage.device).to(storage.dtype)

    def _add(self, parts: Parts, member: int, found: Found) -> None:
        storage, (grads, window) = self.storage, parts
        for name, left_MNh, right_MNd, rows in found.products:
            # sums are in the weights' precision, whatever that of the products (`mixed_precision: bf16`)
            grads[name][member, rows].addmm_(left_MNh[0].T.to(storage.dtype), right_MNd[0].to(storage.dtype))
        for name, vector_Mx in found.vectors.items():
            storage.vector(grads, name)[member] += vector_Mx[0]
        if found.pull_Mh is not None:
            grads[PULL][member] += found.pull_Mh[0]
        window["totals"][member] += found.totals_M4[0]
        window["fired"][member] += found.fired_Mh[0]
        if self.tells_fired:
            window[TALLY + FIRED][member] += found.fired_Mh[0]
        for name, tally_M in found.tallies().items():
            window[name][member] += tally_M[0]


def dense_on_cpu(architecture: Architecture, form: Form, saes: Sequence[SAE], options: StackOptions) -> Assembly:
    """Members of a dense architecture."""
    storage = Packed(saes, form, options.autocast or saes[0].W_enc.dtype)

    def build(table: Table, books: Books, seeds: Sequence[int]) -> tuple[Pass, Optimiser]:
        return DensePass(architecture, storage, table, seeds), CpuOptimiser(storage, table, books)

    return Assembly("cpu", storage, build)
