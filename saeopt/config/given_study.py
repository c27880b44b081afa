"""The study that a command line means: a study file, or two configs; with changes to the base config."""

from __future__ import annotations

from pathlib import Path

from saeopt.config.io import changed, read_yaml, validate_run
from saeopt.config.study import StudySpec
from saeopt.config.study_file import study_spec, with_open_k, without_auto
from saeopt.config.sweep import sweep_spec
from saeopt.errors import UserError


def given_spec(
    file: Path | None,
    name: str | None,
    base_config: Path | None,
    sweep_config: Path | None,
    output_dir: str | None,
    max_trials: int | None,
) -> StudySpec:
    """The study of a study file, or of two configs. :class:`UserError` where it is neither."""
    if file is None:
        if base_config is None or sweep_config is None:
            raise UserError("STUDY_FILE is missing (or --base-config FILE and --sweep-config FILE)")
        return sweep_spec(base_config, sweep_config, name or base_config.stem, output_dir, max_trials)
    if base_config is not None or sweep_config is not None:
        raise UserError("create takes a study file or --base-config and --sweep-config, not both")
    raw = read_yaml(file)
    raw["name"] = name or (file.stem if raw.get("name") is None else raw["name"])
    if output_dir is not None:
        raw["output_dir"] = output_dir
    if max_trials is not None:
        raw["max_trials"] = max_trials
    return study_spec(raw, file)


def with_base(spec: StudySpec, overrides: list[str], source: Path | None) -> StudySpec:
    """The study with a changed base config."""
    raw = spec.model_dump(mode="json", by_alias=True)
    raw["early_stopping"] = spec.early_stopping.model_dump(mode="json", exclude_unset=True)
    if spec.older:
        del raw["base"]["recipe"]  # the file names none
    raw["base"] = changed(raw["base"], overrides)
    validate_run(with_open_k(without_auto(raw["base"])[0], raw["space"]), f"{source}: base", overrides)
    return study_spec(raw, str(source))
