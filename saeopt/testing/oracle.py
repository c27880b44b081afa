"""Training written out plainly: torch's autograd and Adam on a whole window, one SAE, nothing fast."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from saeopt.saes.base import SAE, StepInputs
from saeopt.saes.noise import uniform
from saeopt.testing.cases import OPTIONS, joined, row
from saeopt.training.step.contract import Example


def train_plainly(sae: SAE, data: Sequence[Example], parts: int, seed: int) -> None:
    """Train on windows of `parts` micro-batches as a stack of `OPTIONS` must."""
    given = row(sae)
    lr, rules = float(given["lr"]), sae.rules
    groups = [{"params": [p], "lr": lr * rules[n].lr_factor if n in rules else lr} for n, p in sae.named_parameters()]
    adam = torch.optim.Adam(groups, betas=OPTIONS.adam_betas, eps=OPTIONS.adam_eps)
    for at in range(0, len(data), parts):
        window = joined(data[at : at + parts])
        x_Nd, keep_N = window.x_Nd * sae.scale, window.keep_N
        assert keep_N is not None
        place, n = window.place, keep_N.sum()
        inputs = StepInputs(
            sparsity_coeff=given["sparsity_coeff"],
            beta=given.get("beta", 1.0),
            u_Nh=uniform(seed, place.first_sample, place.n_samples, place.tokens_per_sample, sae.h).to(x_Nd)
            if sae.needs_noise
            else None,
            dead_h=sae.tokens_since_fired >= OPTIONS.dead_after_tokens if sae.needs_dead else None,
            keep_N=keep_N.to(x_Nd),
            numbers={name: given[name] for name in sae.numbers},
        )
        forward = sae.training_forward(x_Nd, x_Nd, inputs)
        adam.zero_grad()
        value = torch.stack([*forward.terms.values()]).sum() / n
        sum((ratio.value(n) for ratio in forward.ratios.values()), value).backward()
        sae.before_step()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), float(given["max_grad_norm"]))
        adam.step()
        sae.after_step()
        with torch.no_grad():
            sae.tokens_since_fired += n
            sae.tokens_since_fired[(forward.f_Nh != 0).any(0)] = 0
            sae.after_window({name: t.detach() for name, t in forward.tallies.items()}, n)
