"""What a study names must be there: model, hook points, data, dictionaries that hold k latents. Reads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saeopt.activations.local_files import check_sources
from saeopt.config.normalise import FEWEST
from saeopt.config.study import AUTO, TARGET, StudySpec
from saeopt.errors import UserError
from saeopt.metrics import METRICS
from saeopt.search.sensible import check_refined
from saeopt.search.signs import first_targets
from saeopt.search.space import Space
from saeopt.training.dry_run import shapes, weightless

if TYPE_CHECKING:
    from saeopt.activations.source import Source
    from saeopt.config.run import RunConfig
    from saeopt.search.space import Cell
    from saeopt.training.memory import MemberShape


CROSS_ENTROPIES = tuple(name for name in METRICS if name.startswith("ce_"))


def check_reach(spec: StudySpec, cells: Sequence[Cell]) -> None:
    """Refuse cells that could not be trained from what lies on this host.

    Names of the hub are left to the workers: another host may have what is not in reach here.

    Raises:
        UserError: naming the study, the cell's values and the field.
    """
    models: dict[object, Source] = {}
    seen: set[str] = set()
    for cell in cells:
        config = cell.config
        data, saes = config.data.model_dump_json(), config.saes.model_dump_json(exclude={"sparsity_coeff"})
        if (key := f"{config.model} {data} {saes}") in seen:
            continue
        seen.add(key)
        try:
            check_sources(config.data)
            _check_folders(config)
            if config.tlens_model_path is None and config.data.activations is None:
                continue
            place = (config.model, config.data.context_length, tuple(config.saes.hooks))
            if place not in models:
                models[place] = weightless(config)[0]
            members = shapes(config, models[place])
            _check_objectives(spec, [m.hook_point for m in members])
            _check_metrics(spec, config)
            _check_collapse(spec, members)
        except UserError as error:
            values = ", ".join(f"{k}={v}" for k, v in cell.params.items())
            hint = "" if "no such" not in str(error) else " (--elsewhere: it lies on the workers' hosts)"
            raise UserError(f"study {spec.name}: {values or 'base'}: {error}{hint}") from None


def with_first_targets(spec: StudySpec, *, elsewhere: bool = False) -> StudySpec:
    """A study whose `saes.target_l0: auto` is the L0s that are tried first, by the narrowest hook point's width.

    Raises:
        UserError: the model's width is not known here, or is too small.
    """
    alternatives = spec.space.get(TARGET, [])
    if not any(d.values == [AUTO] for d in alternatives):
        return spec
    check_refined(spec, Space(spec))
    by_hand = f"; or give them: {TARGET}: {{values: [8, 16, 32, 64, 128], refine: true}}"
    where = f"study {spec.name}: '{TARGET}: auto'"
    if elsewhere:
        raise UserError(f"{where}: needs the model's width, which --elsewhere leaves out{by_hand}")
    configs = _distinct(with_targets(spec, [1]))
    try:
        members = [m for config in configs for m in shapes(config, weightless(config)[0])]
    except UserError as error:
        raise UserError(f"{where}: needs the model's width: {error}{by_hand}") from None
    d, h = min(m.d for m in members), min(m.h for m in members)
    values = first_targets(d, h)
    if len(values) < FEWEST:
        raise UserError(f"{where}: a width of {d} and {h} latents are too few for a curve{by_hand}")
    found = with_targets(spec, values)
    found.set_older(*(with_targets(older, values) for older in spec.older))
    return found


def with_targets(spec: StudySpec, values: list[int]) -> StudySpec:
    """The study with these L0s in place of `auto`."""
    first = [d.model_copy(update={"values": values}) if d.values == [AUTO] else d for d in spec.space[TARGET]]
    return spec.model_copy(update={"space": {**spec.space, TARGET: first}})


def _distinct(spec: StudySpec) -> list[RunConfig]:
    """A config for each shape that the study's SAEs have."""
    found: dict[str, RunConfig] = {}
    for cell in Space(spec).grid():
        saes = cell.config.saes.model_dump_json(include={"sae_positions", "dict_size_to_input_ratio", "per_hook"})
        found.setdefault(f"{cell.config.model} {cell.config.data.activations} {saes}", cell.config)
    return list(found.values())


def _check_folders(config: RunConfig) -> None:
    """Refuse a tokenizer or pretrained SAEs that are named by a path and not there."""
    tokenizer = config.data.tokenizer_name or ""
    places = [("saes.pretrained_sae_paths", path) for path in config.saes.pretrained_sae_paths or []]
    if Path(tokenizer).is_absolute() or tokenizer[:1] in (".", "~"):  # else it may be one of the hub
        places.append(("data.tokenizer_name", tokenizer))
    for field, path in places:
        if not Path(path).exists():
            raise UserError(f"'{field}': {path}: no such file or folder")


def _check_objectives(spec: StudySpec, hooks: Sequence[str]) -> None:
    for objective in spec.objectives:
        wanted = objective.hook_points
        names = [] if wanted in ("mean", "all") else [wanted] if isinstance(wanted, str) else wanted
        absent = [name for name in names if name not in hooks]
        if absent:
            raise UserError(f"'objectives': no SAE trains at {absent[0]} (but at {', '.join(hooks)})")


def _check_metrics(spec: StudySpec, config: RunConfig) -> None:
    """Stored activations have no cross-entropies: every trial would fail at its end."""
    for objective in spec.objectives:
        if config.data.activations is not None and objective.metric in ("kl", *CROSS_ENTROPIES):
            raise UserError(f"'objectives': '{objective.metric}' needs a language model, not 'data.activations'")


def _check_collapse(spec: StudySpec, members: Sequence[MemberShape]) -> None:
    """A rule that takes every dictionary for collapsed leaves no trial."""
    rule = spec.early_stopping.collapse
    most = max(m.k or m.h for m in members)
    if rule is not None and rule.min_l0 > most:
        raise UserError(
            f"'early_stopping.collapse.min_l0' ({rule.min_l0:g}) exceeds the {most} latents that may be active:"
            " every trial would count as collapsed"
        )
