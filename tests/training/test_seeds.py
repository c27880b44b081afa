"""Several seeds of one trial: they train as runs of their own would, in one pack, and are told together."""

from __future__ import annotations

import shutil
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch

import saeopt
from saeopt.errors import UserError
from saeopt.files import read_metrics
from saeopt.runs.folder import RunFolder, resume_point
from saeopt.runs.names import METRICS_FILE
from saeopt.runs.weights import load_weights
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


class After(Observer):
    """Interrupts after some windows."""

    def __init__(self, windows: int) -> None:
        self.left = windows

    def should_interrupt(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_seeds_go_on_as_if_nothing_had_happened(make_config, runtime, tmp_path):
    config = make_config(seeds=2, **shape("batch_topk"))
    train(tmp_path, runtime, whole=config)
    assert train(tmp_path, runtime, After(5), parts=config)["parts"].status == "interrupted"
    assert resume_point(tmp_path / "parts") == 96
    train(tmp_path, runtime, resume=True, parts=config)
    for folder in ("", "seeds/1"):
        assert same(weights(tmp_path / "whole" / folder), weights(tmp_path / "parts" / folder))
    found = [read_metrics(tmp_path / name / METRICS_FILE) for name in ("whole", "parts")]
    kept = [[{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows] for rows in found]
    assert kept[0] == kept[1]


def test_metrics_are_means_with_their_spread_while_training_too(make_config, runtime, tmp_path):
    train(tmp_path, runtime, both=make_config(seeds=2), zero=make_config(), one=make_config(seed=1))
    rows = {name: read_metrics(tmp_path / name / METRICS_FILE) for name in ("both", "zero", "one")}
    assert [row["samples"] for row in rows["both"]] == [row["samples"] for row in rows["zero"]]
    for both, *alone in zip(*rows.values(), strict=True):
        name = "loss" if "loss" in both else "eval_fvu"
        values = [row[name] for row in alone]
        assert both[name] == pytest.approx(fmean(values), rel=1e-12)
        assert both[f"{name}_std"] == pytest.approx(stdev(values), rel=1e-9)
        assert both["n_seeds" if "loss" in both else "eval_n_seeds"] == 2
    assert not any(key.startswith("lr_") for row in rows["both"] for key in row)


def test_a_checkpoint_is_whole_only_with_all_its_seeds(make_config, runtime, tmp_path, caplog):
    config = make_config(seeds=3)
    train(tmp_path, runtime, a=config)
    file = RunFolder(tmp_path / "a").seed(2).weights_path(256)
    shutil.copytree(tmp_path / "a", tmp_path / "lacking")
    file.write_bytes(file.read_bytes()[:-1])
    (tmp_path / "lacking" / "seeds" / "1" / file.name).unlink()
    expected = weights(tmp_path / "a" / "seeds" / "1")
    for name in ("a", "lacking"):
        assert resume_point(tmp_path / name) == 192
        train(tmp_path, runtime, resume=True, **{name: config})
        assert same(weights(tmp_path / name / "seeds" / "1"), expected)
        assert resume_point(tmp_path / name) == 256


def test_old_weights_of_all_seeds_are_removed_together(make_config, runtime, tmp_path):
    train(tmp_path, runtime, a=make_config(seeds=2, keep_checkpoints=1))
    folder = RunFolder(tmp_path / "a")
    assert folder.weights() == folder.seed(1).weights() == [256, 192]  # those of the states that are kept
    assert folder.seeds() == [1]
    folder.drop_checkpoints()
    assert folder.weights() == folder.seed(1).weights() == folder.states() == []


def test_each_seed_is_a_run_folder_that_is_loaded_and_evaluated(make_config, runtime, tmp_path):
    config = make_config(seed=7, seeds=2)
    told = train(tmp_path, runtime, a=config)["a"].evaluation[HOOK]
    mine, other = saeopt.load(tmp_path / "a"), saeopt.load(tmp_path / "a", seed=8)
    assert torch.equal(mine[HOOK].W_dec, saeopt.load_sae(tmp_path / "a", seed=7).W_dec)
    assert torch.equal(other[HOOK].W_dec, saeopt.load(tmp_path / "a" / "seeds" / "8")[HOOK].W_dec)
    assert not torch.equal(mine[HOOK].W_dec, other[HOOK].W_dec)
    with pytest.raises(UserError, match=r"no seed 9 \(there are: 7, 8\)"):
        saeopt.load(tmp_path / "a", seed=9)
    again = saeopt.evaluate_run(tmp_path / "a", device="cpu")[HOOK]
    alone = saeopt.evaluate_run(tmp_path / "a" / "seeds" / "8", device="cpu")[HOOK]
    for name in ("fvu", "fvu_std", "l0_min", "found_again", "pw_mcc"):
        assert again[name] == pytest.approx(told[name], rel=1e-6), name
    assert again["seeds"]["8"]["fvu"] == pytest.approx(alone["fvu"], rel=1e-6)
    assert "fvu_std" not in alone


def test_a_weights_file_without_the_other_seeds_is_evaluated_alone_and_says_so(make_config, runtime, tmp_path, caplog):
    train(tmp_path, runtime, a=make_config(seeds=2))
    file = shutil.copy(RunFolder(tmp_path / "a").weights_path(256), tmp_path)
    row = saeopt.evaluate_run(file, device="cpu")[HOOK]
    assert "n_seeds" not in row
    assert "no such file: seed 1 is left out" in caplog.text


def test_one_seed_is_not_resumed_by_itself(make_config, runtime, tmp_path):
    train(tmp_path, runtime, After(2), a=make_config(seeds=2))
    with pytest.raises(UserError, match=r"holds one seed of a run with several: give .*/a$"):
        saeopt.train_run(resume=tmp_path / "a" / "seeds" / "1", device="cpu")


def test_more_seeds_are_another_run(make_config, runtime, tmp_path):
    train(tmp_path, runtime, After(2), a=make_config(seeds=2))
    with pytest.raises(UserError, match=r"'seeds' is 3, but .* says 2: not the same run"):
        saeopt.train_run(None, {"seeds": 3}, resume=tmp_path / "a", device="cpu")


def test_a_seed_that_breaks_takes_its_hook_point_with_it(make_config, runtime, tmp_path, monkeypatch):
    """A mean over the seeds that are left would flatter the trial."""
    from saeopt.training import loop

    measure = loop.Pack.metrics

    def broken(pack, samples):
        found = measure(pack, samples)
        for member, row in found:
            row["finite"] = not (member.hook_point == HOOK and member.seed == 1 and samples >= 128)
        return found

    monkeypatch.setattr(loop.Pack, "metrics", broken)
    config = make_config(seeds=2, **{"saes.sae_positions": [HOOK, OTHER]})
    result = train(tmp_path, runtime, a=config)["a"]
    assert result.status == "finished"
    assert result.reason == f"{HOOK}: NaN or Inf in loss or gradient before sample 128"
    rows = read_metrics(tmp_path / "a" / METRICS_FILE)
    assert [r["samples"] for r in rows if r["hook_point"] == HOOK and "loss" in r] == [64, 128]
    assert [r["samples"] for r in rows if r["hook_point"] == OTHER and "loss" in r] == [64, 128, 192, 256]
    alone = train(tmp_path, runtime, b=make_config(seeds=2))["b"]
    assert alone.status == "diverged"


def test_a_stopped_trial_leaves_with_all_its_seeds(make_config, runtime, tmp_path):
    class Stop(Observer):
        def on_log(self, name, samples, metrics):
            assert metrics[HOOK]["n_seeds" if name == "a" else "loss"] is not None
            return "enough" if name == "a" and samples >= 128 else None

    results = train(tmp_path, runtime, Stop(), a=make_config(seeds=2), b=make_config(seed=5))
    assert [(r.status, r.samples) for r in results.values()] == [("stopped", 128), ("finished", 256)]
    assert RunFolder(tmp_path / "a").seed(1).weights()[0] == 128
    train(tmp_path, runtime, b2=make_config(seed=5))
    assert same(weights(tmp_path / "b"), weights(tmp_path / "b2"))


def test_seeds_and_trained_weights_exclude_each_other(make_config, tmp_path):
    with pytest.raises(UserError, match=r"'seeds' above 1: with 'saes.pretrained_sae_paths' all would start"):
        make_config(seeds=2, **{"saes.pretrained_sae_paths": [str(tmp_path)]})


def test_memory_and_parameters_are_those_of_all_seeds(make_config):
    from saeopt.training.dry_run import fitting, shapes, weightless
    from saeopt.training.memory import estimate

    config = make_config(**shape("topk"))
    model, lm = weightless(config)
    three = config.model_copy(update={"seeds": 3})
    assert shapes(three, model) == shapes(config, model) * 3
    needed = [sum(estimate(c, shapes(c, model) * n, lm, 2).values()) for c, n in ((config, 30), (three, 10))]
    assert needed[0] == needed[1]
    room = [fitting(c, needed[0], torch.device("cuda"), 64) for c in (config, three)]
    assert room == [30, 10]
