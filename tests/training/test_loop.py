"""The loop on a tiny real model: what a run leaves behind, and that members never influence each other."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from saeopt.errors import UserError
from saeopt.runs.folder import RunFolder, resume_point
from saeopt.runs.weights import load_checkpoint, load_run, load_weights
from saeopt.saes.registry import get_sae
from saeopt.training import Observer, TrialPlan, dry_run, loop, setup, train_pack
from saeopt.training.pack import Member, Pack
from saeopt.training.runtime import Runtime

HOOK = "blocks.1.hook_resid_pre"
FOUR = {
    "relu": {"saes.sae_type": "relu", "lr": 3e-3, "seed": 1},
    "gated": {"saes.sae_type": "gated", "lr": 1e-3, "seed": 2, "saes.sparsity_coeff": 0.5},
    "hard_concrete": {"saes.sae_type": "hard_concrete", "max_grad_norm": None, "seed": 3},
    "gated_hard_concrete": {"saes.sae_type": "gated_hard_concrete", "seed": 4, "warmup_samples": 0},
}


@pytest.fixture(scope="module")
def runtime():
    return Runtime("cpu")


def plan(config, tmp_path, name, resume=False):
    return TrialPlan(name, config, tmp_path / name, resume)


def weights(run_dir):
    _, saes = load_run(run_dir)
    return {f"{hook}/{n}": t for hook, sae in saes.items() for n, t in sae.state_dict().items()}


def test_a_run_leaves_config_weights_state_metrics_evaluation_and_says_when_to_draw(make_config, runtime, tmp_path):
    config = make_config(eval_every_n_samples=128)
    drawn = []

    class Watching(Observer):
        def draw(self, name, folder):
            drawn.append((name, folder, sorted(p.name for p in folder.glob("*.json"))))

    result = train_pack([plan(config, tmp_path, "a")], runtime, Watching())["a"]
    folder = RunFolder(tmp_path / "a")
    assert (result.status, result.samples, result.reason) == ("finished", 256, None)
    assert drawn == [("a", folder.path, ["evaluation.json", "status.json"])]
    assert folder.weights() == [256, 192, 128, 64]
    assert folder.states() == [256, 192]
    assert folder.status()["status"] == "finished"
    evaluation = json.loads(folder.evaluation_path.read_text())[HOOK]
    wanted = "l0 l1 mse fvu explained_variance cosine fraction_dead ce_clean ce_sae ce_zero ce_recovered kl n_tokens"
    assert set(wanted.split()) <= set(evaluation)
    assert evaluation["evaluated"]["n_samples"] == 20
    assert folder.evaluation()[HOOK].keys() == evaluation.keys() - {"evaluated"}
    rows = [json.loads(line) for line in folder.metrics_path.read_text().splitlines()]
    logged = [row["samples"] for row in rows if "loss" in row]
    assert logged == [64, 128, 192, 256]
    assert [row["samples"] for row in rows if "eval_fvu" in row] == [128, 256]
    assert rows[-1]["eval_fvu"] == pytest.approx(evaluation["fvu"])
    assert not any(p.suffix == ".png" for p in folder.path.iterdir())  # pictures are the commands'
    assert resume_point(folder.path) == 256


def test_finished_trials_tell_their_parameters_and_memory_and_the_model_is_read_once(
    make_config, tmp_path, monkeypatch
):
    runtime, read, weightless = Runtime("cpu"), [], dry_run.weightless
    monkeypatch.setattr(dry_run, "weightless", lambda config: read.append(1) or weightless(config))
    configs = {
        "one": make_config(),
        "two": make_config(seeds=2),
        "wide": make_config(**{"saes.dict_size_to_input_ratio": 8}),
    }
    results = train_pack([plan(config, tmp_path, name) for name, config in configs.items()], runtime)
    for name in ("one", "wide"):
        assert results[name].cost["parameters"] == sum(tensor.numel() for tensor in trained(tmp_path / name)), name
    costs = {name: result.cost for name, result in results.items()}
    assert costs["two"]["parameters"] == costs["one"]["parameters"], "of one seed"
    assert 0 < costs["one"]["memory_gib"] < costs["two"]["memory_gib"]
    assert len(read) == 1
    stopped = train_pack([plan(configs["one"], tmp_path, "c")], runtime, Stopping())["c"]
    assert (stopped.status, stopped.cost) == ("stopped", {})


class Stopping(Observer):
    def on_log(self, name, samples, metrics):
        return "enough"


def trained(run_dir):
    _, saes = load_run(run_dir)
    return [p for sae in saes.values() for p in sae.parameters()]


def test_training_learns(make_config, runtime, tmp_path):
    same_loss = {"saes.sparsity_warmup_samples": 0}  # a rising λ would raise the loss
    config = make_config(**{"data.n_train_samples": 2048, "lr": 1e-2, "save_every_n_samples": 0}, **same_loss)
    train_pack([plan(config, tmp_path, "a")], runtime)
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]


def test_packed_equals_alone_for_four_architectures_in_float64(make_config, tmp_path):
    runtime = Runtime("cpu", weights_dtype=torch.float64)
    steps = {"data.n_train_samples": 16 * 50, "data.n_eval_samples": 0, "save_every_n_samples": 0}
    configs = {name: make_config(**changes, **steps) for name, changes in FOUR.items()}
    train_pack([plan(c, tmp_path / "pack", name) for name, c in configs.items()], runtime)
    for name, config in configs.items():
        train_pack([plan(config, tmp_path / "alone", name)], runtime)
        together, alone = weights(tmp_path / "pack" / name), weights(tmp_path / "alone" / name)
        for key, tensor in alone.items():
            torch.testing.assert_close(together[key], tensor, rtol=1e-9, atol=1e-12, msg=f"{name} {key}")


def test_hook_points_of_trials_may_differ(make_config, runtime, tmp_path):
    both = ["blocks.0.hook_resid_pre", HOOK]
    one, two = make_config(), make_config(**{"saes.sae_positions": both})
    results = train_pack([plan(one, tmp_path, "one"), plan(two, tmp_path, "two")], runtime)
    assert list(results["one"].evaluation) == [HOOK]
    assert sorted(results["two"].evaluation) == sorted(both)


@pytest.mark.parametrize("sae_type", list(FOUR))
def test_resumed_equals_uninterrupted_bit_for_bit(make_config, runtime, tmp_path, sae_type):
    config = make_config(**FOUR[sae_type], eval_every_n_samples=96)
    train_pack([plan(config, tmp_path, "whole")], runtime)

    class Interrupt(Observer):
        polls = 0

        def should_interrupt(self) -> bool:
            self.polls += 1
            return self.polls == 7

    first = train_pack([plan(config, tmp_path, "cut")], runtime, Interrupt())["cut"]
    assert (first.status, first.samples) == ("interrupted", 7 * 16)
    second = train_pack([plan(config, tmp_path, "cut", resume=True)], runtime)["cut"]
    assert second.status == "finished"
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    strip = [
        [{k: v for k, v in json.loads(line).items() if k != "tokens_per_s"} for line in path.read_text().splitlines()]
        for path in (tmp_path / "whole" / "metrics.jsonl", tmp_path / "cut" / "metrics.jsonl")
    ]
    assert strip[0] == strip[1]


def test_a_disk_that_fills_up_under_the_metrics_is_one_line(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_metrics([{"samples": 1, "hook_point": "h", "loss": float("nan")}])
    assert json.loads(folder.metrics_path.read_text())["loss"] is None
    folder.metrics_path.unlink()
    folder.metrics_path.symlink_to("/dev/full")
    with pytest.raises(UserError, match="the disk is full"):
        folder.append_metrics([{"samples": 1}])


def test_another_stack_resumes_what_the_reference_wrote(make_config, runtime, tmp_path):
    def config(stack):
        return make_config(**{"performance.stack": stack, "save_every_n_samples": 0})

    class Interrupt(Observer):
        polls = 0

        def should_interrupt(self) -> bool:
            self.polls += 1
            return self.polls == 7

    train_pack([plan(config("reference"), tmp_path, "whole")], runtime)
    for first, second in (("reference", "fused"), ("fused", "reference")):
        train_pack([plan(config(first), tmp_path, first)], runtime, Interrupt())
        train_pack([plan(config(second), tmp_path, first, resume=True)], runtime)
        whole, cut = weights(tmp_path / "whole"), weights(tmp_path / first)
        for key, tensor in whole.items():
            torch.testing.assert_close(cut[key], tensor, rtol=1e-4, atol=1e-5, msg=f"{first} {key}")


def test_per_hook_with_an_unknown_hook_point_is_refused(make_config, runtime, tmp_path):
    config = make_config(**{"saes.sparsity_coeff@blocks.1.hook_resid_pree": 3})
    with pytest.raises(UserError, match=r"per_hook.*blocks\.1\.hook_resid_pre"):
        train_pack([plan(config, tmp_path, "a")], runtime)


def test_nan_in_one_member_stops_it_with_a_reason_and_leaves_the_other_untouched(make_config, runtime, tmp_path):
    good, bad = make_config(), make_config(lr=1e30, max_grad_norm=None)
    results = train_pack([plan(good, tmp_path / "p", "good"), plan(bad, tmp_path / "p", "bad")], runtime)
    assert results["bad"].status == "diverged"
    assert "NaN" in (results["bad"].reason or "")
    assert all(torch.isfinite(t.double()).all() for t in weights(tmp_path / "p" / "bad").values())
    train_pack([plan(good, tmp_path / "alone", "good")], runtime)
    together, alone = weights(tmp_path / "p" / "good"), weights(tmp_path / "alone" / "good")
    assert all(torch.equal(together[key], alone[key]) for key in alone)


def test_an_observer_stops_one_trial_and_the_other_goes_on(make_config, runtime, tmp_path):
    config = make_config(eval_every_n_samples=64)

    ended = []

    class StopFirst(Observer):
        def on_end(self, name, result):
            ended.append((name, result.status))

        def on_eval(self, name, samples, metrics):
            return "not worth it" if name == "first" and samples == 128 else None

    plans = [plan(config, tmp_path, "first"), plan(config, tmp_path, "second")]
    results = train_pack(plans, runtime, StopFirst())
    assert (results["first"].status, results["first"].samples) == ("stopped", 128)
    assert results["first"].reason == "not worth it"
    assert results["second"].status == "finished"
    assert RunFolder(tmp_path / "first").weights()[0] == 128
    assert ended == [("first", "stopped"), ("second", "finished")]


def test_pretrained_saes_are_evaluated_as_they_are(make_config, runtime, tmp_path):
    first = train_pack([plan(make_config(), tmp_path, "a")], runtime)["a"]
    frozen = make_config(**{"saes.pretrained_sae_paths": str(tmp_path / "a"), "saes.retrain_saes": False})
    second = train_pack([plan(frozen, tmp_path, "b")], runtime)["b"]
    assert second.evaluation[HOOK]["fvu"] == pytest.approx(first.evaluation[HOOK]["fvu"], rel=1e-6)


def test_a_trial_that_keeps_its_saes_stays_as_it_is_beside_one_that_trains(make_config, runtime, tmp_path):
    first = train_pack([plan(make_config(), tmp_path, "a")], runtime)["a"]
    frozen = make_config(**{"saes.pretrained_sae_paths": str(tmp_path / "a"), "saes.retrain_saes": False})
    results = train_pack([plan(frozen, tmp_path, "kept"), plan(make_config(seed=9), tmp_path, "trained")], runtime)
    assert [r.status for r in results.values()] == ["finished", "finished"]
    before, after = weights(tmp_path / "a"), weights(tmp_path / "kept")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert results["kept"].evaluation[HOOK]["fvu"] == pytest.approx(first.evaluation[HOOK]["fvu"], rel=1e-6)


@pytest.mark.parametrize("sae_type", [*FOUR, "topk"])
def test_bf16_products_train_on_the_cpu_as_well(make_config, runtime, tmp_path, sae_type):
    changes = FOUR.get(sae_type, {"saes.sae_type": "topk", "saes.k": 4})
    full, half = (make_config(mixed_precision=p, **changes) for p in ("no", "bf16"))
    wanted, found = (train_pack([plan(c, tmp_path, n)], runtime)[n] for n, c in (("full", full), ("half", half)))
    assert found.status == "finished"
    assert found.evaluation[HOOK]["fvu"] == pytest.approx(wanted.evaluation[HOOK]["fvu"], rel=0.02)


@pytest.mark.parametrize(("seconds", "polls"), [(0.0, [1, 11, 21]), (0.5, [1, 3, 5]), (3.0, [1, 2, 3])])
def test_ranks_with_slow_windows_agree_on_an_interrupt_in_time(monkeypatch, seconds, polls):
    clock = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    agreed = []
    observer = SimpleNamespace(should_interrupt=lambda: False)
    together = SimpleNamespace(data=SimpleNamespace(size=2), agree=lambda value: agreed.append(windows) or value)
    config = SimpleNamespace(log_every_n_grad_steps=20)
    ranks = loop._Loop.__new__(loop._Loop)
    vars(ranks).update(observer=observer, ranks=together, config=config, _next_poll=1, _polled=(0, 0.0))
    for windows in range(1, 25):
        clock[0] += seconds
        assert not ranks._interrupted(windows)
    assert agreed[:3] == polls


def test_a_warm_up_longer_than_one_pass_is_refused(make_config, runtime, tmp_path):
    config = make_config(**{"data.n_train_samples": None, "lr_schedule": "constant", "warmup_samples": 100_000})
    with pytest.raises(UserError, match=r"'warmup_samples' \(100000\) exceeds"):
        train_pack([plan(config, tmp_path, "a")], runtime)


def test_numbers_of_a_window_follow_the_members_that_are_left(make_config, runtime):
    saes = [get_sae("relu")(4, 8, make_config().saes, dtype=torch.float64) for _ in range(3)]
    configs = [make_config(lr=rate) for rate in (1e-3, 2e-3, 3e-3)]
    members = [Member(str(i), HOOK, c, sae) for i, (c, sae) in enumerate(zip(configs, saes, strict=True))]
    pack = Pack(members, runtime, total_samples=100)
    before = [row["lr"] for _, row in pack.metrics(50)]
    pack.drop(members[:1], "pruned")
    assert [row["lr"] for _, row in pack.metrics(50)] == before[1:]


def test_a_cache_that_cannot_be_made_leaves_no_run_folder(make_config, runtime, tmp_path):
    (tmp_path / "file").touch()
    config = make_config(activations={"cache": str(tmp_path / "file" / "cache")})
    with pytest.raises(UserError, match=r"'activations\.cache'.*cannot be made"):
        train_pack([plan(config, tmp_path, "a")], runtime)
    assert not (tmp_path / "a").exists()


def test_norm_outliers_have_one_limit_that_is_stored_with_the_weights(make_config, runtime, tmp_path):
    from saeopt.evaluation.held_out import measure

    config = make_config(**{"data.mask_norm_outliers": 1.1, "data.eval_batch_size": 3})
    result = train_pack([plan(config, tmp_path, "a")], runtime)["a"]
    plain = train_pack([plan(make_config(), tmp_path, "plain")], runtime)["plain"]
    assert 0 < result.evaluation[HOOK]["n_tokens"] < plain.evaluation[HOOK]["n_tokens"]
    loaded = load_checkpoint(tmp_path / "a")
    limit = loaded.saes[HOOK].norm_limit
    assert math.isfinite(limit)
    assert load_checkpoint(tmp_path / "plain").saes[HOOK].norm_limit == math.inf
    other = make_config(**{"data.mask_norm_outliers": 1.1, "data.eval_batch_size": 20})
    again = measure(loaded, other, torch.device("cpu"), None, True)[0][HOOK]
    for name in ("n_tokens", "fvu", "ce_degradation"):
        assert again[name] == pytest.approx(result.evaluation[HOOK][name], rel=1e-4)
    loaded.saes[HOOK].norm_limit = math.inf  # as a version stored it that had no limit
    measure(loaded, other, torch.device("cpu"), None, False)
    assert loaded.saes[HOOK].norm_limit == limit
    measure(loaded, make_config(**{"data.mask_norm_outliers": 1.2}), torch.device("cpu"), None, False)
    assert loaded.saes[HOOK].norm_limit == pytest.approx(limit * 1.2 / 1.1)


def test_a_resumed_run_keeps_its_stored_limit_for_norm_outliers(make_config, runtime, tmp_path, monkeypatch):
    config = make_config(**{"data.mask_norm_outliers": 1.1})

    class Interrupt(Observer):
        def should_interrupt(self) -> bool:
            return True

    train_pack([plan(config, tmp_path, "a")], runtime, Interrupt())
    monkeypatch.setattr(setup, "calibration", None)
    train_pack([plan(config, tmp_path, "a", resume=True)], runtime)
    states = [load_weights(RunFolder(tmp_path / "a").weights_path(n)).saes[HOOK].norm_limit for n in (16, 256)]
    assert states[0] == states[1] < math.inf
