"""What the files of a run folder are called, said once. Importing this imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from saeopt.config.io import STORED_NAME

CONFIG = STORED_NAME
METRICS_FILE = "metrics.jsonl"
EVALUATION = "evaluation.json"
STATUS = "status.json"
STATE = "state"
SEEDS = "seeds"
"""Of a run with several seeds: a folder with the weights of each but the first, and its config, as of a run alone."""
BEGUN_FROM = "begun_from.json"
"""Hook point → file, SHA-256 and key of the SAE that training began with, where it began with another run's."""
CURVES = "training_curves.png"
DENSITY = "feature_density.png"
EVALUATED = "evaluated"
"""Name of the conditions in a row of an evaluation."""
WEIGHTS_FILE = re.compile(r"samples_(\d+)\.safetensors")
SEED_FOLDER = re.compile(r"(\d+)")
STATE_FILE = re.compile(r"(\d+)\.safetensors")


def weights_path(run_dir: str | Path, samples: int) -> Path:
    """Where the weights after `samples` samples lie."""
    return Path(run_dir) / f"samples_{samples}.safetensors"


def state_path(run_dir: str | Path, samples: int) -> Path:
    """Where what resuming needs besides the weights lies."""
    return Path(run_dir) / STATE / f"{samples}.safetensors"
