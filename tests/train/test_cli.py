"""The command line as people call it. Every call is a process that imports torch: few calls, many checks each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from saeopt.config import load_run_config

ROOT = Path(__file__).resolve().parents[2]
PYTHON = [sys.executable]
FILE = [sys.executable, str(ROOT / "saeopt" / "train.py")]
MODULE = [sys.executable, "-m", "saeopt.train"]
INSTALLED = [sys.executable, "-m", "saeopt.cli", "train"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "--cpu", "--num_processes"]


@pytest.fixture
def config_file(tiny_model_dir: Path, tiny_text: Path, tmp_path: Path) -> Path:
    raw = {
        "tlens_model_path": str(tiny_model_dir),
        "save_dir": str(tmp_path / "output"),
        "lr_schedule": "constant",
        "log_every_n_grad_steps": 2,
        "threads": 1,
        "data": {
            "dataset_name": str(tiny_text), "is_tokenized": False, "column_name": "text", "streaming": False,
            "context_length": 16, "n_train_samples": 64, "n_eval_samples": 8, "train_batch_size": 8,
        },
        "saes": {"sae_type": "relu", "sae_positions": ["blocks.1.hook_resid_pre"], "sparsity_coeff": 0.2},
    }  # fmt: skip
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf"), **more}
    return {k: v for k, v in env.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def call(command: list[str], tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(tmp_path, **env),
        check=False,
    )


def only_run(tmp_path: Path) -> Path:
    folders = list((tmp_path / "output").iterdir())
    assert len(folders) == 1
    return folders[0]


@pytest.mark.slow
def test_a_run_from_one_config_with_every_logger_then_resume_of_the_finished_run(
    config_file: Path, tmp_path: Path
) -> None:
    changes = ["--set", "saes.sparsity_coeff=0.4", "--set", "trackers=[tensorboard]", "--wandb_project", "p"]
    done = call([*MODULE, "--config", str(config_file), *changes], tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path)
    assert "blocks.1.hook" in done.stdout
    assert "samples_64.safetensors" in done.stdout
    assert done.stderr.count("normalised units") == 1
    assert load_run_config(run / "final_config.yaml").saes.sparsity_coeff == 0.4
    assert json.loads((run / "evaluation.json").read_text())["blocks.1.hook_resid_pre"]["l0"] > 0
    assert list((run / "tensorboard").glob("events.*"))
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))

    again = call([*FILE, "--resume", str(run), "--wandb_project", "null"], tmp_path)
    assert again.returncode == 0
    assert "finished" in again.stderr
    assert "nothing to resume" in again.stderr
    other = call([*FILE, "--resume", str(run), "--config", str(config_file)], tmp_path)
    assert other.returncode == 2
    assert "saes.sparsity_coeff" in other.stderr


@pytest.mark.slow
def test_accelerate_launch_trains_and_reports_a_mistake_once(config_file: Path, tmp_path: Path) -> None:
    command = [*LAUNCH, "1", str(ROOT / "saeopt" / "train.py"), "--config", str(config_file)]
    done = call(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (only_run(tmp_path) / "evaluation.json").exists()
    wrong = call([*command, "--set", "saes.sparsity_coef=3"], tmp_path)
    assert wrong.returncode == 1
    assert wrong.stderr.count("saeopt: error:") == 1
    assert "Traceback" not in wrong.stderr
    silent = call([*LAUNCH, "2", *command[-3:]], tmp_path)
    assert silent.returncode == 1
    assert "2 processes were asked for, 1 runs" in silent.stderr


@pytest.mark.slow
def test_dry_run_reads_no_weights_and_leaves_no_trace(config_file: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())
    changes = ["--set", f"tlens_model_path={bare}", "--set", "saes.sae_positions=blocks.*.hook_resid_pre"]
    done = call([*INSTALLED, "--config", str(config_file), "--dry-run", *changes], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sparsity_coeff: 0.2" in done.stdout
    assert done.stdout.count("4,240") == 2  # 2 · 16 · 128 weights + 128 + 16 biases
    assert "in all" in done.stdout
    assert not (tmp_path / "output").exists()


MISTAKES: list[tuple[list[str], list[str]]] = [
    (["--config", "none.yaml"], ["none.yaml: no such file"]),
    ([], ["CONFIG is missing"]),
    (["--config", "tiny.yaml", "--set", "learning_rate=1"], ["--set learning_rate=1", "'learning_rate'", "'lr'"]),
    (["--config", "tiny.yaml", "--set", "saes.sae_positions=blocks.9.hook_resid_pre"], ["blocks.9.hook_resid_pre"]),
    (["--config", "tiny.yaml", "--set", "data.context_length=4096"], ["data.context_length"]),
    (["--config", "tiny.yaml", "--set", "data.dataset_name=none.jsonl"], ["none.jsonl"]),
    (["--config", "tiny.yaml", "--set", "data.column_name=story"], ["story", "text"]),
    (["--config", "tiny.yaml", "--set", "tlens_model_path=nowhere"], ["nowhere: no such folder"]),
    (["--config", "tiny.yaml", "--device", "cuda:77"], ["cuda:77"]),
    (["--resume", "nowhere"], ["nowhere: no such folder"]),
    (["--bogus"], ["--bogus"]),
]
ONE_AFTER_ANOTHER = """
import json, sys
from saeopt.options import run_cli
from saeopt.train import app
for args in json.loads(sys.argv[1]):
    sys.stderr.write("=== \\n")
    try:
        run_cli(app, args)
    except SystemExit as end:
        sys.stderr.write(f"exit {end.code}\\n")
"""


@pytest.mark.slow
def test_a_mistake_is_one_line_and_exit_code_2(config_file: Path, tmp_path: Path) -> None:
    silenced = ["--set", "legacy_scaling=false", "--set", "recipe=2"]
    every = json.dumps([[*silenced, *changes] for changes, _ in MISTAKES])
    done = call([*PYTHON, "-c", ONE_AFTER_ANOTHER, every], tmp_path)
    said = done.stderr.split("=== \n")[1:]
    assert len(said) == len(MISTAKES), done.stderr
    for text, (changes, parts) in zip(said, MISTAKES, strict=True):
        line, *rest = text.splitlines()
        assert rest == ["exit 2"], (changes, text)
        assert line.startswith("saeopt: error: ")
        for part in parts:
            assert part in line
    assert not list((tmp_path / "output").glob("*"))  # a run that never began leaves no folder


@pytest.mark.slow
def test_a_signal_checkpoints_and_resume_goes_on(config_file: Path, tmp_path: Path) -> None:
    long = [*MODULE, "--config", str(config_file), "--set", "data.n_train_samples=1e6"]
    process = subprocess.Popen(
        long, cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    end = time.monotonic() + 120
    while not list((tmp_path / "output").glob("*/metrics.jsonl")) and time.monotonic() < end:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert time.monotonic() - start < 10
    run = only_run(tmp_path)
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "interrupted"
    assert (run / f"samples_{status['samples']}.safetensors").exists()
    assert f"--resume {run}" in said
