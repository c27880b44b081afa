"""The reference stack: plain autograd, one member after another. Every faster stack is tested against it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from saeopt.saes.base import SAE, Forward, Ratio, StepInputs
from saeopt.saes.noise import uniform
from saeopt.training.step.contract import Example, Hyper, Stack, StackOptions, check_names

_GROWTH_STEPS = 2000  # float16: the loss scale doubles after so many finite steps (torch.amp.GradScaler's default)
_START_SCALE = 2.0**12


class AutogradStack(Stack):
    """Any architecture, any device. A member's result does not depend on who else is in the stack."""

    def __init__(self, saes: Sequence[SAE], seeds: Sequence[int], options: StackOptions) -> None:
        super().__init__(saes, seeds, options)
        self.members = [_Member(sae, seed, options) for sae, seed in zip(saes, seeds, strict=True)]

    def accumulate(self, example: Example, hyper: Sequence[Hyper]) -> None:
        for member, numbers in zip(self.members, hyper, strict=True):
            member.accumulate(example, numbers)

    def sums(self) -> list[Tensor]:
        return [tensor for member in self.members for tensor in member.sums()]

    def apply(self, hyper: Sequence[Hyper]) -> None:
        for member, numbers in zip(self.members, hyper, strict=True):
            member.apply(numbers)

    def metrics(self) -> list[dict[str, float]]:
        return [member.metrics() for member in self.members]

    def state(self, member: int) -> dict[str, Tensor]:
        return self.members[member].state

    def load_state(self, member: int, state: dict[str, Tensor]) -> None:
        own = self.members[member].state
        check_names(own, state)
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def remove(self, member: int) -> None:
        for row in (self.members, self.saes, self.seeds):
            del row[member]


class _Member:
    """One SAE with its Adam moments, window sums and pending metrics (float64 where sums grow)."""

    def __init__(self, sae: SAE, seed: int, options: StackOptions) -> None:
        self.sae, self.seed, self.options = sae, seed, options
        device = sae.W_enc.device
        wide: Any = {"dtype": torch.float64, "device": device}
        self.moments = {f"{kind}.{n}": torch.zeros_like(p) for n, p in sae.named_parameters() for kind in ("m", "v")}
        self.ratio_grads: dict[str, dict[str, Tensor]] = {}
        self.window = {
            "n": torch.zeros((), **wide),
            "mse": torch.zeros((), **wide),
            "fired": torch.zeros(sae.h, **wide),
            "x": torch.zeros(sae.d, **wide),
            "totals": torch.zeros(4, **wide),  # Σ loss terms, Σ sparsity, Σ non-zeros, Σ‖x‖²
        }
        self.ratio_sums: dict[str, Tensor] = {}
        self.pending = {
            "n": torch.zeros((), **wide),
            "steps": torch.zeros((), **wide),
            "means": torch.zeros(6, **wide),  # per window, times n: loss, mse, sparsity, aux, l0, Σ(x − mean)²
            "grad_norm": torch.zeros((), **wide),
        }
        self.flags = {
            "step": torch.zeros((), **wide),
            "finite": torch.ones((), dtype=torch.bool, device=device),
            "loss_scale": torch.full(
                (), _START_SCALE if options.autocast == torch.float16 else 1.0, dtype=torch.float32, device=device
            ),
            "good_steps": torch.zeros((), **wide),
        }

    @property
    def state(self) -> dict[str, Tensor]:
        return {**self.moments, **{f"pending.{k}": v for k, v in self.pending.items()}, **self.flags}

    # ---- a micro-batch
    def accumulate(self, example: Example, hyper: Hyper) -> None:
        sae, place = self.sae, example.place
        x_Nd = example.x_Nd.to(sae.W_enc.dtype) * sae.scale
        y_Ne = x_Nd if example.y_Ne is example.x_Nd else example.y_Ne.to(sae.W_enc.dtype) * sae.scale
        keep_N = None if example.keep_N is None else example.keep_N.to(x_Nd.dtype)
        u_Nh = None
        if sae.needs_noise:
            u_Nh = uniform(self.seed, place.first_slot, place.n_slots, place.tokens_per_slot, sae.h, x_Nd.device)
            u_Nh = u_Nh.to(x_Nd.dtype)
        dead_h = sae.tokens_since_fired >= self.options.dead_after_tokens if sae.needs_dead else None
        inputs = StepInputs(hyper.sparsity_coeff, hyper.beta, u_Nh, dead_h, keep_N)
        with self._autocast():
            forward = sae.training_forward(x_Nd, y_Ne, inputs)
        total = torch.stack(list(forward.terms.values())).sum()
        ratio_grads = self._ratio_gradients(forward)
        (total * self.flags["loss_scale"]).backward()
        for name, grads in ratio_grads.items():
            store = self.ratio_grads.setdefault(name, {})
            for parameter, grad in grads.items():
                store[parameter] = store[parameter] + grad if parameter in store else grad
        self._measure(y_Ne, keep_N, forward, total)

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        if self.options.autocast is None:
            return nullcontext()
        return torch.autocast(self.sae.W_enc.device.type, dtype=self.options.autocast)

    def _ratio_gradients(self, forward: Forward) -> dict[str, dict[str, Tensor]]:
        """Gradients of the numerators, kept apart: the denominator is known only at the end of the window."""
        found = {}
        for name, (numerator, square, total_d) in forward.ratios.items():
            names, parameters = zip(*self.sae.named_parameters(), strict=True)
            grads = torch.autograd.grad(
                numerator * self.flags["loss_scale"], parameters, retain_graph=True, allow_unused=True
            )
            found[name] = {n: g for n, g in zip(names, grads, strict=True) if g is not None}
            sums = torch.cat([numerator.detach().double().view(1), square.double().view(1), total_d.double()])
            self.ratio_sums[name] = self.ratio_sums[name] + sums if name in self.ratio_sums else sums
        return found

    @torch.no_grad()
    def _measure(self, y_Ne: Tensor, keep_N: Tensor | None, forward: Forward, total: Tensor) -> None:
        window, zero = self.window, torch.zeros((), dtype=torch.float64, device=y_Ne.device)
        kept_Ne = y_Ne if keep_N is None else y_Ne * keep_N.unsqueeze(-1)
        error_Ne = forward.x_hat_Nd.to(y_Ne.dtype) - y_Ne
        if keep_N is not None:
            error_Ne = error_Ne * keep_N.unsqueeze(-1)
        fired_h = (forward.f_Nh != 0).sum(0)
        window["n"] += len(y_Ne) if keep_N is None else keep_N.sum()
        window["mse"] += error_Ne.square().sum()
        window["fired"] += fired_h
        window["x"] += kept_Ne.sum(0)
        sparsity = forward.terms.get("sparsity", zero)
        window["totals"] += torch.stack([t.double() for t in (total, sparsity, fired_h.sum(), kept_Ne.square().sum())])

    # ---- the end of a window
    def sums(self) -> Iterator[Tensor]:
        for parameter in self.sae.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            yield parameter.grad
        for name in sorted(self.ratio_grads):
            for parameter_name, parameter in self.sae.named_parameters():
                store = self.ratio_grads[name]
                yield store.setdefault(parameter_name, torch.zeros_like(parameter))
            yield self.ratio_sums[name]
        yield from self.window.values()

    @torch.no_grad()
    def apply(self, hyper: Hyper) -> None:
        sae, window, flags = self.sae, self.window, self.flags
        n = window["n"].clamp_min(1)
        inverse = (1 / n / flags["loss_scale"]).to(sae.W_enc.dtype)
        aux = torch.zeros_like(n)
        for parameter in sae.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad * inverse
        for name, store in self.ratio_grads.items():
            parts = self.ratio_sums[name]
            over = Ratio(parts[0], parts[1], parts[2:]).inverse_denominator(n)
            aux += parts[0] * over
            factor = over / flags["loss_scale"]
            for parameter_name, parameter in sae.named_parameters():
                if parameter_name in store:
                    assert parameter.grad is not None
                    parameter.grad += store[parameter_name] * factor.to(parameter.dtype)
        sae.before_step()
        grads = [p.grad for p in sae.parameters() if p.grad is not None]
        norm = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()
        clip = (hyper.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        healthy = torch.isfinite(norm) & torch.isfinite(window["totals"]).all()
        went = self._adam(hyper.lr, clip, flags["finite"] & healthy)
        self._count(n, aux, norm, went)
        self._clear()

    def _adam(self, lr: float, clip: Tensor, go: Tensor) -> Tensor:
        """Adam (Kingma & Ba 2015, eq. 1) where `go` holds and the result is finite; else the old values stay."""
        b1, b2 = self.options.adam_betas
        before = {n: p.detach().clone() for n, p in self.sae.named_parameters()}
        step, moments = self.flags["step"] + 1, {}
        for name, p in self.sae.named_parameters():
            assert p.grad is not None
            g = p.grad * clip.to(p.dtype)
            m, v = self.moments[f"m.{name}"], self.moments[f"v.{name}"]
            new_m, new_v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            moments[f"m.{name}"], moments[f"v.{name}"] = new_m, new_v
            rate = (lr / (1 - b1**step)).to(p.dtype)
            p.sub_(rate * new_m / ((new_v / (1 - b2**step).to(p.dtype)).sqrt() + self.options.adam_eps))
        self.sae.after_step()
        go = go & torch.stack([torch.isfinite(p).all() for p in self.sae.parameters()]).all()
        for name, p in self.sae.named_parameters():
            p.copy_(torch.where(go, p, before[name]))
        for name, moment in moments.items():
            self.moments[name].copy_(torch.where(go, moment, self.moments[name]))
        self.flags["step"].copy_(torch.where(go, step, self.flags["step"]))
        return go

    def _count(self, n: Tensor, aux: Tensor, norm: Tensor, healthy: Tensor) -> None:
        window, pending, flags, sae = self.window, self.pending, self.flags, self.sae
        fired_h, since_h = window["fired"] > 0, sae.tokens_since_fired
        since_h.copy_(torch.where(healthy, torch.where(fired_h, 0, since_h + window["n"].to(since_h.dtype)), since_h))
        loss, sparsity, nonzero, square = window["totals"]
        spread = square - window["x"].square().sum() / n
        pending["n"] += window["n"]
        pending["steps"] += 1
        pending["means"] += torch.stack([loss + aux * n, window["mse"], sparsity, aux * n, nonzero, spread])
        pending["grad_norm"] += norm
        if self.options.autocast == torch.float16:  # an overflow halves the loss scale instead of ending the member
            scale, good = flags["loss_scale"], flags["good_steps"]
            good.copy_(torch.where(healthy, good + 1, 0.0))
            grown = torch.where(good % _GROWTH_STEPS == 0, scale * 2, scale)
            scale.copy_(torch.where(healthy, grown, scale / 2))
            healthy = healthy | (scale >= 2**-10)
        flags["finite"] &= healthy

    def _clear(self) -> None:
        for parameter in self.sae.parameters():
            parameter.grad = None
        for tensor in self.window.values():
            tensor.zero_()
        self.ratio_grads.clear()
        self.ratio_sums.clear()

    def metrics(self) -> dict[str, float]:
        pending = self.pending
        n = max(pending["n"].item(), 1.0)
        loss, mse, sparsity, aux, l0, spread = (pending["means"] / n).tolist()
        dead = (self.sae.tokens_since_fired >= self.options.dead_after_tokens).double().mean().item()
        found = {
            "loss": loss,
            "mse": mse,
            "sparsity": sparsity,
            "l0": l0,
            "fvu": mse / spread if spread > 0 else float("nan"),
            "fraction_dead": dead,
            "grad_norm": (pending["grad_norm"] / pending["steps"].clamp_min(1)).item(),
            "finite": float(self.flags["finite"].item()),
        }
        if self.sae.needs_dead:
            found["aux"] = aux
        for tensor in pending.values():
            tensor.zero_()
        return found
