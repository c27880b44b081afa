"""Fused stacks on a CUDA device: all members at once, elementwise stages compiled, the step replayed as graphs.

Shape suffixes: M members, N tokens, d model width, h dictionary width, V vectors end to end. A micro-batch gives
gradients in the dtype of the products. A window of one micro-batch is one graph, gradients and optimiser; where it has
several, or ranks, they are added up in float32, in memory of the stack's own. Nothing here waits for the device:
numbers of the step travel in `hyper` (M, 5): lr, λ, β, clip norm, first slot.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from saeopt.config.run import PerformanceConfig
from saeopt.saes.base import SAE
from saeopt.saes.noise import row_keys
from saeopt.training.step.compiled import compiled
from saeopt.training.step.contract import EXTRA, Example, Hyper, StackOptions
from saeopt.training.step.dense import ALONE, Found, Given, run
from saeopt.training.step.gpu.graphs import Graphs
from saeopt.training.step.kernels import rows as kernels_rows
from saeopt.training.step.stack import PULL, FusedStack
from saeopt.training.step.storage import VECTORS, Store
from saeopt.training.step.tally import Sums


class GpuStack(FusedStack):
    """The dense architectures on a CUDA device."""

    def __init__(
        self, saes: Sequence[SAE], seeds: Sequence[int], options: StackOptions, performance: PerformanceConfig
    ) -> None:
        self.compiling = performance.compile != "off"
        self.graphs = Graphs(performance.graphs != "off")
        super().__init__(saes, seeds, options, performance)

    def _prepare(self) -> None:
        self.factor_Mh: Tensor | None = None
        super()._prepare()
        size = len(self.saes)
        self.graphs.clear()
        self.grads, self.window = {}, {}  # a window's lie in `summed`
        self.micro_batches, self.rows, self.rows_per_window = 0, 0, 0
        self.sums_at = Sums(self.dtype), Sums(self.dtype)
        self.summed: dict[int, tuple[Store, Store]] = {}
        """The window's gradients and statistics, by what their shapes depend on; always at the same place."""
        self.hyper = torch.zeros(size, 5, dtype=torch.float64, device=self.device)
        self.uploaded: tuple[tuple[float, ...], ...] = ()
        self.seed_M = torch.tensor(self.seeds, dtype=torch.int64, device=self.device)
        self.mode = kernels_rows.UNIT if self.form.unit else kernels_rows.FREE
        if self.directions:
            self.mode = kernels_rows.DIRECTION_UNIT if self.form.unit else kernels_rows.DIRECTION
            self.factor_Mh = self._row_factor().expand_as(self.norm_Mh).contiguous()

    def _refresh(self, rows: slice = slice(None)) -> None:
        super()._refresh(rows)
        if self.factor_Mh is not None:
            self.factor_Mh[rows] = self._row_factor()[rows]

    # ---- norms: the step computes them in an order of its own, so that their last bits do not follow from the weights
    def _norms(self) -> Store:
        return {"norm": self.norm_Mh} | ({} if self.factor_Mh is None else {"factor": self.factor_Mh})

    def _decode_with(self, rows: slice) -> None:
        """The decoder that the passes read, from the norms as they are."""
        if self.factor_Mh is not None:
            self.low["W_dec"][rows] = self.packed.weights["W_dec"][rows] * self.factor_Mh[rows].unsqueeze(-1)

    def state(self, member: int) -> dict[str, Tensor]:
        return super().state(member) | {EXTRA + name: norms[member] for name, norms in self._norms().items()}

    def load_state(self, member: int, state: dict[str, Tensor]) -> None:
        super().load_state(member, state)
        self._decode_with(slice(member, member + 1))

    def remove(self, member: int) -> None:
        keep = [i for i in range(len(self.saes)) if i != member]
        kept = {name: norms[keep] for name, norms in self._norms().items()}
        super().remove(member)
        if keep:
            for name, norms in self._norms().items():
                norms.copy_(kept[name])
            self._decode_with(slice(None))

    def _upload(self, hyper: Sequence[Hyper], first_slot: int) -> None:
        """Send the step's numbers if they changed. Pinned memory is reused only after its copy has run."""
        numbers = tuple((*row, float(first_slot)) for row in hyper)
        if numbers != self.uploaded:
            self.uploaded = numbers
            self.hyper.copy_(torch.tensor(numbers, dtype=torch.float64).pin_memory(), non_blocking=True)

    # ---- a micro-batch
    @torch.no_grad()
    def step(self, example: Example, hyper: Sequence[Hyper]) -> None:
        key = self._before(example, hyper)

        def whole(x_Nd: Tensor, keep_N: Tensor | None) -> None:
            self._finish(*self._gradients(x_Nd, keep_N, example.place.n_slots, example.place.tokens_per_slot))

        self.graphs(("step", *key), whole, example.x_Nd, example.keep_N)
        self._end_window()

    @torch.no_grad()
    def accumulate(self, example: Example, hyper: Sequence[Hyper]) -> None:
        key, first = self._before(example, hyper), self.micro_batches == 0

        def add_up(x_Nd: Tensor, keep_N: Tensor | None) -> None:
            self._add_up(self._gradients(x_Nd, keep_N, example.place.n_slots, example.place.tokens_per_slot), first)

        self.micro_batches += 1
        self.graphs(("accumulate", first, *key), add_up, example.x_Nd, example.keep_N)

    def _before(self, example: Example, hyper: Sequence[Hyper]) -> tuple[Hashable, ...]:
        """What happens outside of graphs; gives what a graph of this micro-batch depends on."""
        self._refresh_changed()
        self._upload(hyper, example.place.first_slot if self.saes[0].needs_noise else 0)
        if self.micro_batches == 0:
            self.places = self._places()
        self.rows += len(example.x_Nd)
        return (
            tuple(example.x_Nd.shape),
            example.x_Nd.dtype,
            example.keep_N is None,
            example.place.n_slots,
            self.places,
        )

    def _places(self) -> int:
        """What shapes depend on besides the batch's."""
        return 0

    def _add_up(self, parts: tuple[Store, Store], first: bool) -> None:
        moved = [sums.make_room(part) for sums, part in zip(self.sums_at, parts, strict=True)]
        if any(moved):  # never while a graph is captured: its warm calls have made room
            self.graphs.clear()
            self.summed.clear()
        grads, window = (sums.put(part, first=first) for sums, part in zip(self.sums_at, parts, strict=True))
        self.summed[self.places] = grads, window

    def _gradients(self, x_Nd: Tensor, keep_N: Tensor | None, slots: int, tokens_per_slot: int) -> tuple[Store, Store]:
        keys = None
        if self.saes[0].needs_noise:
            keys = row_keys(self.seed_M, self.hyper[0, 4], slots, tokens_per_slot)
        if "beta" in self.packed.buffers:
            self.packed.buffers["beta"].copy_(self.hyper[:, 2])
        x_Nd, keep_N, x_stats, hyper = self._call(start, x_Nd, keep_N, self.packed.buffers["scale"], self.hyper)
        vectors = {name: self.packed.vector(self.packed.weights, name) for name in self.packed.slices}
        given = Given(self.low, vectors, self.norm_Mh, x_Nd, keep_N, None, keys, hyper[:, 1], hyper[:, 2])
        grads, found = self._one_by_one(given) if self._alone(len(x_Nd)) else self._pass(given)
        grads[VECTORS] = torch.cat([found.vectors[name] for name in self.packed.slices], 1)
        if found.pull_Mh is not None:
            grads[PULL] = found.pull_Mh
        return grads, {"totals": found.totals_M4.double(), "fired": found.fired_Mh, "x": x_stats}

    def _alone(self, tokens: int) -> bool:
        """Whether members are computed one after another."""
        return len(self.saes) > 1 and tokens * self.h >= ALONE

    def _one_by_one(self, given: Given) -> tuple[Store, Found]:
        """As :meth:`_pass`, in the memory that one member needs."""
        grads = {name: torch.empty_like(tensor, dtype=self.low_dtype) for name, tensor in self.low.items()}
        found = []
        for i in range(len(self.saes)):
            out = {name: tensor[i : i + 1] for name, tensor in grads.items()}
            found.append(self._pass(given.member(i), out)[1])
        return grads, Found.of(found)

    def _pass(self, given: Given, out: Store | None = None) -> tuple[Store, Found]:
        """Gradients of the matrices (written to `out` where it is given) and the rest of what a micro-batch gives."""
        found = run(self.sae_type, self.form, given, self._call)
        grads = {name: product(left, right, out, name) for name, left, right in found.products}
        return grads, found._replace(products=[])  # their memory is the next member's

    def _call(self, stage: Callable[..., Any], *arguments: Any) -> Any:
        """A stage, compiled where that is wanted."""
        return compiled(stage, self.compiling)(*arguments)

    # ---- the end of a window
    def sums(self) -> list[Tensor]:
        grads, window = self.summed[self.places]
        return [*(tensor for tensor in grads.values() if tensor.is_floating_point()), *window.values()]

    @torch.no_grad()
    def apply(self, hyper: Sequence[Hyper]) -> None:
        self._upload(hyper, int(self.uploaded[0][4]) if self.uploaded else 0)
        self.graphs(("apply", self.places), lambda: self._finish(*self.summed[self.places]))
        self._end_window()

    def _end_window(self) -> None:
        self.micro_batches = 0
        self.rows_per_window, self.rows = max(self.rows_per_window, self.rows), 0

    def _finish(self, grads: Store, window: Store) -> None:
        aux_M = self._settle(grads, window, window["x"][self.d + 1].clamp_min(1))
        packed = self.packed
        coefficients, squares_Mh = kernels_rows.decoder_rows(
            grads["W_dec"], packed.weights["W_dec"], grads.get(PULL), self.factor_Mh, self.mode
        )
        for name in packed.matrices:
            if name != "W_dec":
                kernels_rows.add_row_squares(grads[name], squares_Mh)
        scalars = compiled(finish_small, self.compiling)(
            squares_Mh,
            aux_M,
            (packed.weights[VECTORS], packed.m[VECTORS], packed.v[VECTORS], grads[VECTORS]),
            window,
            self.flags,
            self.pending,
            packed.buffers["tokens_since_fired"],
            self.hyper,
            self.options.adam_betas,
            self.options.adam_eps,
        )
        for name in packed.matrices:
            decoder = name == "W_dec"
            kernels_rows.adam_rows(
                grads[name],
                packed.weights[name],
                packed.m[name],
                packed.v[name],
                None if self._shares(name) else self.low[name],
                scalars,
                self.options.adam_betas,
                self.options.adam_eps,
                coefficients=coefficients if decoder else None,
                norm_Mh=self.norm_Mh if decoder else None,
                factor_Mh=self.factor_Mh if decoder else None,
                row_norm_M=packed.buffers.get("row_norm") if decoder else None,
                mode=self.mode if decoder else kernels_rows.FREE,
            )


def product(left_MNh: Tensor, right_MNd: Tensor, out: Store | None, name: str) -> Tensor:
    """leftᵀ right, the gradient of a matrix."""
    return torch.bmm(left_MNh.mT, right_MNd, out=None if out is None else out[name])


def start(
    x_Nd: Tensor, keep_N: Tensor | None, scale_M: Tensor, hyper: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """x in normalised units, the mask as weights, the sums of x, and the step's numbers as float32."""
    x_Nd = x_Nd.to(scale_M.dtype) * scale_M[0]
    keep_N = None if keep_N is None else keep_N.to(scale_M.dtype)
    return x_Nd, keep_N, x_sums(x_Nd, keep_N), hyper.to(scale_M.dtype)


def x_sums(x_Nd: Tensor, keep_N: Tensor | None) -> Tensor:
    """Σx, Σ‖x‖² and the number of kept tokens, end to end."""
    kept_Nd = x_Nd if keep_N is None else x_Nd * keep_N.unsqueeze(-1)
    n = torch.full((1,), float(len(x_Nd)), device=x_Nd.device) if keep_N is None else keep_N.sum().view(1)
    return torch.cat([kept_Nd.sum(0), kept_Nd.square().sum().view(1), n]).double()


def finish_small(
    squares_Mh: Tensor,
    aux_M: Tensor,
    vectors: tuple[Tensor, Tensor, Tensor, Tensor],
    window: Store,
    flags: Store,
    pending: Store,
    since_Mh: Tensor,
    hyper: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """Norm, clip and health of every member, Adam on the vectors, counters; gives the kernels' scalars (M, 4)."""
    weights, m, v, g = vectors
    d = window["x"].numel() - 2
    n_kept = window["x"][d + 1]
    n = n_kept.clamp_min(1)
    norm_M = (squares_Mh.sum(1).double() + g.square().sum(1).double()).sqrt() / n
    healthy_M = torch.isfinite(norm_M) & torch.isfinite(window["totals"]).all(-1)
    go_M = flags["finite"] & healthy_M
    step_M = flags["step"] + 1
    rate_M, c2_M = hyper[:, 0] / (1 - betas[0] ** step_M), 1 / (1 - betas[1] ** step_M)
    gain_M = (hyper[:, 3] / (norm_M + 1e-6)).clamp(max=1.0) / n
    scalars = torch.stack([rate_M, c2_M, gain_M, go_M.double()], -1).to(torch.float32)
    rate, c2, gain, go = (column.to(g.dtype).unsqueeze(1) for column in (rate_M, c2_M, gain_M, go_M))
    g = g * gain
    m_new, v_new = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
    stepped = weights - rate * m_new / ((v_new * c2).sqrt() + eps)
    for old, new in ((weights, stepped), (m, m_new), (v, v_new)):
        old.copy_(torch.where(go > 0, new, old))
    flags["step"].copy_(torch.where(go_M, step_M, flags["step"]))
    flags["finite"].copy_(go_M)
    since_Mh.copy_(torch.where(window["fired"] > 0, 0, since_Mh + n.to(torch.int64)))
    loss_M, mse_M, sparsity_M, nonzero_M = window["totals"].unbind(-1)
    spread = window["x"][d] - window["x"][:d].square().sum() / n
    means = [loss_M + aux_M * n, mse_M, sparsity_M, aux_M * n, nonzero_M, spread.expand_as(loss_M)]
    pending["n"].add_(n_kept)
    pending["steps"].add_(1)
    pending["means"].add_(torch.stack(means, -1))
    pending["grad_norm"].add_(norm_M)
    return scalars
