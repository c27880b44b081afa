"""From plans to members: hook points, calibration, initial or pretrained weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from saeopt.activations.calibration import Calibration, calibration
from saeopt.activations.source import Samples, Source
from saeopt.config.keys import stream_key
from saeopt.config.run import RunConfig
from saeopt.config.saes import SAEConfig
from saeopt.config.sites import Site
from saeopt.console import log
from saeopt.errors import UserError
from saeopt.saes.base import SAE, Widths, where
from saeopt.saes.init import forget_decoders
from saeopt.saes.noise import derived_seed
from saeopt.saes.normalisation import measured, outlier_severity
from saeopt.saes.registry import get_sae
from saeopt.training.pack import Member
from saeopt.training.plan import TrialPlan
from saeopt.training.pretrained import load_pretrained, put_in_its_units
from saeopt.training.runtime import Runtime


def check_plans(plans: Sequence[TrialPlan]) -> RunConfig:
    """The config that fixes the stream; an error if the plans do not share one."""
    if len({plan.name for plan in plans}) < len(plans):
        raise ValueError("the names of a pack's trials must differ")
    if len({stream_key(plan.config) for plan in plans}) != 1:
        raise ValueError("the trials of a pack must agree in everything that fixes the activation stream")
    return plans[0].config


def total_samples(config: RunConfig, tokens: Samples, world: int) -> int:
    """Samples of the whole run: whole windows over all ranks, rounded up."""
    wanted = config.data.n_train_samples or tokens.n_train_available
    if wanted is None:
        raise UserError("'data.n_train_samples' must be given: the length of a streamed data set is not known")
    window = config.effective_batch * world
    total = math.ceil(wanted / window) * window
    if total != wanted:
        log.info("training on %d samples instead of %d: whole windows of %d samples", total, wanted, window)
    return total


def check_schedules(plans: Sequence[TrialPlan], total: int) -> None:
    """Refuse a warm-up that is longer than one pass, whose length the config does not know.

    Raises:
        UserError: naming the field.
    """
    for plan in plans:
        config = plan.config
        if config.data.n_train_samples is not None:
            continue  # it was checked with the config
        warmups = {
            "warmup_samples": config.warmup_samples,
            "saes.sparsity_warmup_samples": config.saes.sparsity_warmup_samples or 0,
        }
        for field, warmup in warmups.items():
            if warmup > total:
                raise UserError(f"'{field}' ({warmup}) exceeds the {total} samples of one pass over the data")
        if config.recipe >= 2 and (config.schedule == "linear" or config.saes.sparsity_warmup_samples is None):
            log.info(
                "%s: 'data.n_train_samples' is not given: the learning rate does not fall and λ does not warm up,"
                " unless told in samples",
                plan.name,
            )


def evaluation_in_samples(config: RunConfig, members: Sequence[Member], lm_parameters: int) -> float:
    """Training samples that take as long as the evaluation of all members, by counting products.

    A token costs a language model one pass in training and, in an evaluation, one more for the clean logits, for each
    hook point's zeros and for each member; a member's step costs three times its forward pass.
    """
    passes = 2 + len({m.hook_point for m in members}) + len(members)
    forward = sum(2.0 * p.numel() for m in members for p in m.sae.parameters())
    ratio = (2.0 * lm_parameters * passes + forward) / (2.0 * lm_parameters + 3 * forward)
    return config.data.n_eval_samples * ratio


def sites_of(plans: Sequence[TrialPlan], model: Source) -> dict[str, list[Site]]:
    """The sites of each trial.

    Raises:
        UserError: the model lacks one, also one that `saes.per_hook` names.
    """
    found = {plan.name: model.sites(plan.config.saes) for plan in plans}
    for plan in plans:
        check_per_hook(plan.config, plan.name, [site.key for site in found[plan.name]], model)
    return found


def check_per_hook(config: RunConfig, name: str, keys: Sequence[str], model: Source) -> None:
    """Say which entries of `saes.per_hook` no SAE of these sites reads.

    Raises:
        UserError: the model has no such hook point.
    """
    for hook in sorted(set(config.saes.per_hook) - set(keys)):
        try:
            model.resolve([hook])
        except UserError as error:
            raise UserError(str(error).replace("saes.sae_positions", "saes.per_hook")) from None
        log.warning("%s: 'saes.per_hook' names %s, at which no SAE is trained", name, hook)


def blank_members(plan: TrialPlan, sites: Sequence[Site], model: Source, runtime: Runtime) -> list[Member]:
    """A trial's members with weights of zeros: one per seed and site."""
    members = []
    for replica, site in itertools.product(range(plan.config.seeds), sites):
        section, d, widths = plan.config.sae_at(site.key), *widths_at(site, model)
        sae = get_sae(section.sae_type)(
            d,
            dictionary_width(section, d),
            section,
            legacy_scaling=bool(plan.config.legacy_scaling),
            recipe=plan.config.recipe,
            dtype=runtime.weights_dtype,
            device=runtime.device,
            **where(widths),
        )
        members.append(Member(plan.name, site.key, plan.config, sae, replica=replica))
    return members


def widths_at(site: Site, model: Source) -> tuple[int, Widths | None]:
    """The width that is read at a site, and all widths where it is no autoencoder's."""
    reads, writes = (tuple(map(model.width, hooks)) for hooks in (site.reads, site.writes))
    return sum(reads), None if site.one else Widths(reads, writes, site.reads == site.writes)


def dictionary_width(section: SAEConfig, d: int) -> int:
    """h = round(ratio · d), at least 1.

    Raises:
        UserError: L0 cannot be what is asked for.
    """
    h = max(1, round(section.dict_size_to_input_ratio * d))
    if section.target_l0 is not None and section.target_l0 > h:
        raise UserError(f"'saes.target_l0': {section.target_l0:g} exceeds the dictionary's {h} latents")
    return h


def calibrate(members: Sequence[Member], model: Source, tokens: Samples, config: RunConfig, runtime: Runtime) -> None:
    """Set scale and initial weights of new members from the first samples of the stream.

    Every rank reads the same samples and then takes rank 0's weights.
    """
    if not members:
        return
    found = calibration((m.site for m in members), model, tokens, config)
    limits = runtime.ranks.agree({site: part.norm_limit for site, part in found.items()})
    tell_severity(members, found)
    try:
        for member in sorted(members, key=lambda m: (m.hook_point, m.seed, m.sae.h)):  # equal ones draw a decoder once
            member.sae.norm_limit = limits[member.site]
            begin(member, found[member.site], runtime)
    finally:
        forget_decoders()


def tell_severity(members: Sequence[Member], found: Mapping[Site, Calibration]) -> None:
    """Say γ of every site; above 1 what is not centred has latents that never fire (arXiv 2605.31518)."""
    severity = {site.key: outlier_severity(part.y_Ne) for site, part in found.items()}
    log.info("γ = ‖mean‖ / ‖std‖: %s", ", ".join(f"{key} {gamma:.2g}" for key, gamma in severity.items()))
    high = {m.hook_point for m in members if severity[m.hook_point] > 1 and not m.sae.centres}
    if high:
        log.warning(
            "γ is above 1 at %s: many latents will never fire; saes.normalize_activations: mean_scale avoids it",
            ", ".join(sorted(high)),
        )


def begin(member: Member, found: Calibration, runtime: Runtime) -> None:
    """A new member's scales and initial (or pretrained) weights, from what the stream's beginning gave."""
    sae, site, x_Nd = member.sae, member.site, found.x_Nd.to(runtime.weights_dtype)
    y_Ne = x_Nd if found.y_Ne is found.x_Nd else found.y_Ne.to(runtime.weights_dtype)
    if len(x_Nd) == 0:
        raise UserError("'data': the first samples hold nothing but special tokens, which are masked")
    given = member.config.saes.pretrained_sae_paths
    if not given or (load_pretrained(member) and member.sae_config.retrain_saes):
        normalise(sae, site, x_Nd, y_Ne)
        if given:
            put_in_its_units(member)
    x_Nd, raw_Ne = sae.normalised(x_Nd.to(runtime.device)), y_Ne.to(runtime.device)
    y_Ne = x_Nd if sae.widths is None else sae.normalised_written(raw_Ne)
    sae.measure(y_Ne)
    if not given:
        seed = derived_seed("initial weights", member.seed, member.hook_point)
        targets = () if sae.widths is None else (y_Ne,)
        sae.initialise(x_Nd, torch.Generator().manual_seed(seed), *targets)
    runtime.ranks.data.broadcast(list(sae.state_dict().values()))


def normalise(sae: SAE, site: Site, x_Nd: Tensor, y_Ne: Tensor) -> None:
    """Set what normalises a new SAE from the unmasked activations of its site.

    Raises:
        UserError: they cannot be normalised.
    """
    read, written = sae.widths[:2] if sae.widths is not None else ((sae.d,), (sae.d,))
    try:
        of_x = measured(x_Nd, site.reads, read, sae.normalisation)
        of_y = of_x if y_Ne is x_Nd else measured(y_Ne, site.writes, written, sae.normalisation)
    except ValueError as error:
        raise UserError(str(error)) from None
    sae.normalise_by(of_x, of_y)


def measure_norm_limits(
    members: Sequence[Member], model: Source, tokens: Samples, config: RunConfig, runtime: Runtime
) -> None:
    """Measure what was not stored, by a version that measured in each micro-batch."""
    lacking = [m for m in members if config.data.mask_norm_outliers is not None and m.sae.norm_limit == math.inf]
    if lacking:
        found = calibration((m.site for m in lacking), model, tokens, config)
        limits = runtime.ranks.agree({site: measured.norm_limit for site, measured in found.items()})
        for member in lacking:
            member.sae.norm_limit = limits[member.site]
