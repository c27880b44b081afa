"""The numbers of an architecture that never change, for the hand-written passes: from the modules' configs."""

from __future__ import annotations

from typing import NamedTuple

from saeopt.saes.base import SAE
from saeopt.saes.gated import GatedSAE
from saeopt.saes.gated_hard_concrete import GatedHardConcreteSAE
from saeopt.saes.hard_concrete import HardConcreteSAE
from saeopt.saes.jumprelu import JumpReluSAE


class Form(NamedTuple):
    """What all members of a stack share (hashable: compiled code is specialised on it).

    `mse`, `aux`, `penalty`: coefficients, divided by d under `legacy_scaling` as the modules do. `unit`: decoder rows
    are kept at norm 1; `directions`: only their direction is used. `prefixes`: where prefixes of the dictionary end
    that reconstruct by themselves, the last one at h; empty where there is only the whole. `l0_target` above 0: the
    penalty is a square around it; `max_density` above 0: latents that fire more often are penalised more; `tanh`: the
    penalty is by activation, and `pre_activation` draws back latents that were silent for `dead_after` tokens.
    `eval_gate`: how the non-zeros of the evaluation form are counted; None: they are not.
    """

    mse: float
    penalty: float
    unit: bool
    directions: bool = False
    aux: float = 0.0
    magnitude: str = "relu"
    limits: tuple[float, float] = (-0.1, 1.1)
    eval_gate: str | None = None
    seed_aux: bool = False
    frozen_aux: bool = True
    prefixes: tuple[int, ...] = ()
    l0_target: float = 0.0
    max_density: float = 0.0
    density_coeff: float = 0.0
    tanh: bool = False
    pre_activation: float = 0.0
    dead_after: int = 0

    @property
    def blocks(self) -> list[slice]:
        """The latents that each prefix has beyond the one before it."""
        ends = self.prefixes
        return [slice(a, b) for a, b in zip((0, *ends), ends, strict=False)] if ends else [slice(None)]


def _share(sae: SAE) -> float:
    return 1 / sae.d if sae.legacy_scaling else 1.0


def plain(sae: SAE) -> Form:
    """relu, topk and batch_topk."""
    return Form(sae.config.mse_coeff * _share(sae), _share(sae), sae.unit_rows, prefixes=sae.prefixes)


def jumprelu(sae: SAE) -> Form:
    """Its penalty, and which latents it is larger for."""
    assert isinstance(sae, JumpReluSAE)
    config = sae.config
    return plain(sae)._replace(
        l0_target=config.l0_penalty_target or 0.0,
        max_density=config.max_density or 0.0,
        density_coeff=config.density_coeff,
        tanh=config.penalty == "tanh",
        pre_activation=config.pre_activation_coeff,
    )


def gated(sae: SAE) -> Form:
    """Its penalty is never divided."""
    assert isinstance(sae, GatedSAE)
    config, aux = sae.config, sae.config.aux_coeff * _share(sae)
    return plain(sae)._replace(penalty=1.0, aux=aux, magnitude=config.magnitude_activation, frozen_aux=sae.frozen_aux)


def hard_concrete(sae: SAE) -> Form:
    """The decoder's rows are directions."""
    assert isinstance(sae, HardConcreteSAE)
    config = sae.config
    limits = config.hard_concrete_stretch_limits
    form = plain(sae)._replace(directions=True, magnitude=config.magnitude_activation, limits=limits)
    return form._replace(eval_gate=config.eval_gate if sae.tallies else None)


def gated_hard_concrete(sae: SAE) -> Form:
    """Its auxiliary term never teaches the decoder."""
    assert isinstance(sae, GatedHardConcreteSAE)
    config, aux = sae.config, sae.config.aux_coeff * _share(sae)
    limits, seed_aux = config.hard_concrete_stretch_limits, config.aux_form == "seed"
    form = plain(sae)._replace(aux=aux, magnitude=config.magnitude_activation, limits=limits, seed_aux=seed_aux)
    return form._replace(eval_gate=config.eval_gate if sae.tallies else None)
