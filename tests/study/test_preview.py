"""`study create --dry-run`."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from saeopt.config.study import LARGEST_PACK
from saeopt.config.study_file import load_study_spec
from saeopt.trials.create import planned_cells
from saeopt.views.preview import packs_of

Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_a_dry_run_prints_cells_packs_memory_and_time_and_stores_nothing(
    cli: Cli, study_file: Path, tiny_model_dir: Path
) -> None:
    raw: dict[str, Any] = yaml.safe_load(study_file.read_text())
    raw["base"] |= {"tlens_model_name": None, "tlens_model_path": str(tiny_model_dir)}
    raw["space"]["data.n_train_samples"] = [500, 1000]
    study_file.write_text(yaml.safe_dump(raw))
    text = cli("create", study_file, "--dry-run").stdout
    assert "12 cells" in text
    assert "2 packs" in text
    assert "GiB" in text
    assert "12 trials" in text
    assert "no such store" in cli("list", code=2).stderr


def test_a_dry_run_without_the_model_still_shows_cells(cli: Cli, study_file: Path) -> None:
    text = cli("create", study_file, "--dry-run").stdout
    assert "6 cells" in text
    assert "memory and time: unknown" in text


def test_a_dry_run_refuses_what_create_refuses(cli: Cli, study_file: Path, tiny_model_dir: Path) -> None:
    raw: dict[str, Any] = yaml.safe_load(study_file.read_text())
    raw["base"] |= {"tlens_model_name": None, "tlens_model_path": str(tiny_model_dir)}
    raw["space"] = {"saes.target_l0": [2, 5000]}
    study_file.write_text(yaml.safe_dump(raw))
    told = [cli("create", study_file, *more, code=2).stderr.splitlines()[-1] for more in (["--dry-run"], [])]
    assert "target_l0=5000" in told[0]
    assert "5000 exceeds" in told[0]
    assert told[0] == told[1]


def test_a_pack_is_never_larger_than_a_worker_takes(study_file: Path) -> None:
    raw: dict[str, Any] = yaml.safe_load(study_file.read_text())
    raw["space"] = {"lr": [1e-3 * 1.01**i for i in range(70)]}
    study_file.write_text(yaml.safe_dump(raw))
    spec = load_study_spec(study_file)
    cells, _ = planned_cells(spec)
    assert [len(pack) for pack in packs_of(spec, cells, LARGEST_PACK)] == [64, 6]
    assert [len(pack) for pack in packs_of(spec.model_copy(update={"pack": 40}), cells, LARGEST_PACK)] == [40, 30]


def test_a_dry_run_folds_no_weights(cli: Cli, study_file: Path, tiny_model_dir: Path) -> None:
    raw: dict[str, Any] = yaml.safe_load(study_file.read_text())
    raw["base"] |= {"tlens_model_name": None, "tlens_model_path": str(tiny_model_dir), "lm_processing": "compatibility"}
    study_file.write_text(yaml.safe_dump(raw))
    assert "GiB" in cli("create", study_file, "--dry-run").stdout


def test_the_time_of_one_pass_over_unknown_data_is_unknown(cli: Cli, study_file: Path, tiny_model_dir: Path) -> None:
    raw: dict[str, Any] = yaml.safe_load(study_file.read_text())
    raw["base"] |= {"tlens_model_name": None, "tlens_model_path": str(tiny_model_dir), "lr_schedule": "constant"}
    del raw["base"]["data"]["n_train_samples"]
    study_file.write_text(yaml.safe_dump(raw))
    text = cli("create", study_file, "--dry-run").stdout
    assert "GiB" in text
    assert "time: unknown" in text
    assert "about 0" not in text


def test_cells_of_many_parameters_break_no_word_in_eighty_columns(
    cli: Cli, study_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw: dict[str, Any] = yaml.safe_load(study_file.read_text())
    raw["space"] |= {
        "saes.sae_type": ["relu", "gated_hard_concrete"],
        "saes.dict_size_to_input_ratio": [4, 8],
        "saes.sparsity_coeff@blocks.0.hook_resid_pre": [0.25],
        "adam_betas": [[0.9, 0.999]],
    }
    study_file.write_text(yaml.safe_dump(raw))
    monkeypatch.setattr("saeopt.console.console.width", 80)
    text = cli("create", study_file, "--dry-run").stdout
    words = "sae_type=gated_hard_concrete dict_size_to_input_ratio=4 sparsity_coeff@blocks.0.hook_resid_pre=0.25"
    for word in [*words.split(), "adam_betas=[0.9,0.999]"]:
        assert word in text
    assert max(map(len, text.splitlines())) <= 80
