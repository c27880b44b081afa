"""Several seeds of one trial: they train as runs of their own would, in one pack, and are told together."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch

import saeopt
from saeopt.errors import UserError
from saeopt.files import read_metrics
from saeopt.runs.folder import RunFolder, resume_point
from saeopt.runs.names import EVALUATION, METRICS_FILE
from saeopt.runs.weights import load_checkpoint, load_weights
from saeopt.training import Observer, TrialPlan, train_pack
from saeopt.training.runtime import Runtime

HOOK, OTHER = "blocks.1.hook_resid_pre", "blocks.0.hook_mlp_out"
EVERY_KIND = ["relu", "gated", "topk", "batch_topk", "jumprelu", "hard_concrete"]
"""Steps of their own, noise, running thresholds."""


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime("cpu")


def plan(config, tmp_path: Path, name: str, resume: bool = False) -> TrialPlan:
    return TrialPlan(name, config, tmp_path / name, resume)


def train(tmp_path, runtime, observer=None, resume=False, **configs):
    return train_pack([plan(c, tmp_path, name, resume) for name, c in configs.items()], runtime, observer)


def weights(folder: Path, samples: int = 256) -> dict[str, dict[str, torch.Tensor]]:
    saes = load_weights(RunFolder(folder).weights_path(samples)).saes
    return {hook: dict(sae.state_dict()) for hook, sae in saes.items()}


def same(a, b) -> bool:
    return all(torch.equal(a[hook][name], b[hook][name]) for hook in a for name in a[hook]) and a.keys() == b.keys()


def shape(sae_type: str) -> dict[str, object]:
    return {"saes.sae_type": sae_type, **({"saes.k": 4} if "topk" in sae_type else {})}


@pytest.mark.parametrize("sae_type", EVERY_KIND)
def test_two_seeds_are_bit_for_bit_two_trials_of_one_pack(make_config, runtime, tmp_path, sae_type):
    config = make_config(seed=3, **shape(sae_type))
    one = train(tmp_path, runtime, both=config.model_copy(update={"seeds": 2}))["both"]
    two = train(tmp_path, runtime, three=config, four=config.model_copy(update={"seed": 4}))
    assert same(weights(tmp_path / "both"), weights(tmp_path / "three"))
    assert same(weights(tmp_path / "both" / "seeds" / "4"), weights(tmp_path / "four"))
    row = one.evaluation[HOOK]
    for seed, name in ((3, "three"), (4, "four")):
        alone = two[name].evaluation[HOOK]
        assert row["seeds"][str(seed)] == {k: v for k, v in alone.items() if isinstance(v, int | float)}
    fvus = [two[name].evaluation[HOOK]["fvu"] for name in ("three", "four")]
    assert fvus[0] != fvus[1]
    assert row["fvu"] == pytest.approx(fmean(fvus), rel=1e-12)
    assert row["fvu_std"] == pytest.approx(stdev(fvus), rel=1e-12)
    assert row["n_seeds"] == 2


def test_two_seeds_are_two_runs_alone(make_config, tmp_path):
    runtime = Runtime("cpu", weights_dtype=torch.float64)
    config = make_config(**{"saes.sae_positions": [HOOK, OTHER]})
    train(tmp_path, runtime, both=config.model_copy(update={"seeds": 2}))
    for seed, folder in ((0, tmp_path / "both"), (1, tmp_path / "both" / "seeds" / "1")):
        train(tmp_path, runtime, **{f"alone{seed}": config.model_copy(update={"seed": seed})})
        alone, found = weights(tmp_path / f"alone{seed}"), weights(folder)
        for hook in (HOOK, OTHER):
            for name, tensor in alone[hook].items():
                assert torch.allclose(found[hook][name], tensor, rtol=1e-9, atol=1e-12), (seed, hook, name)
