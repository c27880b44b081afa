"""On a GPU: an assertion on the device is a death of the training process, and no other trial's fault."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from saeopt.config.study_file import study_spec
from saeopt.trials import endings
from saeopt.trials.create import create_study
from saeopt.trials.storage import Store

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HERE = Path(__file__).resolve().parent


@pytest.mark.slow  # a real worker, and a fresh training process after each death
@pytest.mark.timeout(600)
def test_an_assertion_on_the_device_fails_its_trials_and_takes_no_other(
    tmp_path: Path, tiny_model_dir: Path, tiny_text: Path
) -> None:
    base: dict[str, Any] = {
        "tlens_model_path": str(tiny_model_dir), "lr_schedule": "constant", "log_every_n_grad_steps": 4,
        "data": {
            "dataset_name": str(tiny_text), "is_tokenized": False, "streaming": False, "column_name": "text",
            "context_length": 16, "n_train_samples": 256, "train_batch_size": 4, "n_eval_samples": 16,
        },
        "saes": {"sae_type": "relu", "sae_positions": ["blocks.1.hook_resid_pre"], "dict_size_to_input_ratio": 4},
    }  # fmt: skip
    space = {"saes.sae_type": ["poison:Asserting", "relu"], "lr": [1e-3, 2e-3]}
    raw = {"name": "s", "base": base, "space": space, "output_dir": str(tmp_path / "out"), "pack": 2}
    paths = [str(HERE), str(HERE.parents[1])]
    sys.path[:0] = paths
    try:
        address = f"sqlite:///{tmp_path}/store.db"
        store = Store.open(address)
        create_study(store, study_spec(raw, "s.yaml"))
    finally:
        del sys.path[: len(paths)]
    done = subprocess.run(
        [sys.executable, "-m", "saeopt.worker", "--study", "s", "--devices", "cuda:0", "--storage", address],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])},
        cwd=tmp_path, capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    trials = store.study("s").trials
    assert [t.state.name for t in trials] == ["FAIL", "FAIL", "COMPLETE", "COMPLETE"], done.stderr[-3000:]
    for trial in trials[:2]:
        assert "CUDA error" in trial.user_attrs["reason"]  # the call that met the broken device says it its own way
        assert trial.system_attrs[endings.DEATHS] == endings.MAX_DEATHS
    assert trials[2].system_attrs.get(endings.DEATHS, 0) == 0
    store.close()
