"""`--dry-run`: what would be trained, from configs alone; no weights are read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from rich.console import RenderableType
from rich.table import Table

from saeopt.config import RunConfig, dump_yaml
from saeopt.config.sites import Site
from saeopt.console import console, titled
from saeopt.errors import UserError
from saeopt.runs.naming import run_name
from saeopt.saes.base import SAE, where
from saeopt.saes.registry import get_sae
from saeopt.training.environment import precision
from saeopt.training.launch import notices
from saeopt.training.memory import MemberShape, ModelShape, estimate
from saeopt.training.setup import check_per_hook, dictionary_width, widths_at

if TYPE_CHECKING:
    from saeopt.activations.source import Source


def print_dry_run(config: RunConfig, device: str) -> None:
    """The resolved config, the members with their sizes, the estimated memory."""
    from saeopt.activations.language_model import lm_dtype
    from saeopt.host.devices import choose_device

    notices(config, resumed=False)
    chosen = choose_device(device)
    config = config.model_copy(update={"mixed_precision": precision(config, chosen.type)[0]})
    model, lm = weightless(config)
    members = shapes(config, model)
    check_per_hook(config, run_name(config), [m.hook_point for m in members], model)
    console.print(dump_yaml(config), markup=False, soft_wrap=True)
    console.print(_members_table(members, run_name(config), config.seeds), crop=False)
    lm_bytes = lm_dtype(config.lm_dtype, chosen).itemsize
    needed = estimate(config, members, lm, lm_bytes, chosen.type)
    table = Table(title=f"Estimated memory on {chosen}", title_justify="left")
    table.add_column("for")
    table.add_column("MiB", justify="right")
    for purpose, size in [*needed.items(), ("in all", sum(needed.values()))]:
        table.add_row(purpose, f"{size / 2**20:,.0f}")
    console.print(table)
    console.print(
        f"{config.effective_batch} samples ({config.effective_batch * config.data.context_length:,} tokens) per step"
        " and process"
    )


def weightless(config: RunConfig) -> tuple[Source, ModelShape]:
    """The language model's structure without its weights, and what its memory depends on."""
    from transformers import AutoModelForCausalLM

    from saeopt.activations.language_model import LanguageModel, check_hooks
    from saeopt.activations.pretrained import context_length_of, read_model_config
    from saeopt.activations.stored import StoredActivations

    if config.data.activations is not None:
        return StoredActivations.load(config), ModelShape(0, 0)
    model_config = read_model_config(config.model, config.tlens_model_path is not None)
    check_hooks(config.saes.hooks, model_config, config.lm_processing == "raw")
    limit = context_length_of(model_config)
    if limit is not None and config.data.context_length > limit:
        raise UserError(f"'data.context_length': {config.data.context_length} is longer than the model's {limit}")
    nowhere = torch.device("meta")
    with nowhere:
        model = AutoModelForCausalLM.from_config(model_config)
    text = model_config.get_text_config()
    written_out = getattr(model.config, "_attn_implementation", None) == "eager"
    lm = ModelShape(
        parameters=sum(p.numel() for p in model.parameters()),
        vocabulary=text.vocab_size,
        buffer_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
        written_heads=getattr(text, "num_attention_heads", 0) if written_out else 0,  # Mamba has none
    )
    # Widths do not depend on lm_processing, and weights that are not there cannot be folded.
    return LanguageModel(model, None, nowhere), lm


def shapes(config: RunConfig, model: Source) -> list[MemberShape]:
    """The members of a run, seed by seed; their parameters are counted on torch's meta device."""
    found = []
    for site, sae in blank_saes(config, model):
        n_parameters = sum(p.numel() for p in sae.parameters())
        by_hook = None if sae.widths is None else {hook: model.width(hook) for hook in site.hooks}
        centring = sum(b.numel() for _, b in sae.normalising()) if sae.centres else 0
        sae_type = sae.config.sae_type
        found.append(
            MemberShape(site.key, sae_type, sae.d, sae.h, n_parameters, sae.selected, sae.e, by_hook, centring)
        )
    return found * config.seeds


def blank_saes(config: RunConfig, model: Source) -> Iterator[tuple[Site, SAE]]:
    """The SAEs of a run on torch's meta device."""
    for site in model.sites(config.saes):
        section, d, widths = config.sae_at(site.key), *widths_at(site, model)
        sae = get_sae(section.sae_type)(
            d,
            dictionary_width(section, d),
            section,
            legacy_scaling=bool(config.legacy_scaling),
            recipe=config.recipe,
            device=torch.device("meta"),
            **where(widths),
        )
        yield site, sae


def fitting(config: RunConfig, free: float, device: torch.device, most: int) -> int:
    """How many trials like this one fit together into `free` bytes; at least 1, at most `most` members per site."""
    from saeopt.activations.language_model import lm_dtype

    model, lm = weightless(config)
    members, lm_bytes = shapes(config, model), lm_dtype(config.lm_dtype, device).itemsize

    def needed(trials: int) -> int:
        return sum(estimate(config, members * trials, lm, lm_bytes, device.type).values())

    return max(1, bisect_right(range(1, most // config.seeds + 1), free, key=needed))


def _members_table(members: list[MemberShape], name: str, seeds: int) -> RenderableType:
    table = Table()
    table.add_column("hook point", overflow="fold")
    wider = any(m.by_hook for m in members)
    for column in ("architecture", *(("d read", "e written") if wider else ("d",)), "h", "parameters"):
        table.add_column(column, justify="right")
    for m in members[: len(members) // seeds]:
        widths = (m.d, m.e or m.d, m.h) if wider else (m.d, m.h)
        table.add_row(m.hook_point, m.sae_type, *map(str, widths), f"{m.n_parameters:,}")
    each = f", {seeds} seeds of each of these" if seeds > 1 else ""
    return titled(f"{name}: {len(members)} SAE{'s' if len(members) != 1 else ''}{each}", table)
