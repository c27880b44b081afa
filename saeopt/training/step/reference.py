"""The reference step: plain autograd, one member after another. Every faster step is tested against it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from saeopt.saes.base import SAE, Forward, Ratio, StepInputs
from saeopt.saes.noise import uniform
from saeopt.training.step.books import Books, count, judge, kept, zeros
from saeopt.training.step.contract import TALLY, Example, Numbers, Optimiser, Parts, Pass, StackOptions
from saeopt.training.step.numbers import Table
from saeopt.training.step.stack import Assembly
from saeopt.training.step.storage import Own
from saeopt.training.step.tally import join

RATIO = "ratio."


class AutogradPass(Pass):
    """Any architecture, any device; a member's result does not depend on who else is there.

    The gradients of the loss terms lie in the parameters' `grad` meanwhile.
    """

    def __init__(self, storage: Own, table: Table, books: Books, seeds: Sequence[int], options: StackOptions) -> None:
        self.storage, self.table, self.books, self.seeds, self.options = storage, table, books, seeds, options
        self.parts = Parts({}, {})
        self.ratios: dict[str, None] = {}

    def gradients(self, example: Example, *, first: bool) -> Parts:
        """As the contract says."""
        if first:
            self._begin(example)
        tallies = []
        for member, sae in enumerate(self.storage.saes):
            with torch.enable_grad():
                tallies.append(self._member(member, sae, example))
        for name in self.storage.saes[0].tallies:
            stacked = torch.stack([found[name].detach() for found in tallies])
            if first:
                self.parts.window[TALLY + name] = stacked
            else:
                join(self.parts.window[TALLY + name], stacked, self.storage.saes[0].tallies[name])
        return self.parts

    def _begin(self, example: Example) -> None:
        saes, device = self.storage.saes, example.x_Nd.device
        for sae in saes:
            sae.zero_grad(set_to_none=True)
        window = {
            "totals": zeros(len(saes), 4, device=device),
            "fired": zeros(len(saes), saes[0].h, device=device),
            "y": zeros(len(saes), example.y_Ne.shape[-1] + 2, device=device),  # each member may have its own scale
        }
        self.parts, self.ratios = Parts({}, window), {}

    def _member(self, member: int, sae: SAE, example: Example) -> dict[str, Tensor]:
        place, dtype = example.place, sae.W_enc.dtype
        x_Nd = example.x_Nd.to(dtype) * sae.read_scale
        y_Ne = x_Nd if example.y_Ne is example.x_Nd else example.y_Ne.to(dtype) * sae.write_scale
        keep_N = None if example.keep_N is None else example.keep_N.to(dtype)
        u_Nh = None
        if sae.needs_noise:
            where = (place.first_sample, place.n_samples, place.tokens_per_sample)
            u_Nh = uniform(self.seeds[member], *where, sae.h, x_Nd.device).to(dtype)
        dead_h = sae.tokens_since_fired >= self.options.dead_after_tokens if sae.needs_dead else None
        inputs = step_inputs(sae, self.table.rows[member], u_Nh, dead_h, keep_N)
        with self._autocast(sae):
            forward = sae.training_forward(x_Nd, y_Ne, inputs)
        if forward.tallies.keys() != sae.tallies.keys():
            raise ValueError(f"{type(sae).__name__} declares tallies {[*sae.tallies]}, gives {[*forward.tallies]}")
        total = torch.stack(list(forward.terms.values())).sum()
        self._ratios(member, sae, forward)
        (total * self.books.flags["loss_scale"][member]).backward()
        for name, parameter in sae.named_parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.parts.grads[f"{member}.{name}"] = parameter.grad
        self._measure(member, y_Ne, keep_N, forward, total)
        return forward.tallies

    def _autocast(self, sae: SAE) -> torch.autocast | nullcontext[None]:
        if self.options.autocast is None:
            return nullcontext()
        return torch.autocast(sae.W_enc.device.type, dtype=self.options.autocast)

    def _ratios(self, member: int, sae: SAE, forward: Forward) -> None:
        """Gradients of the numerators, kept apart: the denominator is known only at the end of the window."""
        names, parameters = zip(*sae.named_parameters(), strict=True)
        self.ratios |= dict.fromkeys(forward.ratios)
        for ratio, (numerator, square, total_d) in forward.ratios.items():
            scaled = numerator * self.books.flags["loss_scale"][member]
            grads = torch.autograd.grad(scaled, parameters, retain_graph=True, allow_unused=True)
            found = {f"{member}.{ratio}.{n}": g for n, g in zip(names, grads, strict=True) if g is not None}
            sums = torch.cat([numerator.detach().double().view(1), square.double().view(1), total_d.double()])
            found[f"{member}.{RATIO}{ratio}"] = sums
            for name, tensor in found.items():
                store = self.parts.grads
                store[name] = store[name] + tensor if name in store else tensor

    @torch.no_grad()
    def _measure(self, member: int, y_Ne: Tensor, keep_N: Tensor | None, forward: Forward, total: Tensor) -> None:
        window, zero = self.parts.window, torch.zeros((), dtype=torch.float64, device=y_Ne.device)
        kept_Ne = y_Ne if keep_N is None else y_Ne * keep_N.unsqueeze(-1)
        error_Ne = forward.x_hat_Nd.to(y_Ne.dtype) - y_Ne
        if keep_N is not None:
            error_Ne = error_Ne * keep_N.unsqueeze(-1)
        fired_h = (forward.f_Nh != 0).sum(0)
        window["fired"][member] += fired_h
        y = window["y"][member]
        y[:-2] += kept_Ne.sum(0)
        y[-2] += kept_Ne.square().sum()
        y[-1] += len(y_Ne) if keep_N is None else keep_N.sum()
        sparsity = forward.terms.get("sparsity", zero)
        row = (total, error_Ne.square().sum(), sparsity, fired_h.sum())
        window["totals"][member] += torch.stack([t.double() for t in row])

    def settle(self, parts: Parts) -> Tensor:
        """Means over the window's tokens, in the parameters' `grad`."""
        values = []
        for member, sae in enumerate(self.storage.saes):
            n = kept(parts.window)[member].clamp_min(1)
            scale = self.books.flags["loss_scale"][member]
            inverse, aux = (1 / n / scale).to(sae.W_enc.dtype), torch.zeros_like(n)
            for name, parameter in sae.named_parameters():
                parameter.grad = parts.grads[f"{member}.{name}"] * inverse
            for ratio in self.ratios:
                sums = parts.grads[f"{member}.{RATIO}{ratio}"]
                over = Ratio(sums[0], sums[1], sums[2:]).inverse_denominator(n)
                aux += sums[0] * over
                for name, parameter in sae.named_parameters():
                    if (found := parts.grads.get(f"{member}.{ratio}.{name}")) is not None:
                        assert parameter.grad is not None
                        parameter.grad += found * (over / scale).to(parameter.dtype)
            values.append(aux)
        return torch.stack(values)


def step_inputs(
    sae: SAE, numbers: Numbers, u_Nh: Tensor | None, dead_h: Tensor | None, keep_N: Tensor | None
) -> StepInputs:
    """A member's numbers by name, as its training forward takes them."""
    own = {name: numbers[name] for name in sae.numbers}
    own = {name: v.to(sae.W_enc.dtype) if isinstance(v, Tensor) else v for name, v in own.items()}
    known = own.pop("sparsity_coeff", 0.0), own.pop("beta", 1.0)
    return StepInputs(*known, u_Nh, dead_h, keep_N, own)


class AutogradOptimiser(Optimiser):
    """Adam (Kingma & Ba 2015, eq. 1) on the parameters' `grad`, between the modules' own hooks."""

    def __init__(self, storage: Own, table: Table, books: Books, options: StackOptions) -> None:
        self.storage, self.table, self.books, self.options = storage, table, books, options

    def finish(self, parts: Parts, aux_M: Tensor) -> Tensor:
        """As the contract says."""
        books, numbers = self.books, self.table.column
        norm_M = torch.stack([_norm(sae) for sae in self.storage.saes])
        go_M, clip_M = judge(norm_M, parts.window, books.flags, numbers("lr"), numbers("max_grad_norm"))
        went_M = torch.stack([self._adam(i, clip_M[i], go_M[i]) for i in range(len(norm_M))])
        window, since_Mh = parts.window, self.storage.since_Mh
        count(went_M, norm_M, aux_M, window, books.flags, books.pending, since_Mh, books.scaled)
        return went_M

    def _adam(self, member: int, clip: Tensor, go: Tensor) -> Tensor:
        """Where `go` holds and the result is finite; else the old values stay."""
        sae, moments = self.storage.saes[member], self.storage.moments[member]
        (b1, b2), lr = self.options.adam_betas, self.table.column("lr")[member]
        before = {n: p.detach().clone() for n, p in sae.named_parameters()}
        step, new = self.books.flags["step"][member] + 1, {}
        for name, p in sae.named_parameters():
            assert p.grad is not None
            g = p.grad * clip.to(p.dtype)
            m, v = moments[f"m.{name}"], moments[f"v.{name}"]
            new_m, new_v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            new[f"m.{name}"], new[f"v.{name}"] = new_m, new_v
            factor = sae.rules[name].lr_factor if name in sae.rules else 1.0
            rate = (lr * factor * (1 - b1**step).reciprocal()).to(p.dtype)
            p.sub_(rate * new_m / ((new_v / (1 - b2**step).to(p.dtype)).sqrt() + self.options.adam_eps))
        sae.after_step()
        go = go & torch.stack([torch.isfinite(p).all() for p in sae.parameters()]).all()
        for name, p in sae.named_parameters():
            p.copy_(torch.where(go, p, before[name]))
            p.grad = None
        for name, moment in new.items():
            moments[name].copy_(torch.where(go, moment, moments[name]))
        return go


def _norm(sae: SAE) -> Tensor:
    """Of the whole gradient, once the module has had its say."""
    sae.before_step()
    return torch.stack([p.grad.double().square().sum() for p in sae.parameters() if p.grad is not None]).sum().sqrt()


def one_by_one(saes: Sequence[SAE], options: StackOptions) -> Assembly:
    """Members of any architecture, on any device."""
    storage = Own(saes)

    def build(table: Table, books: Books, seeds: Sequence[int]) -> tuple[Pass, Optimiser]:
        passes = AutogradPass(storage, table, books, seeds, options)
        return passes, AutogradOptimiser(storage, table, books, options)

    return Assembly("reference", storage, build, targets=True)
