from __future__ import annotations

from typing import Any

import pytest

from saeopt.config import validate_run
from saeopt.runs.naming import MAX_LENGTH, run_name


def config(saes: dict[str, Any] | None = None, **top: Any) -> Any:
    raw: dict[str, Any] = {
        "tlens_model_name": "roneneldan/TinyStories-1M",
        "data": {"dataset_name": "x", "n_train_samples": 100},
        "saes": {"sae_type": "relu", "sae_positions": "blocks.2.hook_resid_pre", **(saes or {})},
        **top,
    }
    return validate_run(raw, "test")


def test_name_holds_what_distinguishes_runs_of_a_sweep() -> None:
    base = run_name(config())
    assert base == "relu-TinyStories-1M-2.resid_pre-lambda1-lr0.001-x8-seed0"
    variants = [
        config(lr=3e-4), config(seed=1), config(max_grad_norm=None), config({"sparsity_coeff": 0.5}),
        config({"dict_size_to_input_ratio": 4}), config({"sae_positions": "blocks.3.hook_resid_pre"}),
        config({"name": "mine"}),
    ]  # fmt: skip
    names = [run_name(v) for v in variants]
    assert len({base, *names}) == 8


def test_equal_hook_kinds_are_written_once() -> None:
    positions = ["blocks.2.hook_resid_pre", "blocks.4.hook_resid_pre"]
    assert "-2+4.resid_pre-" in run_name(config({"sae_positions": positions}))


@pytest.mark.parametrize(
    "positions", [["blocks.*.hook_resid_pre"], [f"blocks.{i}.attn.hook_q/../x y" for i in range(40)], ["ln_final"]]
)
def test_name_is_a_safe_folder_name_of_bounded_length(positions: list[str]) -> None:
    name = run_name(config({"sae_positions": positions, "name": "ü/" * 80}))
    assert len(name) <= MAX_LENGTH
    assert not set(name) & set('/\\ *:?"<>|')
    assert not name.startswith((".", "-"))
    assert name.endswith("seed0")


def test_given_name_wins_but_stays_inside_the_save_folder() -> None:
    assert run_name(config(wandb_run_name="../../etc/x")) == "etc-x"
    assert run_name(config(wandb_run_name="..")) == "run"
