"""Config models of a run and of a study; YAML in and out; overrides; SAE-Interpretability's field names."""

from saeopt.config.io import (
    apply_overrides,
    dump_yaml,
    load_run_config,
    read_yaml,
    recipe_notice,
    stored,
    told_of,
    validate_run,
)
from saeopt.config.keys import stream_key
from saeopt.config.run import DataConfig, RunConfig
from saeopt.config.saes import SAEConfig

__all__ = [
    "DataConfig",
    "RunConfig",
    "SAEConfig",
    "apply_overrides",
    "dump_yaml",
    "load_run_config",
    "read_yaml",
    "recipe_notice",
    "stored",
    "stream_key",
    "told_of",
    "validate_run",
]
