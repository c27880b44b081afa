"""λ that is moved until L0 is what was asked for: `saes.target_l0`.

Shape suffixes: M members.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saeopt.saes.numbers import EVALUATED
from saeopt.training.controls import Control, progress_of
from saeopt.training.step.contract import Store

if TYPE_CHECKING:
    from saeopt.training.pack import Member

BEGIN, FREEZE = 0.05, 0.05
"""Shares of the run: nothing is moved before this one (nor while λ warms up), and during this last one."""
SMOOTHING = 0.01
"""Share of the run over which L0 is averaged."""
ABOVE, ABOVE_UNTIL = 0.2, 0.6
"""How far above its target L0 may be, and until which share of the run."""
PROPORTIONAL, INTEGRAL = 1.0, 33.0
"""d ln λ per change of ln(L0 / reference), and per ln(L0 / reference) and run."""
MOST_STEP = 0.05
"""|d ln λ| per window."""
MOST = 4 * math.log(10)
"""|ln(λ / its start)|."""
TOLERANCE = 0.05
"""Relative distance from the target beyond which a run says that it has not come there."""


class TargetL0(Control):
    """A PI control of ln λ, of all members of a stack that have a target; λ of the others stays as it is scheduled.

    At the share t of a run, with L̄ the running mean of the windows' L0 (bias-corrected, over `SMOOTHING` of the run):

        r = L* (1 + ABOVE · max(0, ABOVE_UNTIL / t − 1))      e = clip(ln(L̄ / r), ±1)
        d ln λ = clip(PROPORTIONAL · Δe + INTEGRAL · e · Δt, ±MOST_STEP)      |ln(λ / λ_start)| ≤ MOST

    L0 is that of the evaluation form: where gates are noisy in training, the tally `EVALUATED`. The reference r falls
    as L0 does in a run of constant λ, about as 1/t. A control that holds the target from the first windows on needs a
    much larger λ there, and what is too sparse in the beginning learns features that it keeps (arXiv 2508.16560, A.8).
    """

    name = "target_l0"

    def __init__(self, members: Sequence[Member], total: int) -> None:
        self.members, self.total = members, total
        self._sent: tuple[list[float], Tensor] | None = None

    def state(self, members: Sequence[Member]) -> Store:
        """`ln`: ln(λ / its schedule's); `sum` and `weight` of L̄; `error`: the last e; `at`: the samples then.

        `target` and `begin` never change.
        """
        targets = [math.nan if m.sae_config.target_l0 is None else m.sae_config.target_l0 for m in members]
        begins = [max(BEGIN * self.total, progress_of(m, 0, self.total).sparsity_warmup) for m in members]
        moving = {n: torch.zeros(len(members), dtype=torch.float64) for n in ("ln", "sum", "weight", "error", "at")}
        fixed = {"target": targets, "begin": begins}
        return moving | {n: torch.tensor(values, dtype=torch.float64) for n, values in fixed.items()}

    def moves(self, member: Member) -> bool:
        """As the contract says."""
        return member.sae_config.target_l0 is not None

    def numbers(self, state: Store, samples: int) -> Mapping[str, Tensor]:
        """λ."""
        scheduled = [
            m.sae.numbers["sparsity_coeff"].at(m.sae.config, progress_of(m, samples, self.total)) for m in self.members
        ]
        return {"sparsity_coeff": self._on_device(scheduled, state["ln"].device) * state["ln"].exp()}

    def _on_device(self, values: list[float], device: torch.device) -> Tensor:
        """Sent where it changed, without waiting."""
        if self._sent is None or self._sent[0] != values:
            tensor = torch.tensor(values, dtype=torch.float64)
            self._sent = (
                values,
                (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True),
            )
        return self._sent[1]

    def observe(self, state: Store, window: Mapping[str, Tensor]) -> None:
        """As the contract says."""
        l0_M = window[EVALUATED] / window["n"] if EVALUATED in window else window["l0"]
        share_M, passed_M = window["samples"] / self.total, (window["samples"] - state["at"]) / self.total
        keep_M = (-passed_M / SMOOTHING).exp()
        state["sum"] = keep_M * state["sum"] + (1 - keep_M) * l0_M
        state["weight"] = keep_M * state["weight"] + (1 - keep_M)
        reference_M = state["target"] * (1 + ABOVE * (ABOVE_UNTIL / share_M - 1).clamp_min(0))
        error_M = (state["sum"] / state["weight"] / reference_M).clamp_min(1e-6).log().clamp(-1, 1)
        move_M = PROPORTIONAL * (error_M - state["error"]) + INTEGRAL * error_M * passed_M
        on_M = (window["samples"] > state["begin"]) & (share_M <= 1 - FREEZE) & ~state["target"].isnan()
        moved_M = state["ln"] + torch.where(on_M, move_M.clamp(-MOST_STEP, MOST_STEP), 0.0)
        state["ln"] = moved_M.clamp(-MOST, MOST)
        state["error"] = torch.where(state["target"].isnan(), 0.0, error_M)
        state["at"] = window["samples"].clone()

    def verdict(self, state: Store, member: int) -> str | None:
        """As the contract says."""
        if float(state["weight"][member]) == 0:
            return None
        target, ln = float(state["target"][member]), float(state["ln"][member])
        l0 = float(state["sum"][member] / state["weight"][member])
        at_bound = abs(ln) > MOST - 1e-9
        if math.isnan(target) or (abs(l0 / target - 1) <= TOLERANCE and not at_bound):
            return None
        why = (
            f"λ has come to its bound, {math.exp(ln):.0e} times its start: it does not move L0 that far here"
            if at_bound
            else f"λ was still moving ({math.exp(ln):.2g} times its start): more training or a better start helps"
        )
        return f"'target_l0' is {target:g}, training ended at L0 {l0:.3g}: {why}"
