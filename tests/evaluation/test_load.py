"""Weights files: what is written comes back, damage is noticed, the newest whole one is taken."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from saeopt.config import RunConfig, apply_overrides, validate_run
from saeopt.errors import UserError
from saeopt.runs.weights import (
    CorruptCheckpoint,
    list_checkpoints,
    load_checkpoint,
    load_run,
    save_weights,
    weights_path,
)
from saeopt.saes.base import SAE

MakeSAE = Callable[..., SAE]
HOOKS = ["blocks.0.hook_resid_pre", "blocks.1.attn.hook_z"]


@pytest.fixture
def run_dir(tmp_path: Path, config: RunConfig, make_sae: MakeSAE) -> Path:
    for samples in (8, 16, 100):
        save_weights(weights_path(tmp_path, samples), config, {h: make_sae(seed=samples) for h in HOOKS}, samples)
    (tmp_path / ".samples_900.safetensors.1-0.tmp").write_bytes(b"half")
    return tmp_path


def test_weights_buffers_and_config_come_back(run_dir: Path, config: RunConfig, make_sae: MakeSAE) -> None:
    sae = make_sae(seed=3, scale=0.25)
    sae.tokens_since_fired.copy_(torch.arange(8))
    save_weights(weights_path(run_dir, 200), config, {HOOKS[1]: sae}, 200)
    loaded, saes = load_run(run_dir)
    assert loaded == config
    assert list(saes) == [HOOKS[1]]
    for name, tensor in sae.state_dict().items():
        assert torch.equal(saes[HOOKS[1]].state_dict()[name], tensor), name
    assert not any(p.requires_grad for p in saes[HOOKS[1]].parameters())


def test_the_format_is_the_one_that_is_documented(run_dir: Path) -> None:
    with safe_open(weights_path(run_dir, 100), framework="pt") as file:
        assert f"{HOOKS[1]}/W_enc" in set(file.keys())
        described = json.loads(file.metadata()["saeopt"])
    assert described["samples"] == 100
    assert described["hook_points"][HOOKS[0]] == {"d": 4, "h": 8, "sae_type": "relu"}
    assert described["config"]["saes"]["sae_type"] == "relu"


def test_members_of_a_stack_are_saved_without_their_neighbours(
    tmp_path: Path, config: RunConfig, make_sae: MakeSAE
) -> None:
    stacked = torch.randn(3, 4, 8)
    sae = make_sae()
    sae.W_enc.data = stacked[1]
    save_weights(tmp_path / "samples_1.safetensors", config, {HOOKS[0]: sae}, 1)
    assert torch.equal(load_run(tmp_path)[1][HOOKS[0]].W_enc, stacked[1])
    assert (tmp_path / "samples_1.safetensors").stat().st_size < 8_000


def test_checkpoints_are_listed_by_number_not_by_name(run_dir: Path) -> None:
    assert [n for n, _ in list_checkpoints(run_dir)] == [100, 16, 8]
    assert list_checkpoints(run_dir / "absent") == []


def test_what_differs_per_hook_point_comes_back(tmp_path: Path, config: RunConfig, make_sae: MakeSAE) -> None:
    raw = apply_overrides(config.model_dump(mode="json"), {f"saes.decoder_norm@{HOOKS[1]}": "unit"})
    config = validate_run(raw, "test")
    save_weights(weights_path(tmp_path, 1), config, {hook: make_sae() for hook in HOOKS}, 1)
    saes = load_run(tmp_path)[1]
    assert [saes[hook].config.decoder_norm for hook in HOOKS] == [None, "unit"]


def test_double_precision_stays_double(tmp_path: Path, config: RunConfig, make_sae: MakeSAE) -> None:
    save_weights(weights_path(tmp_path, 1), config, {HOOKS[0]: make_sae(dtype=torch.float64)}, 1)
    assert load_run(tmp_path)[1][HOOKS[0]].W_dec.dtype == torch.float64


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_a_bit_of_the_weights(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def overwrite_the_head(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[:64] = bytes(64)
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, empty, flip_a_bit_of_the_weights, overwrite_the_head])
def test_damaged_newest_falls_back_with_a_warning(
    run_dir: Path,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damage(weights_path(run_dir, 100))
    monkeypatch.setattr(logging.getLogger("saeopt"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="saeopt"):
        loaded = load_checkpoint(run_dir)
    assert loaded.samples == 16
    assert "samples_100.safetensors" in caplog.text


def test_a_damaged_checkpoint_asked_for_by_name_is_an_error(run_dir: Path) -> None:
    truncate(weights_path(run_dir, 100))
    with pytest.raises(CorruptCheckpoint, match=r"samples_100\.safetensors"):
        load_run(run_dir, 100)
    assert load_checkpoint(run_dir, 8).samples == 8
    assert load_checkpoint(run_dir, weights_path(run_dir, 16)).samples == 16
    assert load_checkpoint(run_dir, "samples_16.safetensors").samples == 16
    assert load_checkpoint(weights_path(run_dir, 8)).samples == 8


def test_errors_say_what_is_there(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint at 7 samples \(there are: 100, 16, 8\)"):
        load_run(run_dir, 7)
    with pytest.raises(UserError, match="no such run folder"):
        load_run(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no checkpoint"):
        load_run(tmp_path / "empty")
    for _, path in list_checkpoints(run_dir):
        truncate(path)
    with pytest.raises(UserError, match="no usable checkpoint"):
        load_run(run_dir)


def test_a_full_disk_keeps_the_older_checkpoints_and_leaves_nothing(run_dir: Path) -> None:
    """The weights file itself hits a real limit of the system."""
    before = sorted(p.name for p in run_dir.iterdir())
    program = f"""
import resource, signal
from saeopt.errors import UserError
from saeopt.runs.weights import load_run, save_weights
config, saes = load_run({str(run_dir)!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))
try:
    save_weights({str(weights_path(run_dir, 300))!r}, config, saes, 300)
except UserError as error:
    raise SystemExit(str(error))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "samples_300.safetensors: cannot be written: the file is too big" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in run_dir.iterdir()) == before
    assert load_checkpoint(run_dir).samples == 100


def test_looking_for_checkpoints_imports_no_torch() -> None:
    program = "import sys, saeopt.files, saeopt.runs.weights; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
