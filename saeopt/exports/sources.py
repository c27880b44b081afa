"""Which SAEs leave, where their weights lie, and what is known of them: of a run folder, or of trials of a study."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from saeopt.config.places import without_folders
from saeopt.config.roles import REPORTING
from saeopt.console import log
from saeopt.errors import UserError
from saeopt.exports.formats import About
from saeopt.files import is_evaluation, read_metrics, read_sections
from saeopt.runs.folder import RunFolder
from saeopt.runs.names import EVALUATION, METRICS_FILE, SEEDS

if TYPE_CHECKING:
    from saeopt.runs.weights import Checkpoint
    from saeopt.saes.base import SAE
    from saeopt.trials.storage import Store

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Leaving:
    """An SAE that is to leave."""

    about: About
    sae: SAE


@dataclass(frozen=True)
class Wanted:
    """A run whose SAEs are to leave: those of the sites named, or all."""

    run_dir: Path
    """Or a weights file."""
    name: str
    trial: int | None = None
    keys: tuple[str, ...] | None = None


def of_study(store: Store, study: str, trials: Sequence[int] | None, site: str | None) -> list[Wanted]:
    """The trials named, each with all its sites; without names the Pareto front of each site.

    Raises:
        UserError: no such study, trial or site, none on the front, or weights that are not on this host.
    """
    from saeopt.trials.attributes import not_found
    from saeopt.views import best

    points, known = best.load_points(store, study)
    points = best.chosen(points, site)
    if trials:
        if missing := [number for number in trials if f"#{number}" not in known]:
            ended = (label[1:] for label in known)
            raise not_found(f"trial of study '{study}' that was trained to its end", str(missing[0]), ended)
        chosen = [(int(p.label[1:]), p.hook_point) for p in points if int(p.label[1:]) in trials]
    else:
        chosen = [(int(p.label[1:]), found.hook_point) for found in best.find_best(points) for p in found.front]
    if not chosen:
        raise UserError(f"study '{study}': there is no SAE to export: all have collapsed or violate a constraint")
    keys: dict[int, tuple[str, ...]] = {}
    for number, key in chosen:
        keys[number] = (*keys.get(number, ()), key)
    lost = [number for number in keys if known[f"#{number}"].weights is None]
    if lost:
        where = known[f"#{lost[0]}"].run_dir
        more = f", nor do those of {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(f"{where}: the weights of trial {lost[0]} do not lie on this host{more}")
    return [Wanted(known[f"#{n}"].run_dir, f"study {study}, trial {n}", n, keys[n]) for n in sorted(keys)]


def of_run(run_dir: Path, site: str | None) -> list[Wanted]:
    """A run folder's or weights file's SAEs."""
    name = (run_dir.parent if run_dir.is_file() else run_dir).absolute().name
    return [Wanted(run_dir, f"run {name}", keys=None if site is None else (site,))]


def leaving(wanted: Iterable[Wanted], checkpoint: int | None, seed: int | None) -> Iterator[Leaving]:
    """Each SAE with what is known of it; those of one run are in memory at a time.

    Raises:
        UserError: no such checkpoint, seed or site.
    """
    from saeopt.runs.weights import load_checkpoint
    from saeopt.trials.attributes import not_found

    for one in wanted:
        loaded = load_checkpoint(one.run_dir, checkpoint, "cpu", seed)
        for key in one.keys or loaded.saes:
            if key not in loaded.saes:
                raise not_found(f"site of {one.name}", key, loaded.saes)
            yield Leaving(_about(one, key, loaded), loaded.saes[key])


def _about(one: Wanted, key: str, loaded: Checkpoint) -> About:
    config, data = loaded.config, loaded.config.data
    public = without_folders(config.model_dump(mode="json", exclude=set(REPORTING) - {"as_typed"}))
    section = public["data"]
    data_name, model = section.get("dataset_name") or section.get("activations") or "", config.tlens_model_name
    kept = not loaded.saes[key].config.retrain_saes
    hub = data_name if _HUB_NAME.fullmatch(data_name) and not os.path.exists(data_name) else None
    return About(
        site=config.saes.site(key),
        model=model or os.path.basename(public.get("tlens_model_path") or "") or None,
        hub_model=model,
        tokenizer=section.get("tokenizer_name"),
        dataset=hub or os.path.basename(data_name),
        hub_dataset=None if kept else hub,
        context_size=data.context_length,
        prepend_bos=data.prepend_bos,
        masks_special_tokens=data.mask_special_tokens,
        skip_first_positions=data.skip_first_positions,
        compatibility=config.lm_processing == "compatibility",
        metrics=_metrics(loaded, key),
        config=yaml.safe_dump(public, sort_keys=False, allow_unicode=True),
        command="saeopt train config.yaml",
        name=one.name,
        trial=one.trial,
        seed=config.seed,
        samples=None if kept else loaded.samples,
        kept=kept,
    )


def _metrics(loaded: Checkpoint, key: str) -> dict[str, float]:
    """The evaluation of these weights by their run; empty where there is none."""
    folder = loaded.path.parent
    seed = str(loaded.config.seed)
    whole = RunFolder(folder.parents[1] if folder.parent.name == SEEDS else folder)
    newest = (RunFolder(folder).weights() or [loaded.samples])[0]
    try:
        row = read_sections(whole.path / EVALUATION).get(key, {}) if loaded.samples >= newest else {}
    except (OSError, ValueError):
        row = {}
    if loaded.samples < newest:
        row = _logged(whole.path / METRICS_FILE, key, loaded.samples)
    row = row.get(SEEDS, {}).get(seed, row)
    numbers = {name: v for name, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    found = {name: float(v) for name, v in numbers.items() if math.isfinite(v)}
    if not found:
        log.warning("%s: %s has no evaluation: its card has no metrics", folder, key)
    return found


def _logged(path: Path, key: str, samples: int) -> dict[str, Any]:
    """The evaluation at a number of samples, from `metrics.jsonl`."""
    rows = [r for r in read_metrics(path) if r["samples"] == samples and r["hook_point"] == key and is_evaluation(r)]
    return {name.removeprefix("eval_"): value for row in rows[-1:] for name, value in row.items() if "eval_" in name}
