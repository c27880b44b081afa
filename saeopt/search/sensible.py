"""Studies that could give no result, or twice the same, are refused when they are created.

Only then: what older versions stored goes on loading. Imports no torch; what needs the model is in `saeopt.reach`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from saeopt.config.fields import changes_results
from saeopt.config.sense import check_selection, check_sense
from saeopt.config.study import AUTO, TARGET, StudySpec
from saeopt.errors import UserError
from saeopt.search.objectives import objective_names
from saeopt.search.space import MOST_CELLS, Space

if TYPE_CHECKING:
    from saeopt.search.space import Cell

_BETA = {"saes.final_beta", "saes.beta_annealing", "saes.sae_type"}


def check_space(spec: StudySpec, space: Space) -> None:
    """Raise :class:`UserError` for a study that is too large, or that Optuna cannot hold."""
    where = f"study {spec.name}"
    if spec.sampler.type != "grid" and (spec.max_trials or 0) > MOST_CELLS:
        raise UserError(f"{where}: 'max_trials' ({spec.max_trials:,}): a study has at most {MOST_CELLS:,} trials")
    objective_names(spec)
    check_refined(spec, space)
    if any(p.dimension.values == [AUTO] for p in space.parameters):
        raise UserError(f"{where}: '{TARGET}: auto' needs the model's width (saeopt.reach.with_first_targets)")
    for p in space.parameters:
        try:
            p.distribution  # noqa: B018  (Optuna's own limits)
        except ValueError as error:
            raise UserError(f"{where}: 'space.{p.name}': {error}") from None


def check_refined(spec: StudySpec, space: Space) -> None:
    """Raise :class:`UserError` where the curve of what is refined would have gaps."""
    for p in space.refined:
        asked = f"study {spec.name}: 'space.{p.name}': {'auto' if p.dimension.values == [AUTO] else 'refine'}"
        if spec.sampler.type != "grid":
            raise UserError(f"{asked} needs 'sampler: grid', not {spec.sampler.type}: every L0 is tried once")
        if spec.early_stopping.type != "none":
            raise UserError(f"{asked} needs 'early_stopping: none': every L0 is trained to its end")
        if spec.max_trials is not None:
            raise UserError(f"{asked} excludes 'max_trials', which would cut the curve")


def check_study(spec: StudySpec, cells: Sequence[Cell]) -> None:
    """Raise :class:`UserError` for a study that cannot give what it asks for."""
    where = f"study {spec.name}"
    for name, dimensions in spec.space.items():
        if not changes_results(name.partition("@")[0], spec.sae_types):
            raise UserError(f"{where}: 'space.{name}': changes no result: it belongs into 'base'")
        for d in dimensions:
            if d.step is not None and d.low is not None and d.high is not None and d.step > d.high - d.low:
                ends = f"{d.low:g} to {d.high:g}"
                raise UserError(f"{where}: 'space.{name}': 'step' ({d.step:g}) is larger than the range, {ends}")
    lists = [d.values is not None for dimensions in spec.space.values() for d in dimensions]
    if spec.sampler.type == "cmaes" and all(lists):
        raise UserError(f"{where}: 'sampler: cmaes' needs a range ('low', 'high'): of lists it chooses by chance")
    if cells and not _BETA & set(spec.space):
        try:
            check_sense(cells[0].config)
        except UserError as error:
            raise UserError(f"{where}: base: {error}") from None
    _check_effects(spec, cells)
    _check_hooks(spec, [cell.config.saes.keys for cell in cells])


def check_selections(spec: StudySpec, cells: Iterable[Cell]) -> None:
    """Raise :class:`UserError` for trials whose k selects nothing."""
    for cell in cells:
        try:
            check_selection(cell.config)
        except UserError as error:
            raise UserError(f"study {spec.name}: {error}") from None


def _check_effects(spec: StudySpec, cells: Sequence[Cell]) -> None:
    """Parameters must change something for the architecture of every cell that has them."""
    for cell in cells:
        saes = cell.config.saes
        for name in cell.params:
            field = name.partition("@")[0].partition("[")[0]
            section, _, own = field.rpartition(".")
            reason = ""
            if section == "saes" and own in saes.without_effect:
                reason = f"for {saes.sae_type}: add 'when: {{sae_type: […]}}' with the architectures for which it does"
            elif field == "saes.sparsity_coeff" and saes.target_l0 is not None:
                reason = "beside 'saes.target_l0', which moves λ: vary one of them"
            elif section == "saes" and own in (idle := saes.idle()):
                reason = f"without {idle[own]}"
            elif field == "min_lr_factor" and cell.config.schedule == "constant":
                reason = "with 'lr_schedule: constant'"
            if reason:
                raise UserError(f"study {spec.name}: 'space.{name}': changes nothing {reason}")


def _check_hooks(spec: StudySpec, positions: Sequence[Sequence[str]]) -> None:
    """Objectives and per-hook fields must name hook points at which an SAE trains."""
    for objective in spec.objectives:
        wanted = objective.hook_points
        names = [] if wanted in ("mean", "all") else [wanted] if isinstance(wanted, str) else wanted
        for name in names:
            if not all(trains_at(name, among) for among in positions):
                raise UserError(
                    f"study {spec.name}: 'objectives': no SAE trains at {name} (saes.sae_positions:"
                    f" {', '.join(positions[0])})"
                )
    places = {f"space.{field}": field.partition("@")[2] for field in spec.space if "@" in field}
    places |= {f"base.saes.per_hook.{hook}": hook for hook in spec.base["saes"].get("per_hook") or {}}
    for place, hook in places.items():
        if positions and not any(trains_at(hook, among) for among in positions):
            raise UserError(f"study {spec.name}: '{place}': no SAE trains there: it would change nothing")


def trains_at(hook: str, positions: Iterable[str]) -> bool:
    """Whether names or patterns of hook points mean this one."""
    return any(hook == position or fnmatchcase(hook, position) for position in positions)
