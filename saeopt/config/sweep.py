"""SAE-Interpretability's sweep files (docs/glossary.md) as studies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saeopt.config.base import nearest
from saeopt.config.fields import field_names
from saeopt.config.io import read_run_yaml, read_yaml
from saeopt.config.study import StudySpec
from saeopt.config.study_file import study_spec
from saeopt.errors import UserError

_PLURALS = {
    "learning_rate": "lr",
    "learning_rates": "lr",
    "lrs": "lr",
    "dict_size_ratio": "saes.dict_size_to_input_ratio",
    "dict_size_ratios": "saes.dict_size_to_input_ratio",
    "hook_points": "saes.sae_positions",
}
_COMMANDS = {"max_experiments", "sae_specific"}


def sweep_spec(
    base_config: str | Path,
    sweep_config: str | Path,
    name: str,
    output_dir: str | None = None,
    max_trials: int | None = None,
    overrides: dict[str, Any] | None = None,
) -> StudySpec:
    """A grid study from the pair of files; `max_trials` goes before the sweep's `max_experiments`."""
    base, sweep = read_run_yaml(base_config), read_yaml(sweep_config)
    saes = base.get("saes")
    sae_type = saes.get("sae_type") if isinstance(saes, dict) else None
    if not isinstance(sae_type, str):
        raise UserError(f"{base_config}: 'saes.sae_type' is missing")
    specific = sweep.get("sae_specific") or {}
    if not isinstance(specific, dict):
        raise UserError(f"{sweep_config}: 'sae_specific' must hold 'field: [values]' pairs")
    space: dict[str, Any] = {}
    for section, entries in ((False, sweep), (True, specific)):
        for key, values in entries.items():
            if not section and key in _COMMANDS:
                continue
            field = field_of(str(key), sae_type, section, str(sweep_config))
            if field in space:
                raise UserError(f"{sweep_config}: '{key}' names '{field}' a second time")
            space[field] = {"values": values if isinstance(values, list) else [values]}
    raw: dict[str, Any] = {"name": name, "base": base, "space": space, "output_dir": output_dir}
    raw["max_trials"] = max_trials if max_trials is not None else sweep.get("max_experiments")
    return study_spec({**raw, **(overrides or {})}, sweep_config)


def field_of(key: str, sae_type: str, sae_specific: bool, source: str) -> str:
    """The dotted field that a key of a sweep means: singular or plural, with or without its section."""
    known = field_names(sae_type)
    singulars = [key, *([key[:-1]] if key.endswith("s") else []), *([key[:-2]] if key.endswith("es") else [])]
    sections = ("saes.",) if sae_specific else ("", "data.", "saes.")
    for candidate in [_PLURALS.get(key, key), *singulars]:
        for section in sections:
            if section + candidate in known:
                return section + candidate
        if candidate in known and not sae_specific:
            return candidate
    names = [n.rpartition(".")[2] for n in known if n.startswith("saes.") or not sae_specific]
    where = "sae_specific." if sae_specific else ""
    raise UserError(f"{source}: unknown key '{where}{key}'{nearest(key, names)}")
