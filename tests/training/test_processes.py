"""Real processes: two ranks against one, and kill -9 at any moment."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from saeopt.files import read_metrics
from saeopt.runs.folder import RunFolder
from saeopt.runs.weights import load_run
from saeopt.training import TrialPlan, train_pack
from saeopt.training.runtime import Runtime

JOB = Path(__file__).with_name("train_job.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def weights(run_dir):
    _, saes = load_run(run_dir)
    return {f"{hook}/{n}": t for hook, sae in saes.items() for n, t in sae.state_dict().items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


BOTH = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]


def write_job(path: Path, configs, **extra) -> str:
    plans = {name: config.model_dump(mode="json") for name, config in configs.items()}
    path.write_text(json.dumps({"plans": plans, "folder": str(path.parent), **extra}))
    return str(path)


@pytest.mark.slow
def test_two_ranks_train_the_same_saes_as_one_with_the_doubled_batch(make_config, tmp_path):
    """Masked separators and outliers, clipping, gate noise, AuxK, a running threshold, other sites; only sums differ"""
    kinds = {
        "relu": {"saes.sae_type": "relu"},
        "noisy": {"saes.sae_type": "gated_hard_concrete", "max_grad_norm": 0.1},
        "topk": {"saes.sae_type": "topk", "saes.k": 4, "saes.dead_after_tokens": 64},
        "seeds": {"saes.sae_type": "gated", "seeds": 2},
        "threshold": {"saes.sae_type": "threshold_sae:ThresholdSAE"},  # by the window's tallies
        "transcoder": {
            "saes.sae_type": "topk",
            "saes.k": 4,
            "saes.dead_after_tokens": 64,
            "saes.sae_positions": [{"read": "blocks.1.mlp.hook_in", "write": "blocks.1.hook_mlp_out"}],
        },
        "crosscoder": {"saes.sae_type": "relu", "saes.sae_positions": [{"read": BOTH, "write": BOTH, "name": "both"}]},
    }
    sinks = {"data.mask_norm_outliers": 1.1}
    one = {name: make_config(**{**c, **sinks, "data.train_batch_size": 8}) for name, c in kinds.items()}
    two = {name: make_config(**{**c, **sinks, "data.train_batch_size": 4}) for name, c in kinds.items()}
    (tmp_path / "two").mkdir()
    job = write_job(tmp_path / "two" / "job.json", two, dtype="float64")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    subprocess.run([*command, f"--master_port={free_port()}", str(JOB), job], check=True, env=ENVIRONMENT)
    runtime = Runtime("cpu", weights_dtype=torch.float64)
    results = train_pack([TrialPlan(n, c, tmp_path / "one" / n) for n, c in one.items()], runtime)
    for name in kinds:
        single, double = weights(tmp_path / "one" / name), weights(tmp_path / "two" / name)
        for key, tensor in single.items():
            torch.testing.assert_close(double[key], tensor, rtol=1e-7, atol=1e-10, msg=f"{name} {key}")
        evaluated = json.loads(RunFolder(tmp_path / "two" / name).evaluation_path.read_text())
        for hook, row in results[name].evaluation.items():
            for metric in ("fvu", "l0", "ce_recovered", "n_tokens", *(["pw_mcc"] if name == "seeds" else [])):
                assert evaluated[hook][metric] == pytest.approx(row[metric], rel=1e-5), metric


@pytest.mark.slow
def test_killed_at_random_moments_the_final_weights_are_bit_identical(make_config, tmp_path):
    config = make_config(
        **{"data.n_train_samples": 2048, "saes.sae_type": "hard_concrete", "seeds": 2},
        save_every_n_samples=32,
        keep_checkpoints=2,
    )
    train_pack([TrialPlan("a", config, tmp_path / "whole" / "a")], Runtime("cpu"))
    (tmp_path / "cut").mkdir()
    job = write_job(tmp_path / "cut" / "job.json", {"a": config}, resume=True)
    folder, rng = RunFolder(tmp_path / "cut" / "a"), random.Random(0)
    kills = 0
    for _ in range(12):
        until = (folder.weights() or [0])[0] + rng.randrange(200, 450)  # by progress: how fast a machine is varies
        process = subprocess.Popen([sys.executable, str(JOB), job], env=ENVIRONMENT)
        while kills < 3 and process.poll() is None and (folder.weights() or [0])[0] < until:
            time.sleep(0.002)
        if kills == 3 or process.poll() is not None:
            assert process.wait(timeout=300) == 0
            break
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        kills += folder.status()["status"] == "running"
    assert kills >= 2
    assert folder.status()["status"] == "finished"
    for seed in ("", "seeds/1"):
        whole, cut = weights(tmp_path / "whole" / "a" / seed), weights(tmp_path / "cut" / "a" / seed)
        assert all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.slow
def test_two_ranks_killed_at_a_random_moment_resume_to_the_same_bits(make_config, tmp_path):
    """With a shuffle buffer whose last group is cut, and norm outliers left out."""
    data = {"data.n_train_samples": 304, "data.shuffle_buffer_tokens": 2000, "data.mask_norm_outliers": 1.2}
    config = make_config(
        **{**data, "data.train_batch_size": 4}, save_every_n_samples=32, keep_checkpoints=2, eval_every_n_samples=96
    )
    rng = random.Random(3)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        job = write_job(tmp_path / name / "job.json", {"a": config}, resume=name == "cut")
        folder, kills = RunFolder(tmp_path / name / "a"), 0 if name == "cut" else 1
        while True:
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
            command += [f"--master_port={free_port()}", str(JOB), job]
            until = (folder.weights() or [0])[0] + rng.randrange(40, 200)
            process = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True)
            while kills < 1 and process.poll() is None and (folder.weights() or [0])[0] < until:
                time.sleep(0.002)
            if kills == 1 or process.poll() is not None:
                assert process.wait(timeout=300) == 0
                break
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=60)
            kills += 1
    assert kills == 1
    whole, cut = (RunFolder(tmp_path / name / "a") for name in ("whole", "cut"))
    assert cut.status() == whole.status()
    assert cut.weights_path(304).read_bytes() == whole.weights_path(304).read_bytes()
    assert cut.state_path(304).read_bytes() == whole.state_path(304).read_bytes()
    assert cut.evaluation_path.read_bytes() == whole.evaluation_path.read_bytes()
    rows = [[{**row, "tokens_per_s": 0} for row in read_metrics(f.metrics_path)] for f in (whole, cut)]
    assert rows[0] == rows[1]
