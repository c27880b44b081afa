"""What a study names must be there: model, hook points, data, dictionaries that hold k latents. Reads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from saeopt.activations.local_files import check_sources
from saeopt.config.study import StudySpec
from saeopt.errors import UserError
from saeopt.training.dry_run import shapes, weightless

if TYPE_CHECKING:
    from saeopt.activations.language_model import LanguageModel
    from saeopt.search.space import Cell


def check_reach(spec: StudySpec, cells: Sequence[Cell]) -> None:
    """Refuse cells that could not be trained from what lies on this host.

    Names of the hub are left to the workers: another host may have what is not in reach here.

    Raises:
        UserError: naming the study, the cell's values and the field.
    """
    models: dict[object, LanguageModel] = {}
    seen: set[str] = set()
    for cell in cells:
        config = cell.config
        data, saes = config.data.model_dump_json(), config.saes.model_dump_json(exclude={"sparsity_coeff"})
        if (key := f"{config.model} {data} {saes}") in seen:
            continue
        seen.add(key)
        try:
            check_sources(config.data)
            if config.tlens_model_path is None:
                continue
            place = (config.model, config.data.context_length, tuple(config.saes.sae_positions))
            if place not in models:
                models[place] = weightless(config)[0]
            _check_objectives(spec, [m.hook_point for m in shapes(config, models[place])])
        except UserError as error:
            values = ", ".join(f"{k}={v}" for k, v in cell.params.items())
            hint = "" if "no such" not in str(error) else " (--elsewhere: it lies on the workers' hosts)"
            raise UserError(f"study {spec.name}: {values or 'base'}: {error}{hint}") from None


def _check_objectives(spec: StudySpec, hooks: Sequence[str]) -> None:
    for objective in spec.objectives:
        wanted = objective.hook_points
        names = [] if wanted in ("mean", "all") else [wanted] if isinstance(wanted, str) else wanted
        absent = [name for name in names if name not in hooks]
        if absent:
            raise UserError(f"'objectives': no SAE trains at {absent[0]} (but at {', '.join(hooks)})")
