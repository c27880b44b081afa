"""Studies that cannot give a result are refused when they are created: one line, exit code 2, no store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from saeopt.config.study_file import study_spec
from saeopt.trials.create import planned_cells

HOOK = "blocks.1.hook_resid_pre"
GRID: dict[str, Any] = {"saes.sparsity_coeff": [0.1, 0.2]}


@pytest.fixture
def base(tiny_model_dir: Path, tiny_text: Path) -> dict[str, Any]:
    return {
        "recipe": 2, "legacy_scaling": False, "tlens_model_path": str(tiny_model_dir),
        "data": {
            "dataset_name": str(tiny_text), "is_tokenized": False, "column_name": "text", "context_length": 16,
            "n_train_samples": 64, "n_eval_samples": 8, "train_batch_size": 8,
        },
        "saes": {"sae_type": "relu", "sae_positions": [HOOK], "dict_size_to_input_ratio": 4},
    }  # fmt: skip


TOPK = {"saes.sae_type": ["topk"]}
RANGE = {"low": 0.1, "high": 1.0}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "objective": ({"objectives": [{"metric": "fvu", "hook_points": "blocks.0.hook_resid_pre"}]}, "no SAE trains at"),
    "k above h": ({"space": {**TOPK, "saes.k": [8, 65]}}, "'saes.k': 65 exceeds the dictionary's 64 latents"),
    "k of nothing": (
        {"space": {"sae_type": ["batch_topk"], "saes.k": [1e-4, 8]}}, "'saes.k': 0.0001 per token selects nothing in a",
    ),
    "k of nothing, sampled": (
        {"space": {"sae_type": ["batch_topk"], "saes.k": {"low": 1e-4, "high": 8, "log": True}}, "max_trials": 9,
         "sampler": "random"}, "'saes.k': 0.0001 per token selects nothing in a",
    ),
    "targets between whole numbers": (
        {"space": {"sae_type": ["batch_topk", "topk"], "saes.target_l0": {"low": 8, "high": 64}}, "sampler": "random",
         "max_trials": 9}, "'saes.target_l0': is k for topk, whole numbers only: add 'int: true' to the range",
    ),
    "k between whole numbers": (
        {"space": {"sae_type": ["batch_topk", "topk"], "saes.k": {"low": 8, "high": 64}}, "sampler": "random",
         "max_trials": 9}, "'saes.k': whole numbers only: add 'int: true' to the range",
    ),
    "small ratio": ({"space": {**TOPK, "saes.dict_size_to_input_ratio": [4, 1]}}, "'saes.k': 32 exceeds"),
    "model": ({"base": {"tlens_model_path": "/absent"}}, "'tlens_model_path': /absent: no such folder (--elsewhere"),
    "data": ({"base": {"data": {"dataset_name": "absent.jsonl"}}}, "no such file or folder (--elsewhere"),
    "data glob": ({"base": {"data": {"dataset_name": "*.absent"}}}, "'data.dataset_name': *.absent"),
    "hook point": ({"base": {"saes": {"sae_positions": ["blocks.7.hook_resid_pre"]}}}, "no hook point 'blocks.7"),
    "hook glob": ({"base": {"saes": {"sae_positions": ["blocks.7.*"]}}}, "no hook point 'blocks.7.*'"),
    "per hook": ({"space": {"saes.sparsity_coeff@blocks.0.hook_resid_pre": [1, 2]}}, "no SAE trains there"),
    "save_dir": ({"space": {**GRID, "save_dir": ["a", "b"]}}, "'space.save_dir': changes no result"),
    "wandb_run_name": ({"space": {**GRID, "wandb_run_name": ["a", "b"]}}, "changes no result"),
    "both names": ({"space": {"sae_type": ["relu"], "saes.sae_type": ["gated"]}}, "are the same field"),
    "step": ({"space": {"lr": {**RANGE, "step": 2}}}, "'step' (2) is larger than the range, 0.1 to 1"),
    "cmaes": ({"space": GRID, "sampler": "cmaes", "max_trials": 3, "objectives": ["fvu"]}, "needs a range"),
    "heartbeat short": ({"heartbeat": 1e-9}, "'heartbeat'"),
    "heartbeat long": ({"heartbeat": 1e9, "grace": 1e10}, "'heartbeat'"),
    "no effect": ({"base": {"saes": {"sae_type": "hard_concrete", "final_beta": 0.1}}}, "has no effect"),
    "final beta": (
        {"base": {"saes": {"sae_type": "hard_concrete"}}, "space": {"saes.final_beta": [0.1, 0.2]}}, "changes nothing",
    ),
    "lowest lr": ({"base": {"lr_schedule": "constant"}, "space": {"min_lr_factor": [0.1, 0.2]}}, "changes nothing"),
    "topk lambda": ({"space": {**TOPK, **GRID, "saes.k": [8]}}, "sparsity_coeff': changes nothing for topk"),
    "saes.name": ({"space": {**GRID, "saes.name": ["a", "b"]}}, "changes no result"),
    "threads": ({"space": {**GRID, "threads": [1, 2]}}, "changes no result"),
    "base per hook": ({"base": {"saes": {"per_hook": {"blocks.0.hook_resid_pre": {"lr": 1}}}}}, "per_hook"),
    "base other hook": (
        {"base": {"saes": {"per_hook": {"blocks.0.hook_resid_pre": {"sparsity_coeff": 1}}}}}, "no SAE trains there",
    ),
    "pretrained": ({"base": {"saes": {"pretrained_sae_paths": ["/absent"]}}}, "'saes.pretrained_sae_paths': /absent"),
    "pretrained no SAE": (
        {"base": {"saes": {"pretrained_sae_paths": [str(Path(__file__).parent)]}}}, "holds no SAE that is known here",
    ),
    "tokenizer": ({"base": {"data": {"tokenizer_name": "/absent"}}}, "'data.tokenizer_name': /absent"),
    "objective nowhere": ({"objectives": [{"metric": "fvu", "hook_points": []}]}, "objectives.0.hook_points"),
    "objective twice": ({"objectives": ["fvu", "fvu"]}, "is given twice"),
    "all collapsed": ({"early_stopping": {"collapse": {"min_l0": 65}}}, "exceeds the 64 latents"),
    "all collapsed topk": (
        {"space": {**TOPK, "saes.k": [8]}, "early_stopping": {"collapse": {"min_l0": 9}}}, "exceeds the 8 latents",
    ),
    "steps of no whole": ({"space": {"seed": {"low": 1, "high": 9, "int": True, "step": 0.3}}}, "needs whole numbers"),
    "cells without end": ({"space": {"lr": RANGE}, "sampler": "random", "max_trials": 10**7}, "at most 100,000 trials"),
    "trials without end": ({"max_trials": 10**30}, "'max_trials'"),
    "stall": ({"stall": 1e-9}, "'stall'"),
    "weight": ({"objectives": [{"metric": "fvu", "target_l0": 5, "l0_weight": 1e300}]}, "l0_weight"),
    "name": ({"name": 0}, "'name'"),
    "output_dir": ({"output_dir": "a\0b"}, "'output_dir': must not hold control characters"),
    "base file": ({"base": "\0"}, "cannot be read"),
    "too many cells": ({"space": {"lr": {"low": 0.1, "high": 0.9, "step": 1e-9}}}, "more than 100,000 cells"),
}  # fmt: skip


def merged(raw: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {**raw, **{k: merged(raw[k], v) if isinstance(raw.get(k), dict) else v for k, v in changes.items()}}


@pytest.mark.parametrize("name", list(REFUSED))
def test_it_is_refused_with_one_line(name: str, base: dict[str, Any], tmp_path: Path, cli: Any) -> None:
    changes, wanted = REFUSED[name]
    changed = changes.get("base", {})
    raw = {"space": GRID, **changes, "base": merged(base, changed) if isinstance(changed, dict) else changed}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(raw))
    done = cli("create", path, code=2)
    assert wanted in " ".join(done.stderr.split()), done.stderr
    assert done.stderr.count("saeopt: error:") == 1
    assert not (tmp_path / "store.db").exists()


@pytest.mark.parametrize(("file", "tokens"), [("a.txt", True), ("a.npy", False)])
def test_a_file_whose_name_says_what_it_holds_must_hold_that(
    file: str, tokens: bool, base: dict[str, Any], tmp_path: Path, cli: Any
) -> None:
    (tmp_path / file).write_text("Once upon a time")
    data = {"dataset_name": str(tmp_path / file), "is_tokenized": tokens}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"base": merged(base, {"data": data}), "space": GRID}))
    holds = "text, not token ids: set it to false" if tokens else "token ids, not text: set it to true"
    assert f"'data.is_tokenized': {tmp_path / file} holds {holds}" in cli("create", path, code=2).stderr


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(("row", "tokens"), [("Once upon", True), ([1, 2], False)])
def test_the_first_row_must_be_what_is_tokenized_says(
    suffix: str, row: Any, tokens: bool, base: dict[str, Any], tmp_path: Path, cli: Any
) -> None:
    file = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"text": [row], "more": [1]}), file)
    else:
        file.write_text(json.dumps({"text": row, "more": 1}) + "\n")
    path = tmp_path / "study.yaml"
    for given in (tokens, not tokens):
        data = {"dataset_name": str(file), "is_tokenized": given, "column_name": "text"}
        path.write_text(yaml.safe_dump({"base": merged(base, {"data": data}), "space": GRID}))
        done = cli("create", path, code=2 if given is tokens else 0)
        assert (f"'data.is_tokenized': column 'text' of {file} holds " in done.stderr) is (given is tokens)


def test_a_dry_run_prints_nothing_of_what_is_refused(base: dict[str, Any], tmp_path: Path, cli: Any) -> None:
    path = tmp_path / "study.yaml"
    space = {"lr": {"low": 1e-4, "high": 1e-2}}
    raw = {"base": base, "space": space, "sampler": "tpe", "max_trials": 9, "objectives": ["l0", "fvu"]}
    path.write_text(yaml.safe_dump({**raw, "early_stopping": {"type": "halving", "keep": 1}}))
    done = cli("create", path, "--dry-run", code=2)
    assert done.stdout == ""
    assert "'keep' is 1: everybody goes on" in done.stderr


@pytest.mark.parametrize("more", [{"int": True, "log": True}, {"step": 8}])
def test_targets_of_whole_numbers_are_taken_by_all_architectures(
    more: dict[str, Any], base: dict[str, Any], tmp_path: Path, cli: Any
) -> None:
    space = {"sae_type": ["relu", "topk"], "saes.target_l0": {"low": 8, "high": 64, **more}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"base": base, "space": space, "sampler": "random", "max_trials": 9}))
    cli("create", path)


def test_what_lies_on_the_workers_hosts_is_not_looked_for(base: dict[str, Any], tmp_path: Path, cli: Any) -> None:
    absent = {"tlens_model_path": "/absent", "data": {"dataset_name": "absent.jsonl"}}
    raw = {"base": merged(base, absent), "space": GRID}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(raw))
    cli("create", path, "--elsewhere")


@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_of_a_huge_space_no_more_cells_are_made_than_are_asked_for(base: dict[str, Any], sampler: str) -> None:
    space = {f"saes.{name}": {"low": 1, "high": 10**6, "step": 1} for name in ("sparsity_coeff", "mse_coeff")}
    space["saes.dict_size_to_input_ratio"] = {"low": 1, "high": 60_000, "step": 0.5}
    spec = study_spec({"name": "s", "base": base, "space": space, "sampler": sampler, "max_trials": 5}, "s.yaml")
    cells, proposed = planned_cells(spec)
    assert len(cells) + proposed == 5
    if sampler == "grid":
        ratio, rest = "saes.dict_size_to_input_ratio", {"saes.sparsity_coeff": 1.0}
        assert [c.params for c in cells] == [{ratio: 1.0, **rest, "saes.mse_coeff": 1.0 + i} for i in range(5)]


def test_cells_of_a_conditional_grid_come_slowest_parameter_first(base: dict[str, Any]) -> None:
    space = {
        "lr": [1, 2],
        "sae_type": ["relu", "topk"],
        "saes.k": {"low": 1, "high": 2, "int": True, "when": {"sae_type": "topk"}},
        "data.seed": {"low": 5, "high": 6, "int": True, "when": {"sae_type": "relu"}},  # before its parent in the queue
    }
    cells = planned_cells(study_spec({"name": "s", "base": base, "space": space}, "s.yaml"))[0]
    rows = [tuple(c.params.get(n) for n in ("data.seed", "saes.sae_type", "saes.k", "lr")) for c in cells]
    topk = [(None, "topk", k, lr) for k in (1, 2) for lr in (1, 2)]
    assert rows == topk + [(seed, "relu", None, lr) for seed in (5, 6) for lr in (1, 2)]
