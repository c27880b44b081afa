"""Configs of tiny runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saeopt.config import RunConfig, apply_overrides, validate_run

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def make_config(tiny_model_dir: Path, tiny_text: Path, tmp_path: Path) -> MakeConfig:
    """`make_config(**{"saes.sae_type": "gated", …})`: the tiny model on 256 samples in 16 windows."""
    base: dict[str, Any] = {
        "tlens_model_path": str(tiny_model_dir),
        "save_dir": str(tmp_path / "output"),
        "lr": 3e-3,
        "warmup_samples": 32,
        "gradient_accumulation_steps": 2,
        "log_every_n_grad_steps": 4,
        "save_every_n_samples": 64,
        "threads": 1,
        "data": {
            "dataset_name": str(tiny_text),
            "is_tokenized": False,
            "column_name": "text",
            "streaming": False,
            "context_length": 16,
            "n_train_samples": 256,
            "n_eval_samples": 20,
            "train_batch_size": 8,
            "eval_batch_size": 10,
        },
        "saes": {
            "sae_type": "relu",
            "sae_positions": ["blocks.1.hook_resid_pre"],
            "dict_size_to_input_ratio": 4,
            "sparsity_coeff": 0.2,
        },
    }

    def make(**changes: Any) -> RunConfig:
        return validate_run(apply_overrides(base, changes), "the test's config")

    return make
