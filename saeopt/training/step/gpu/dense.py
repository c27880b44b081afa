"""The dense architectures' pass on a CUDA device: all members at once, elementwise stages compiled.

Shape suffixes: M members, N tokens, d model width, h dictionary width. A micro-batch gives gradients in the dtype of
the products. A window of one micro-batch is one graph, gradients and optimiser; where it has several, or ranks, they
are added up in float32, in memory of the stack's own. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from saeopt.config.machine import PerformanceConfig
from saeopt.saes.base import SAE
from saeopt.saes.noise import row_keys
from saeopt.training.step.books import Books
from saeopt.training.step.compiled import compiled
from saeopt.training.step.contract import TALLY, Example, Optimiser, Parts, Pass, StackOptions, Store
from saeopt.training.step.dense import ALONE, FIRED, Architecture, Found, Given, Product, run
from saeopt.training.step.forms import Form
from saeopt.training.step.gpu.optimiser import GpuOptimiser
from saeopt.training.step.numbers import FIRST_SAMPLE, Table
from saeopt.training.step.optimiser import PULL
from saeopt.training.step.stack import Assembly
from saeopt.training.step.storage import VECTORS, Packed

Call = Callable[..., Any]
"""How a stage is called: compiled where that is wanted."""


class Core(Protocol):
    """Forward and backward between x and the gradients of the matrices."""

    @property
    def writes_code(self) -> bool:
        """Whether the code of all tokens lies in memory."""
        ...

    def __call__(self, given: Given, out: Store | None) -> tuple[Store, Found]:
        """Gradients of the matrices (written to `out` where it is given) and the rest of what a micro-batch gives."""
        ...


class PlainCore:
    """Through `dense.run`."""

    writes_code = True

    def __init__(self, architecture: Architecture, form: Form, call: Call) -> None:
        self.architecture, self.form, self.call = architecture, form, call

    def __call__(self, given: Given, out: Store | None) -> tuple[Store, Found]:
        """As the contract says."""
        found = run(self.architecture, self.form, given, self.call)
        grads = products(found.products, given.low, out)
        return grads, found._replace(products=[])  # their memory is the next member's


class GpuDensePass(Pass):
    """What is around a core: numbers, noise, and members that are computed one after another."""

    def __init__(self, core: Core, storage: Packed, table: Table, seeds: Sequence[int], call: Call) -> None:
        self.core, self.storage, self.table, self.call = core, storage, table, call
        self.needs_noise = storage.saes[0].needs_noise
        self.numbers = list(storage.saes[0].numbers)
        self.seed_M = torch.tensor(list(seeds), dtype=torch.int64, device=storage.device)

    def before(self, example: Example, *, first: bool) -> None:
        """As the contract says."""
        self.storage.refresh_changed()

    def gradients(self, example: Example, *, first: bool) -> Parts:
        """As the contract says."""
        storage, table, place, keys = self.storage, self.table, example.place, None
        if self.needs_noise:
            first_sample = table.on_device[0, table.names[FIRST_SAMPLE]]
            keys = row_keys(self.seed_M, first_sample, place.n_samples, place.tokens_per_sample)
        for name in self.numbers:  # a buffer with a number's name holds its last value
            if name in storage.buffers:
                storage.buffers[name].copy_(table.column(name))
        x_Nd, keep_N, y, low = self.call(start, example.x_Nd, example.keep_N, storage.buffers["scale"], table.on_device)
        numbers = {name: low[:, table.names[name]] for name in self.numbers}
        vectors = {name: storage.vector(storage.weights, name) for name in storage.slices}
        given = Given(storage.low, vectors, storage.norm_Mh, x_Nd, keep_N, None, keys, numbers, storage.buffers)
        grads, found = self._one_by_one(given) if self._alone(len(x_Nd)) else self.core(given, None)
        grads[VECTORS] = torch.cat([found.vectors[name] for name in storage.slices], 1)
        if found.pull_Mh is not None:
            grads[PULL] = found.pull_Mh
        window = {"totals": found.totals_M4.double(), "fired": found.fired_Mh, "y": y}
        if FIRED in storage.saes[0].tallies:
            window[TALLY + FIRED] = found.fired_Mh.double()
        return Parts(grads, window | found.tallies())

    def _alone(self, tokens: int) -> bool:
        """Whether members are computed one after another."""
        return self.core.writes_code and len(self.seed_M) > 1 and tokens * self.storage.h >= ALONE

    def _one_by_one(self, given: Given) -> tuple[Store, Found]:
        """In the memory that one member needs."""
        storage = self.storage
        grads = {name: torch.empty_like(tensor, dtype=storage.low_dtype) for name, tensor in storage.low.items()}
        found = []
        for i in range(len(self.seed_M)):
            out = {name: tensor[i : i + 1] for name, tensor in grads.items()}
            found.append(self.core(given.member(i), out)[1])
        return grads, Found.of(found)


def caller(compiling: bool) -> Call:
    """Calls a stage, compiled where that is wanted."""
    return lambda stage, *arguments: compiled(stage, compiling)(*arguments)


def around(core: Core, storage: Packed, performance: PerformanceConfig, options: StackOptions, call: Call) -> Assembly:
    """The assembly of members that are dense but for their core."""

    def build(table: Table, books: Books, seeds: Sequence[int]) -> tuple[Pass, Optimiser]:
        optimiser = GpuOptimiser(storage, table, books, options, compiling=performance.compile != "off")
        return GpuDensePass(core, storage, table, seeds, call), optimiser

    return Assembly("gpu", storage, build, graphs=performance.graphs != "off", fixed_sums=True)


def assembly(
    architecture: Architecture, form: Form, saes: Sequence[SAE], options: StackOptions, performance: PerformanceConfig
) -> Assembly:
    """Members of a dense architecture."""
    storage = Packed(saes, form, options.autocast or saes[0].W_enc.dtype, own_norms=True)
    call = caller(performance.compile != "off")
    return around(PlainCore(architecture, form, call), storage, performance, options, call)


def products(wanted: list[Product], low: Store, out: Store | None) -> Store:
    """The gradients of the matrices, written to `out` where it is given."""
    grads: Store = {}
    for name, left_MNh, right_MNd, rows in wanted:
        if out is None and rows == slice(None):
            grads[name] = torch.bmm(left_MNh.mT, right_MNd)
            continue
        if name not in grads:
            grads[name] = torch.empty_like(low[name]) if out is None else out[name]
        torch.bmm(left_MNh.mT, right_MNd, out=grads[name][:, rows])
    return grads


def narrow_sums(form: Form, g_error: Tensor, squares_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ over tokens of the error's gradient, ‖error‖² and the reconstruction's loss per member, of narrow models."""
    squared_M = squares_MN.sum(1)
    return g_error.sum(1, dtype=squares_MN.dtype), squared_M, form.mse * squared_M


def start(
    x_Nd: Tensor, keep_N: Tensor | None, scale_M: Tensor, numbers: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """x in normalised units, the mask as weights, the sums of x, and the window's numbers as float32."""
    x_Nd = x_Nd.to(scale_M.dtype) * scale_M[0]
    keep_N = None if keep_N is None else keep_N.to(scale_M.dtype)
    return x_Nd, keep_N, x_sums(x_Nd, keep_N), numbers.to(scale_M.dtype)


def x_sums(x_Nd: Tensor, keep_N: Tensor | None) -> Tensor:
    """Σx, Σ‖x‖² and the number of kept tokens, end to end."""
    kept_Nd = x_Nd if keep_N is None else x_Nd * keep_N.unsqueeze(-1)
    n = torch.full((1,), float(len(x_Nd)), device=x_Nd.device) if keep_N is None else keep_N.sum().view(1)
    return torch.cat([kept_Nd.sum(0), kept_Nd.square().sum().view(1), n]).double()
