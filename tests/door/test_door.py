"""`import saeopt`: quick, with nothing shadowed, and the page about it tells the truth."""

from __future__ import annotations

import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import saeopt
from saeopt import UserError

ROOT = Path(__file__).resolve().parents[2]
HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture
def config(tiny_model_dir: Path, tiny_text: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "tlens_model_path": str(tiny_model_dir),
        "save_dir": str(tmp_path / "output"),
        "wandb_run_name": "my-run",
        "recipe": 2,
        "threads": 1,
        "data": {
            "dataset_name": str(tiny_text), "is_tokenized": False, "column_name": "text", "streaming": False,
            "context_length": 16, "n_train_samples": 64, "n_eval_samples": 8, "train_batch_size": 8,
        },
        "saes": {"sae_type": "relu", "sae_positions": ["blocks.0.hook_resid_pre", HOOK], "dict_size_to_input_ratio": 2},
    }  # fmt: skip


def test_importing_loads_no_torch_and_no_submodule_is_shadowed() -> None:
    names = [m.name for m in pkgutil.iter_modules(saeopt.__path__) if not m.name.startswith("_")]
    code = f"""
import sys, saeopt
assert not {{"torch", "pydantic", "typer"}} & set(sys.modules), "slow imports"
import importlib, types
modules = {{name: importlib.import_module("saeopt." + name) for name in {names!r}}}
for name, module in modules.items():
    assert getattr(saeopt, name) is module, name
for name in saeopt.__all__:
    assert not isinstance(getattr(saeopt, name), types.ModuleType), name
    assert name in dir(saeopt)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.fixture
def run_page(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path
) -> Callable[[str], dict[str, Any]]:
    """Runs the blocks of a page one after the other, beside a run in output/my-run; gives what they left."""
    monkeypatch.chdir(tmp_path)
    saeopt.train_run(config)

    def run(page: str) -> dict[str, Any]:
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
        there: dict[str, Any] = {"saeopt_config": config, "model_path": str(tiny_model_dir), "n_blocks": len(blocks)}
        for block in blocks:
            exec(compile(block, f"docs/{page}", "exec"), there)
        return there

    return run


def test_the_page_about_python_runs_as_it_stands(run_page: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    there = run_page("python.md")
    assert there["n_blocks"] == 5
    assert (tmp_path / "exported" / HOOK / "cfg.json").exists()
    assert there["run"].folder == tmp_path / "output" / "my-run-2"
    written = json.loads((there["run"].folder / "evaluation.json").read_text(encoding="utf-8"))
    assert there["metrics"][HOOK]["fvu"] == pytest.approx(written[HOOK]["fvu"], rel=1e-6)
    assert there["run"].evaluation[HOOK]["l0"] == written[HOOK]["l0"]
    assert {"training_curves.png", "feature_density.png"} <= {p.name for p in there["run"].folder.iterdir()}


def test_the_page_about_steering_runs_as_it_stands(run_page: Callable[[str], dict[str, Any]]) -> None:
    there = run_page("steering.md")
    assert there["n_blocks"] == 6
    plain = there["plain"]
    for name in ("logits", "steered", "changed", "last", "everywhere", "ablated", "both"):
        assert not torch.allclose(there[name], plain), name
    assert torch.equal(there["last"][:, :2], plain[:, :2])  # steered from position 2 on
    assert there["attribution"].shape == there["f"].shape
    assert torch.equal(there["model"](there["tokens"]), plain)


def test_mistakes_are_one_line_and_leave_no_folder(config: dict[str, Any], tmp_path: Path) -> None:
    for changes, message in (
        ({"saes.sae_positions": ["blocks.9.hook_resid_pre"]}, "sae_positions"),
        ({"saes.nothing": 1}, "unknown key 'saes.nothing'"),
        ({"data.dataset_name": "nowhere.jsonl"}, "--set data.dataset_name=\"nowhere.jsonl\": 'data.dataset_name'"),
        ({"saes.target_l0": 9000}, "--set saes.target_l0=9000: 'saes.target_l0': 9000 exceeds"),
    ):
        with pytest.raises(UserError, match=message):
            saeopt.train_run(config, changes)
    with pytest.raises(UserError, match=r"train_run: 'saes\.target_l0': 9000 exceeds"):
        saeopt.train_run({**config, "saes": {**config["saes"], "target_l0": 9000}})
    assert not (tmp_path / "output").exists()
    with pytest.raises(UserError, match="give a config"):
        saeopt.train_run()
    with pytest.raises(UserError, match="no such"):
        saeopt.load(tmp_path / "none")


def test_one_of_several_saes_is_named(config: dict[str, Any]) -> None:
    run = saeopt.train_run(config, {"data.n_eval_samples": 0})
    assert saeopt.load_sae(run.folder, site=HOOK).d == 16
    with pytest.raises(UserError, match=rf"holds several SAEs: 'site' must be one of .*{HOOK}"):
        saeopt.load_sae(run.folder)
    with pytest.raises(UserError, match="holds no SAE at 'x'"):
        saeopt.load_sae(run.folder, site="x")
    again = saeopt.train_run(resume=run.folder)
    assert (again.folder, again.samples) == (run.folder, run.samples)
    for hook, sae in run.saes().items():
        assert torch.equal(sae.W_dec, again.saes()[hook].W_dec)
