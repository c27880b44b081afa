"""The study that is tabulated: its space, and the cells of it that lie in a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from saeopt.config.study import StudySpec
from saeopt.config.study_file import study_spec
from saeopt.search.space import Cell, Space

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = REPOSITORY / "configs" / "stories260k" / "stories260k-relu.yaml"
LAMBDAS = {
    "relu": [0.14, 0.23, 0.38, 0.63, 1.0, 1.7],
    "jumprelu": [0.015, 0.035, 0.08, 0.18, 0.42, 0.97],
}
"""λ, normalised units: what each architecture's own rule gives for L0 64, 32, 16, 8, 4 and 2 at d = 64."""
SAE_TYPES = [*LAMBDAS, "topk"]
K = [64, 32, 16, 8, 4, 2]
LR = [5e-4, 2e-3, 5e-3, 1.5e-2]
RATIOS, SMALL_RATIOS = [8, 16, 32], [2, 4, 8]
"""Widths (h / d) of the study, and those of the study at a quarter of the width, from which one may start."""
SEEDS = [0, 1]
WIDTH = 64
"""d of stories260K."""


def base(shared: Path, samples: int, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The config of every cell: stories260K, layer 2, as in configs/stories260k, with the newest recipe."""
    config: dict[str, Any] = yaml.safe_load(SOURCE.read_text(encoding="utf-8"))
    for name in ("wandb_tags", "legacy_scaling"):
        config.pop(name)
    config |= {"recipe": 3, "save_every_n_samples": 0, "warmup_samples": min(100, samples // 20)}
    config["tlens_model_path"] = str(shared / "models" / "stories260K")
    config["data"] |= {
        "dataset_name": str(shared / "data" / "tinystories-1000" / "tinystories_1000.txt"),
        "n_train_samples": samples,
        "seed": 0,
    }
    for name in ("name", "sparsity_coeff"):
        config["saes"].pop(name)
    return config | (changes or {})


def table_spec(config: dict[str, Any], ratios: list[int], **fields: Any) -> StudySpec:
    """The study over architecture, λ or k, learning rate and width."""
    space = {
        "sae_type": SAE_TYPES,
        "saes.sparsity_coeff": [{"values": lambdas, "when": {"sae_type": name}} for name, lambdas in LAMBDAS.items()],
        "saes.k": {"values": K, "when": {"sae_type": "topk"}},
        "lr": LR,
        "saes.dict_size_to_input_ratio": ratios,
    }
    return study_spec(
        {
            "name": "table",
            "base": config,
            "space": space,
            "objectives": [{"metric": "l0"}, {"metric": "fvu"}],
            "early_stopping": "none",
            **fields,
        },
        SOURCE,
    )


def cells(config: dict[str, Any], ratio: int) -> list[Cell]:
    """The cells of one width, of both seeds."""
    return [cell for seed in SEEDS for cell in Space(table_spec(config | {"seed": seed}, [ratio])).grid()]


def sae_of(config: Any) -> dict[str, Any]:
    """What tells a cell from the others: the columns of the table."""
    saes = config.saes
    return {
        "seed": config.seed,
        "sae_type": saes.sae_type,
        "sparsity": float(saes.k if saes.sae_type == "topk" else saes.sparsity_coeff),
        "lr": float(config.lr),
        "ratio": float(saes.dict_size_to_input_ratio),
    }
