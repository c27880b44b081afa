"""What all fused stacks share: window sums, accumulation, metrics, state, and members that leave.

Shape suffixes: M members, N tokens, d model width, h dictionary width. On the CPU members and chunks of tokens are
computed one after another, so that what lies between two products stays in the cache; on a GPU all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from saeopt.config.run import PerformanceConfig
from saeopt.saes.base import SAE
from saeopt.saes.noise import uniform
from saeopt.training.step import optimiser as adam
from saeopt.training.step.contract import Example, Hyper, Stack, StackOptions, check_names
from saeopt.training.step.dense import ARCHITECTURES, Form, Found, Given, run
from saeopt.training.step.storage import VECTORS, Packed, Store

PULL = "pull"
_CHUNK_ELEMENTS = 2**20
_PENDING = {"n": (), "steps": (), "means": (6,), "grad_norm": ()}


class FusedStack(Stack):
    """Members stepped by hand-written passes over packed tensors; float32 or float64 weights on the CPU."""

    architectures: ClassVar[frozenset[str]] = frozenset(ARCHITECTURES)

    def __init__(
        self, saes: Sequence[SAE], seeds: Sequence[int], options: StackOptions, performance: PerformanceConfig
    ) -> None:
        super().__init__(saes, seeds, options)
        first = saes[0]
        self.performance, self.form = performance, Form.of(first)
        self.sae_type: str = first.config.sae_type
        self.d, self.h, self.dtype, self.device = first.d, first.h, first.W_enc.dtype, first.W_enc.device
        self.low_dtype = options.autocast or self.dtype
        self.directions = self.sae_type == "hard_concrete"
        self.packed = Packed(self.saes)
        size = len(self.saes)
        self.pending = {name: self._zeros(size, *shape) for name, shape in _PENDING.items()}
        self.flags = {
            "step": self._zeros(size),
            "finite": torch.ones(size, dtype=torch.bool, device=self.device),
            "loss_scale": torch.ones(size, dtype=torch.float32, device=self.device),
            "good_steps": self._zeros(size),
        }
        self._prepare()

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self.device)

    def _prepare(self) -> None:
        """Everything that depends on the number of members and holds nothing over a window's end."""
        size = len(self.saes)
        self.low = {
            name: tensor if self._shares(name) else torch.empty_like(tensor, dtype=self.low_dtype)
            for name, tensor in self.packed.weights.items()
            if name != VECTORS
        }
        self.norm_Mh = torch.ones(size, self.h, dtype=self.dtype, device=self.device)
        self.window: Store = {
            "totals": self._zeros(size, 4),
            "fired": torch.zeros(size, self.h, dtype=torch.float64, device=self.device),
            "x": self._zeros(self.d + 2),  # Σx, Σ‖x‖², number of kept tokens
        }
        self.grads: Store = {}
        self._seen = [-1] * size
        self._refresh()

    def _shares(self, name: str) -> bool:
        return self.low_dtype == self.dtype and not (self.directions and name == "W_dec")

    def _refresh(self, rows: slice = slice(None)) -> None:
        """Copies of some members' weights that the passes read, from the weights."""
        self._seen[rows] = [self.packed.version(i) for i in range(len(self.saes))[rows]]
        W_dec = self.packed.weights["W_dec"][rows]
        if self.directions or not self.form.unit:
            torch.linalg.vector_norm(W_dec, dim=-1, out=self.norm_Mh[rows])
        for name, copy in self.low.items():
            if self.directions and name == "W_dec":
                copy[rows] = W_dec * self._row_factor()[rows].unsqueeze(-1)
            elif not self._shares(name):
                copy[rows] = self.packed.weights[name][rows]

    def _refresh_changed(self) -> None:
        """What was written to from outside."""
        for i, seen in enumerate(self._seen):
            if self.packed.version(i) != seen:
                self._refresh(slice(i, i + 1))

    def _row_factor(self) -> Tensor:
        """hard_concrete decodes with rows of norm `row_norm`: W_dec times this."""
        return self.packed.buffers["row_norm"].unsqueeze(-1) / self.norm_Mh.clamp_min(1e-12)

    # ---- a micro-batch
    @torch.no_grad()
    def accumulate(self, example: Example, hyper: Sequence[Hyper]) -> None:
        self._refresh_changed()
        x_Nd = example.x_Nd.to(self.dtype) * self.packed.buffers["scale"][0]
        keep_N = None if example.keep_N is None else example.keep_N.to(self.dtype)
        self._measure_x(x_Nd, keep_N)
        if not self.grads:
            self._start_grads()
        for member, numbers in enumerate(hyper):
            if "beta" in self.packed.buffers:
                self.packed.buffers["beta"][member] = numbers.beta
            self._accumulate_member(member, example, x_Nd, keep_N, numbers)

    def _measure_x(self, x_Nd: Tensor, keep_N: Tensor | None) -> None:
        kept_Nd = x_Nd if keep_N is None else x_Nd * keep_N.unsqueeze(-1)
        window_x = self.window["x"]
        window_x[: self.d] += kept_Nd.sum(0)
        window_x[self.d] += kept_Nd.square().sum()
        window_x[self.d + 1] += len(x_Nd) if keep_N is None else keep_N.sum()

    def _start_grads(self) -> None:
        self.grads = {name: torch.zeros_like(tensor) for name, tensor in self.packed.weights.items()}
        if not (self.form.unit or self.directions or self.sae_type == "topk"):
            self.grads[PULL] = torch.zeros_like(self.norm_Mh)

    def _accumulate_member(
        self, member: int, example: Example, x_Nd: Tensor, keep_N: Tensor | None, numbers: Hyper
    ) -> None:
        row = slice(member, member + 1)
        low = {name: tensor[row] for name, tensor in self.low.items()}
        vectors = {n: self.packed.vector(self.packed.weights, n)[row] for n in self.packed.slices}
        sparsity = torch.full((1,), numbers.sparsity_coeff, dtype=self.dtype)
        beta = torch.full((1,), numbers.beta, dtype=self.dtype)
        u_Nh = self._noise(member, example)
        step = max(64, _CHUNK_ELEMENTS // self.h)
        for at in range(0, len(x_Nd), step):
            rows = slice(at, at + step)
            keep = None if keep_N is None else keep_N[rows]
            u_MNh = None if u_Nh is None else u_Nh[rows].unsqueeze(0)
            given = Given(low, vectors, self.norm_Mh[row], x_Nd[rows], keep, u_MNh, None, sparsity, beta)
            self._add(member, run(self.sae_type, self.form, given))

    def _noise(self, member: int, example: Example) -> Tensor | None:
        if not self.saes[member].needs_noise:
            return None
        place = example.place
        where = (place.first_slot, place.n_slots, place.tokens_per_slot)
        return uniform(self.seeds[member], *where, self.h, self.device).to(self.dtype)

    def _add(self, member: int, found: Found) -> None:
        for name, left_MNh, right_MNd in found.products:
            # sums are in the weights' precision, whatever that of the products (`mixed_precision: bf16`)
            self.grads[name][member].addmm_(left_MNh[0].T.to(self.dtype), right_MNd[0].to(self.dtype))
        for name, vector_Mx in found.vectors.items():
            self.packed.vector(self.grads, name)[member] += vector_Mx[0]
        if found.pull_Mh is not None:
            self.grads[PULL][member] += found.pull_Mh[0]
        self.window["totals"][member] += found.totals_M4[0]
        self.window["fired"][member] += found.fired_Mh[0]

    # ---- the end of a window
    def sums(self) -> list[Tensor]:
        if not self.grads:
            self._start_grads()
        return [*self.grads.values(), *self.window.values()]

    @torch.no_grad()
    def apply(self, hyper: Sequence[Hyper]) -> None:
        n = self.window["x"][self.d + 1].clamp_min(1)
        aux_M = self._settle(self.grads, self.window, n)
        norms = torch.stack([self._apply_member(i, numbers, n) for i, numbers in enumerate(hyper)])
        self._count(n, aux_M, norms)
        self._clear()

    def _settle(self, grads: Store, window: Store, n: Tensor) -> Tensor:
        """Finish the window's gradient sums; gives each member's auxiliary ratio."""
        return torch.zeros_like(self.flags["step"])

    def _apply_member(self, member: int, numbers: Hyper, n: Tensor) -> Tensor:
        """One member's step on the CPU, where a decision on the host costs nothing; gives its gradient norm."""
        grads = {name: tensor[member] for name, tensor in self.grads.items()}
        W_dec = self.packed.weights["W_dec"][member]
        adam.settle_decoder(grads, W_dec, self._row_factor()[member] if self.directions else None, unit=self.form.unit)
        grads.pop(PULL, None)
        norm = torch.stack([g.double().square().sum() for g in grads.values()]).sum().sqrt() / n
        healthy = torch.isfinite(norm) & torch.isfinite(self.window["totals"][member]).all()
        go = bool(healthy & self.flags["finite"][member])
        self.flags["finite"][member] = go
        if go:
            clip = min(1.0, numbers.max_grad_norm / (float(norm) + 1e-6))
            for gradient in grads.values():
                gradient.mul_(clip / float(n))
            weights, m, v = (
                {name: store[name][member] for name in grads}
                for store in (self.packed.weights, self.packed.m, self.packed.v)
            )
            adam.step_on_cpu(weights, m, v, grads, float(self.flags["step"][member]), numbers.lr, self.options)
            self.flags["step"][member] += 1
            if self.form.unit:
                W_dec.div_(W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12))
        return norm

    def _count(self, n: Tensor, aux_M: Tensor, norm_M: Tensor) -> None:
        window, pending = self.window, self.pending
        since_Mh = self.packed.buffers["tokens_since_fired"]
        since_Mh.add_(n.to(since_Mh.dtype)).masked_fill_(window["fired"] > 0, 0)
        loss_M, mse_M, sparsity_M, nonzero_M = window["totals"].unbind(-1)
        spread = window["x"][self.d] - window["x"][: self.d].square().sum() / n
        pending["n"] += window["x"][self.d + 1]
        pending["steps"] += 1
        pending["means"] += torch.stack(
            [loss_M + aux_M * n, mse_M, sparsity_M, aux_M * n, nonzero_M, spread.expand_as(loss_M)], -1
        )
        pending["grad_norm"] += norm_M

    def _clear(self) -> None:
        for tensor in (*self.grads.values(), *self.window.values()):
            tensor.zero_()
        self._refresh()

    # ---- outside the step
    def metrics(self) -> list[dict[str, float]]:
        dead_Mh = self.packed.buffers["tokens_since_fired"] >= self.options.dead_after_tokens
        rows = [*self.pending["means"].unbind(-1), self.pending["n"], self.pending["steps"]]
        rows += [self.pending["grad_norm"], dead_Mh.double().mean(-1), self.flags["finite"].double()]
        found = [self._named(numbers) for numbers in torch.stack(rows, -1).tolist()]  # the one synchronisation
        for tensor in self.pending.values():
            tensor.zero_()
        return found

    def _named(self, numbers: list[float]) -> dict[str, float]:
        n, steps = max(numbers[6], 1.0), max(numbers[7], 1.0)
        loss, mse, sparsity, aux, l0, spread = (number / n for number in numbers[:6])
        named = {
            "loss": loss,
            "mse": mse,
            "sparsity": sparsity,
            "l0": l0,
            "fvu": mse / spread if spread > 0 else float("nan"),
            "fraction_dead": numbers[9],
            "grad_norm": numbers[8] / steps,
            "finite": numbers[10],
        }
        if self.saes[0].needs_dead:
            named["aux"] = aux
        return named

    def state(self, member: int) -> dict[str, Tensor]:
        packed = self.packed
        moments = {
            f"{kind}.{name}": packed.member_view(store, name, member)
            for name in packed.shapes
            for kind, store in (("m", packed.m), ("v", packed.v))
        }
        pending = {f"pending.{name}": tensor[member] for name, tensor in self.pending.items()}
        return {**moments, **pending, **{name: tensor[member] for name, tensor in self.flags.items()}}

    def load_state(self, member: int, state: dict[str, Tensor]) -> None:
        own = self.state(member)
        check_names(own, state)
        self._refresh(slice(member, member + 1))
        for name in own.keys() & state.keys():
            own[name].copy_(state[name])

    def remove(self, member: int) -> None:
        self.packed.remove(self.saes, member)
        keep = [i for i in range(len(self.saes)) if i != member]
        for store in (self.pending, self.flags):
            for name in store:
                store[name] = store[name][keep]
        del self.saes[member], self.seeds[member]
        if self.saes:
            self._prepare()
