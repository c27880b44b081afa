"""What a study names must be there: model, hook points, data, dictionaries that hold k latents. Reads no weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeopt.activations.documents import check_column
from saeopt.activations.local_files import check_sources, local_files
from saeopt.config.normalise import FEWEST
from saeopt.config.places import site_and_place
from saeopt.config.starts import Found
from saeopt.config.study import AUTO, TARGET, StudySpec
from saeopt.errors import UserError
from saeopt.imports.trees import is_hub
from saeopt.metrics import METRICS
from saeopt.runs.tensor_file import by_site, read_metadata, tensor_shapes
from saeopt.search.sensible import check_refined
from saeopt.search.signs import first_targets
from saeopt.search.space import Space
from saeopt.search.starts import numbers
from saeopt.training.dry_run import blank_saes, shapes, weightless

if TYPE_CHECKING:
    from saeopt.activations.source import Source
    from saeopt.config.run import DataConfig, RunConfig
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
            if (members := reached(config, models)) is None:
                continue
            _check_objectives(spec, [m.hook_point for m in members])
            _check_metrics(spec, config)
            _check_collapse(spec, members)
        except UserError as error:
            values = ", ".join(f"{k}={v}" for k, v in cell.params.items())
            hint = "" if "no such" not in str(error) else " (--elsewhere: it lies on the workers' hosts)"
            raise UserError(f"study {spec.name}: {values or 'base'}: {error}{hint}") from None


def reached(config: RunConfig, models: dict[object, Source] | None = None) -> list[MemberShape] | None:
    """The SAEs that a run would train; None where the model is one of the hub.

    Raises:
        UserError: data, tokenizer, hook points or weights are not there, or do not fit.
    """
    check_sources(config.data)
    _check_first_row(config.data)
    _check_folders(config)
    if config.tlens_model_path is None and config.data.activations is None:
        return None
    return shapes(config, _model(config, {} if models is None else models))


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


def with_fitting_weights(spec: StudySpec, *, elsewhere: bool = False) -> tuple[StudySpec, list[str]]:
    """The spec without those weights of `start_from` that do not fit their trials here, and a line about them.

    Raises:
        UserError: the model's width is not known here, or a weights file is damaged.
    """
    asked = spec.start_from
    if asked is None or not any(one.weights for one in asked.found or []):
        return spec, []
    where = f"study {spec.name}: 'start_from.from_weights'"
    if elsewhere:
        raise UserError(f"{where}: needs model and weights on this host, which --elsewhere says are not here")
    space = Space(spec)
    kept: list[Found] = []
    reasons: dict[int, str] = {}
    models: dict[object, Source] = {}
    for one in asked.found or []:
        try:
            reason = one.weights and misfit(space.config(one.params), Path(one.weights.file), models)
        except UserError as error:
            raise UserError(f"{where}: trial {one.trial}: {error}") from None
        if reason:
            reasons[one.trial] = reason
        kept.append(one.model_copy(update={"weights": None}) if reason else one)
    line = f"{len(kept) - len(reasons)} of {len(kept)} start from the weights of those trials"
    if reasons:
        line += f"; {numbers(list(reasons))} from new ones: {'; '.join(list(dict.fromkeys(reasons.values()))[:3])}"
    return spec.model_copy(update={"start_from": asked.model_copy(update={"found": kept})}), [line]


def misfit(config: RunConfig, file: Path, models: dict[object, Source]) -> str | None:
    """Why the SAEs of a weights file cannot be those that a run of this config starts from; None: they can."""
    held = by_site(tensor_shapes(file))
    described: Any = read_metadata(file).get("hook_points")
    for site, sae in blank_saes(config, _model(config, models)):
        there, own = held.get(site.key), {name: tuple(t.shape) for name, t in sae.state_dict().items()}
        if there is None:
            return f"no SAE at {site.key} (but at {', '.join(held)})"
        if (kind := described[site.key]["sae_type"]) != sae.config.sae_type:
            return f"{kind} is not {sae.config.sae_type}"
        for name in {**own, **there}:
            if there.get(name) != own.get(name):
                was, now = ("×".join(map(str, shape)) if shape else "no" for shape in (there.get(name), own.get(name)))
                return f"{was} {name}, here {now}"
    return None


def _model(config: RunConfig, models: dict[object, Source]) -> Source:
    """The language model without its weights, made once."""
    place = (config.model, str(config.data.activations), config.data.context_length, tuple(config.saes.hooks))
    if place not in models:
        models[place] = weightless(config)[0]
    return models[place]


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


def _check_first_row(data: DataConfig) -> None:
    """Refuse a column of local JSON lines or Parquet that holds text where ids are meant, or ids for text. What cannot
    be read is left to the workers."""
    files = [] if data.activations is not None else local_files(data.dataset_name, data.split.partition("[")[0])
    row: Any = None
    try:
        if files and files[0].suffix.lower() in (".jsonl", ".ndjson"):
            with files[0].open(encoding="utf-8") as lines:
                row = json.loads(next(lines, "{}"))
        elif files and files[0].suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            row = next((b.to_pylist()[0] for b in pq.ParquetFile(files[0]).iter_batches(1)), None)
    except (OSError, ValueError):  # pyarrow's are among them
        return
    if isinstance(row, dict) and row.get(data.column_name) is not None:
        check_column(data, row[data.column_name])


def _check_folders(config: RunConfig) -> None:
    """Refuse a tokenizer or pretrained SAEs that are named by a path and not there."""
    tokenizer = config.data.tokenizer_name or ""
    places = [("saes.pretrained_sae_paths", path) for path in config.saes.pretrained_sae_paths or []]
    if Path(tokenizer).is_absolute() or tokenizer[:1] in (".", "~"):  # else it may be one of the hub
        places.append(("data.tokenizer_name", tokenizer))
    for field, text in places:
        _, path = site_and_place(text)
        if field == "saes.pretrained_sae_paths" and is_hub(path):
            continue  # the workers download it
        if not Path(path).exists():
            raise UserError(f"'{field}': {path}: no such file or folder")
        if field == "saes.pretrained_sae_paths":
            _check_foreign(field, path)


def _check_foreign(field: str, path: str) -> None:
    """Another tool's SAEs must be readable, as far as their configs tell."""
    from saeopt.imports.find import find, is_foreign

    if is_foreign(Path(path)):
        try:
            find(path)
        except UserError as error:
            raise UserError(f"'{field}': {error}") from None


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
    for name in spec.constraints:
        if config.data.activations is not None and name in ("kl", *CROSS_ENTROPIES):
            raise UserError(f"'constraints': '{name}' needs a language model, not 'data.activations'")


def _check_collapse(spec: StudySpec, members: Sequence[MemberShape]) -> None:
    """A rule that takes every dictionary for collapsed leaves no trial."""
    rule = spec.early_stopping.collapse
    most = max(m.k or m.h for m in members)
    if rule is not None and rule.min_l0 > most:
        raise UserError(
            f"'early_stopping.collapse.min_l0' ({rule.min_l0:g}) exceeds the {most} latents that may be active:"
            " every trial would count as collapsed"
        )
