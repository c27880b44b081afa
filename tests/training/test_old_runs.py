"""Run folders that the version of November 2026 wrote load, evaluate, report and go on as they did then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from saeopt.cli import app
from saeopt.runs.weights import load_checkpoint

STORED = Path(__file__).parent / "runs_2026_11"
HOOKS = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]
every_run = pytest.mark.parametrize("name", ["topk", "gated_hard_concrete"])


@pytest.fixture
def run(name: str, tiny_model_dir: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a stored run; model and data lie where the config's relative paths find them."""
    (tmp_path / "llama").symlink_to(tiny_model_dir)
    (tmp_path / "tiny.jsonl").symlink_to(tiny_text)
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(STORED / name, tmp_path / "output" / name))


def call(*words: str | Path) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@every_run
def test_it_loads_and_evaluates_to_the_numbers_of_then(run: Path) -> None:
    before = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    loaded = load_checkpoint(run)
    assert (loaded.samples, list(loaded.saes)) == (128, HOOKS)
    assert loaded.config.sae_at(HOOKS[1]).sparsity_coeff == 0.1
    assert loaded.saes[HOOKS[0]].norm_limit < 100
    call("evaluate", run, "--device", "cpu")
    now = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    for hook in HOOKS:
        for metric in ("l0", "fvu", "ce_recovered", "n_tokens"):
            assert now[hook][metric] == pytest.approx(before[hook][metric], rel=1e-5), (hook, metric)


@every_run
def test_it_goes_on_from_the_middle_to_the_same_end(run: Path) -> None:
    for later in ("samples_128.safetensors", "state/128.safetensors", "status.json", "evaluation.json"):
        (run / later).unlink()
    shown = call("train", "--resume", run, "--device", "cpu")
    assert HOOKS[1] in shown
    assert "samples_128.safetensors" in shown
    then, now = load_checkpoint(STORED / run.name), load_checkpoint(run)
    for hook in HOOKS:
        expected = then.saes[hook].state_dict()
        found = now.saes[hook].state_dict()
        assert found.keys() == expected.keys()
        for tensor in expected:
            torch.testing.assert_close(found[tensor], expected[tensor], rtol=1e-4, atol=1e-6)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    old = [json.loads(line) for line in (STORED / run.name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["samples"], row["hook_point"]) for row in rows] == [(row["samples"], row["hook_point"]) for row in old]


@every_run
def test_a_finished_one_is_reported_and_nothing_is_trained(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    shown = call("train", "--resume", run, "--device", "cpu")
    assert all(hook in shown for hook in HOOKS)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
