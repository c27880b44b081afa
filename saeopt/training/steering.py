"""λ that is moved until L0 is what was asked for: `saes.target_l0`.

Shape suffixes: M members.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saeopt.config.saes import FirstCoeff, SAEConfig
from saeopt.saes.base import SAE
from saeopt.saes.jumprelu import JumpReluConfig
from saeopt.saes.numbers import EVALUATED
from saeopt.training.controls import Control, progress_of
from saeopt.training.step.contract import Store

if TYPE_CHECKING:
    from saeopt.training.pack import Member

BEGIN, FREEZE = 0.05, 0.05
"""Shares of the run: nothing is moved before this one (nor while λ warms up), and during this last one."""
SMOOTHING = 0.01
"""Share of the run over which L0 is averaged."""
ABOVE, ABOVE_UNTIL, MOST_ABOVE = 0.2, 0.9, 5.0
"""How far above its target L0 may be, until which share of the run, and by which factor at most."""
BAND, BAND_UNTIL = 1.0, 0.5
"""Distance of ln L0 from where it may be that is left alone at the start, and share of the run at which it is 0."""
PROPORTIONAL, INTEGRAL = 1.0, 33.0
"""d ln λ per change of ln(L0 / reference), and per ln(L0 / reference) and run."""
MOST_STEP = 0.05
"""|d ln λ| per window."""
MOST = 4 * math.log(10)
"""|ln(λ / its start)|, where the architecture does not say less (`FirstCoeff.reach`)."""
TOLERANCE = 0.05
"""Relative distance from the target beyond which a run says that it has not come there."""

DIED = 0.2
"""Share of dead latents from which they, and not λ, are what holds L0 down."""
FAR = 0.2
"""Relative distance from `l0_penalty_target` beyond which a run says so: the squared error draws L0 away from it."""


def _guess(sae: SAE) -> FirstCoeff | None:
    """Guesses are for normalised activations."""
    return None if sae.normalisation == "none" else sae.config.first_coeff


def with_first_coeff(sae: SAE) -> SAEConfig:
    """A member's section with λ where it starts."""
    section, guess = sae.config, _guess(sae)
    if section.target_l0 is None or guess is None:
        return section
    return section.model_copy(update={"sparsity_coeff": section.mse_coeff * guess.at(section.target_l0, sae.e)})


class TargetL0(Control):
    """A PI control of ln λ, of all members of a stack that have a target; λ of the others stays as it is scheduled.

    At the share t of a run, with L̄ the running mean of the windows' L0 (bias-corrected, over `SMOOTHING` of the run):

        r = L* min(MOST_ABOVE, 1 + ABOVE · max(0, ABOVE_UNTIL / t − 1))      b = BAND · max(0, 1 − t / BAND_UNTIL)
        e = c − clip(c, ±b), c = clip(ln(L̄ / r), ±1)
        d ln λ = clip(PROPORTIONAL · Δe + INTEGRAL · e · Δt, ±MOST_STEP)      |ln(λ / λ_start)| ≤ MOST

    L0 is that of the evaluation form: where gates are noisy in training, the tally `EVALUATED`. The reference r falls
    as L0 does in a run of constant λ, about as 1/t, and what is within the band of it is left alone: with a λ that is
    too large in the beginning latents die for good (arXiv 2508.16560, A.8), with one that is too small gates that
    learn by a penalty on L0 settle where they explain less. So λ starts at a guess (`SAEConfig.first_coeff`) and is
    moved late rather than early.
    """

    name = "target_l0"

    def __init__(self, members: Sequence[Member], total: int) -> None:
        self.members, self.total = members, total
        self._sections = {id(m): with_first_coeff(m.sae) for m in members}
        self._sent: tuple[list[float], Tensor] | None = None

    def state(self, members: Sequence[Member]) -> Store:
        """`ln`: ln(λ / its schedule's); `sum` and `weight` of L̄; `error`: the last e; `at`: the samples then.

        `target`, `begin` and `most` never change.
        """
        targets = [m.sae_config.target_l0 or math.nan if m.sae_config.steers else math.nan for m in members]
        guesses = [m.sae_config.first_coeff for m in members]
        most = [MOST if guess is None else math.log(guess.reach) for guess in guesses]
        begins = [max(BEGIN * self.total, progress_of(m, 0, self.total).sparsity_warmup) for m in members]
        moving = {
            name: torch.zeros(len(members), dtype=torch.float64) for name in ("ln", "sum", "weight", "error", "at")
        }
        given = {"target": targets, "begin": begins, "most": most}
        return moving | {name: torch.tensor(values, dtype=torch.float64) for name, values in given.items()}

    def moves(self, member: Member) -> bool:
        """As the contract says."""
        return member.sae_config.steers

    def numbers(self, state: Store, samples: int) -> Mapping[str, Tensor]:
        """λ."""
        scheduled = [
            m.sae.numbers["sparsity_coeff"].at(self._sections[id(m)], progress_of(m, samples, self.total))
            for m in self.members
        ]
        return {"sparsity_coeff": self._on_device(scheduled, state["ln"].device) * state["ln"].exp()}

    def _on_device(self, values: list[float], device: torch.device) -> Tensor:
        """Sent where it changed, without waiting."""
        if self._sent is None or self._sent[0] != values:
            tensor = torch.tensor(values, dtype=torch.float64)
            sent = tensor.pin_memory() if device.type == "cuda" else tensor
            self._sent = values, sent.to(device, non_blocking=True)
        return self._sent[1]

    def observe(self, state: Store, window: Mapping[str, Tensor]) -> None:
        """As the contract says."""
        l0_M = window[EVALUATED] / window["n"] if EVALUATED in window else window["l0"]
        share_M, passed_M = window["samples"] / self.total, (window["samples"] - state["at"]) / self.total
        keep_M = (-passed_M / SMOOTHING).exp()
        state["sum"] = keep_M * state["sum"] + (1 - keep_M) * l0_M
        state["weight"] = keep_M * state["weight"] + (1 - keep_M)
        above_M = (1 + ABOVE * (ABOVE_UNTIL / share_M - 1).clamp_min(0)).clamp_max(MOST_ABOVE)
        ratio_M = state["sum"] / state["weight"] / (state["target"] * above_M)
        away_M, band_M = ratio_M.clamp_min(1e-6).log().clamp(-1, 1), BAND * (1 - share_M / BAND_UNTIL).clamp_min(0)
        error_M = away_M - torch.minimum(torch.maximum(away_M, -band_M), band_M)
        move_M = PROPORTIONAL * (error_M - state["error"]) + INTEGRAL * error_M * passed_M
        on_M = (window["samples"] > state["begin"]) & (share_M <= 1 - FREEZE) & state["target"].isfinite()
        moved_M = state["ln"] + torch.where(on_M, move_M.clamp(-MOST_STEP, MOST_STEP), 0.0)
        state["ln"] = torch.minimum(torch.maximum(moved_M, -state["most"]), state["most"])
        state["error"] = torch.where(state["target"].isnan(), 0.0, error_M)
        state["at"] = window["samples"].clone()

    def verdict(self, state: Store, member: int) -> str | None:
        """As the contract says."""
        if float(state["weight"][member]) == 0:
            return None
        target, ln = float(state["target"][member]), float(state["ln"][member])
        l0 = float(state["sum"][member] / state["weight"][member])
        if math.isnan(target) or abs(l0 / target - 1) <= TOLERANCE:
            return None
        own = self.members[member]
        if l0 < target and (lost := died(own, self.total)):
            return f"'target_l0' is {target:g}, training ended at L0 {l0:.3g}: {lost}"
        at_bound = abs(ln) > float(state["most"][member]) - 1e-9
        better = " or another 'sparsity_coeff' to start from" if _guess(own.sae) is None else ""
        why = (
            f"λ has come to its bound, {math.exp(ln):.5g} times its start: it does not move L0 that far here"
            if at_bound
            else f"λ was still moving ({math.exp(ln):.2g} times its start): more training{better} helps"
        )
        return f"'target_l0' is {target:g}, training ended at L0 {l0:.3g}: {why}"


def died(member: Member, total: int) -> str | None:
    """Why an L0 is too small where many latents are dead: no λ and no further training brings them back."""
    limit = member.config.dead_after_tokens(member.sae_config, total)
    n = int((member.sae.tokens_since_fired >= limit).sum())
    if n < DIED * member.sae.h:
        return None
    resampling = "'saes.resample_every_tokens' revives them; " if hasattr(member.sae_config, "auxk_coeff") else ""
    return (
        f"{n} of {member.sae.h} latents are dead, which neither more training nor a smaller λ changes: {resampling}a"
        " smaller 'lr' or a longer 'saes.sparsity_warmup_samples' keeps more alive"
    )


def penalty_missed(member: Member, total: int) -> str | None:
    """What is to be said where a penalty with a target of its own has ended far from it (synchronises)."""
    section = member.sae_config
    if not isinstance(section, JumpReluConfig) or section.l0_penalty_target is None:
        return None
    target, l0 = section.l0_penalty_target, float(member.sae.get_buffer("last_l0"))
    if abs(l0 / target - 1) <= FAR:
        return None
    why = (l0 < target and died(member, total)) or (
        f"a larger 'saes.sparsity_coeff' (now {section.sparsity_coeff:g}) or more training brings it nearer, and"
        " 'saes.target_l0' in place of this penalty moves λ by itself"
    )
    return f"'l0_penalty_target' is {target:g}, training ended at L0 {l0:.3g}: {why}"
