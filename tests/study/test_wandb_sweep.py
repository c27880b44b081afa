"""A study as W&B sweeps: what W&B can hold is right and runs anywhere, what it cannot is refused in one line."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from saeopt.config import load_run_config
from saeopt.config.study import StudySpec
from saeopt.config.study_file import study_spec
from saeopt.errors import UserError
from saeopt.search.space import Space
from saeopt.training.loggers import with_means
from saeopt.views.wandb_sweep import export_wandb_sweep

ONE = [{"metric": "fvu"}]
LR = {"low": 1e-4, "high": 1e-2, "log": True}


@pytest.fixture
def spec(base_config: dict[str, Any]) -> Callable[..., StudySpec]:
    def make(**fields: Any) -> StudySpec:
        raw = {"name": "s", "base": base_config, "space": {"lr": [1e-3, 1e-2]}, **fields}
        return study_spec(raw, "s.yaml")

    return make


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def test_the_metric_is_one_that_runs_log(spec: Callable[..., StudySpec], tmp_path: Path) -> None:
    hook = "blocks.1.hook_resid_pre"
    row = {"eval_fvu": 0.2, "eval_l0": 4.0}
    logged = with_means({hook: row, "blocks.0.hook_resid_pre": {"eval_fvu": 0.4, "eval_l0": 8.0}})
    keys = {f"{where}/{name}" for where, found in logged.items() for name in found}
    assert logged["mean"] == pytest.approx({"eval_fvu": 0.3, "eval_l0": 6.0})
    assert with_means({hook: {"loss": 1.0}}) == {hook: {"loss": 1.0}}
    for objective, name, goal in [
        ({"metric": "fvu"}, "mean/eval_fvu", "minimize"),
        ({"metric": "l0", "hook_points": hook}, f"{hook}/eval_l0", "minimize"),
        ({"metric": "explained_variance"}, "mean/eval_explained_variance", "maximize"),
    ]:
        export_wandb_sweep(spec(objectives=[objective]), tmp_path / "sweep.yaml")
        assert read(tmp_path / "sweep.yaml")["metric"] == {"name": name, "goal": goal}
        assert name in keys or objective["metric"] == "explained_variance"


def test_what_a_missed_target_costs_is_told(spec: Callable[..., StudySpec], tmp_path: Path) -> None:
    space = {"saes.target_l0": [4, 8]}
    for objectives, told in [(ONE, 1), ([{"metric": "l0"}], 0), ([*ONE, {"metric": "l0"}], 0)]:
        paths, notices = export_wandb_sweep(spec(space=space, objectives=objectives), tmp_path / "sweep.yaml")
        assert sum("saes.target_l0" in notice for notice in notices) == told
    assert read(paths[0])["parameters"]["saes.target_l0"] == {"values": [4.0, 8.0]}


def test_the_command_runs_from_any_folder(spec: Callable[..., StudySpec], tmp_path: Path) -> None:
    folder = tmp_path / "a folder's"
    export_wandb_sweep(spec(objectives=ONE), folder / "sweep.yaml")
    command = read(folder / "sweep.yaml")["command"]
    assert command[-1] == "${args_no_hyphens}"
    script = command[3].replace('exec "$python"', "printf '%s\\n'")
    given = ["lr=0.01", "saes.sparsity_coeff@blocks.1.hook_resid_pre=1", "wandb_run_name=a=b-at-c"]
    names = [given[0], "saes.sparsity_coeff-at-blocks.1.hook_resid_pre=1", given[2]]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shown = subprocess.run(
        [*command[1:3], script, "sweep", *names], capture_output=True, text=True, check=True, cwd=elsewhere
    ).stdout.splitlines()
    assert shown[:3] == ["-m", "saeopt.train", "--config"]
    assert shown[-6:] == ["--set", given[0], "--set", given[1], "--set", given[2]]
    config = load_run_config(shown[3], given)
    assert config.lr == 0.01
    assert "wandb" in config.trackers  # a sweep sees what its runs log
    assert sys.executable in script


def test_names_are_such_as_wandb_takes(spec: Callable[..., StudySpec], tmp_path: Path) -> None:
    space = {"saes.sparsity_coeff@blocks.1.hook_resid_pre": [0.1, 1.0], "lr": [1e-3, 1e-2]}
    (sweep, _), _ = export_wandb_sweep(spec(space=space, objectives=ONE), tmp_path / "sweep.yaml")
    found = read(sweep)
    assert list(found["parameters"]) == ["saes.sparsity_coeff-at-blocks.1.hook_resid_pre", "lr"]
    assert all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name) for name in found["parameters"])  # W&B's own pattern
    assert "project" not in found


def cells(sweeps: list[Path], base: Path) -> list[str]:
    """The configs that grid sweeps make of their base."""
    found = []
    for sweep in map(read, sweeps):
        axes = [[(k, v) for v in p.get("values", [p.get("value")])] for k, p in sweep["parameters"].items()]
        for combination in itertools.product(*axes):
            config = load_run_config(base, [f"{k}={v}" for k, v in combination])
            found.append(config.model_copy(update={"trackers": []}).model_dump_json())
    return found


def test_conditional_parameters_become_a_sweep_for_each_choice(spec: Callable[..., StudySpec], tmp_path: Path) -> None:
    space = {
        "sae_type": ["relu", "topk", "gated"],
        "saes.sparsity_coeff": [
            {"values": [0.1, 1.0], "when": {"saes.sae_type": ["relu"]}},
            {"values": [0.5, 5.0, 7.0], "when": {"saes.sae_type": ["gated"]}},
        ],
        "saes.k": {"low": 4, "high": 10, "step": 3, "integer": True, "when": {"saes.sae_type": ["topk"]}},
        "lr": [1e-3, 1e-2],
    }
    study = spec(space=space, objectives=ONE)
    (*sweeps, base), _ = export_wandb_sweep(study, tmp_path / "sweep.yaml")
    assert [s.name for s in sweeps] == ["sweep-relu.yaml", "sweep-topk.yaml", "sweep-gated.yaml"]
    topk = read(sweeps[1])["parameters"]
    assert topk["saes.sae_type"] == {"value": "topk"}
    assert topk["saes.k"] == {"values": [4, 7, 10]}
    ours = [cell.config.model_copy(update={"trackers": []}).model_dump_json() for cell in Space(study).grid()]
    assert sorted(cells(sweeps, base)) == sorted(ours)


def test_a_condition_that_always_holds_is_none(spec: Callable[..., StudySpec], tmp_path: Path) -> None:
    space = {"saes.sparsity_coeff": {"values": [0.1, 1.0], "when": {"saes.sae_type": ["relu"]}}}
    (sweep, _), _ = export_wandb_sweep(spec(space=space, objectives=ONE), tmp_path / "sweep.yaml")
    assert read(sweep)["parameters"] == {"saes.sparsity_coeff": {"values": [0.1, 1.0]}}


def test_ranges_and_methods(spec: Callable[..., StudySpec], tmp_path: Path) -> None:
    space = {
        "lr": LR,
        "saes.sparsity_coeff": {"low": 0.5, "high": 2.5, "step": 1.0},
        "seed": {"low": 3, "high": 9, "integer": True},
    }
    study = spec(space=space, sampler="tpe", max_trials=20, objectives=ONE)
    (sweep, _), notices = export_wandb_sweep(study, tmp_path / "sweep.yaml")
    found = read(sweep)
    assert (found["method"], found["run_cap"], notices) == ("bayes", 20, [])
    assert found["parameters"]["lr"] == {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}
    assert found["parameters"]["saes.sparsity_coeff"] == {"values": [0.5, 1.5, 2.5]}
    assert found["parameters"]["seed"] == {"distribution": "int_uniform", "min": 3, "max": 9}


def test_a_grid_of_several_objectives_needs_no_metric_and_says_so(
    spec: Callable[..., StudySpec], tmp_path: Path
) -> None:
    (sweep, _), notices = export_wandb_sweep(spec(max_trials=1), tmp_path / "sweep.yaml")
    assert "metric" not in read(sweep)
    assert "have one objective: none is written" in notices[0]
    assert "an order of its own" in notices[1]


TPE = {"sampler": "tpe", "max_trials": 20, "space": {"lr": LR}}


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (TPE, "a W&B sweep has one objective, the study 2"),
        ({**TPE, "sampler": "nsga2"}, "have no sampler like nsga2"),
        ({**TPE, "sampler": "cmaes", "objectives": ONE}, "have no sampler like cmaes"),
        ({"objectives": [{"metric": "fvu", "target_l0": 20}]}, "W&B cannot aim at an L0"),
        (
            {"space": {"max_grad_norm": [1.0, None]}, "objectives": ONE},
            "'space.max_grad_norm': W&B sweeps know no null",
        ),
    ],
)
def test_what_wandb_cannot_hold_is_one_line_and_no_file(
    fields: dict[str, Any], line: str, spec: Callable[..., StudySpec], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=line) as raised:
        export_wandb_sweep(spec(**fields), tmp_path / "sweep.yaml")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("sweep*"))
