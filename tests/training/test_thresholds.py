"""`saes.threshold: held_out`: set when training ends, on samples that are neither trained on nor reported on."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from saeopt.activations.source import open_samples, open_source
from saeopt.activations.stored import StoredRows
from saeopt.config import stream_key
from saeopt.errors import UserError
from saeopt.runs.weights import load_run
from saeopt.saes.batch_topk import running_mean
from saeopt.training import Observer, TrialPlan, train_pack
from saeopt.training.runtime import Runtime
from saeopt.training.thresholds import Rank

HELD_OUT = {
    "saes.sae_type": "batch_topk",
    "saes.k": 2.5,
    "saes.threshold": "held_out",
    "data.n_threshold_samples": 12,
    "gradient_accumulation_steps": 1,
}


@pytest.fixture(scope="module")
def runtime():
    return Runtime("cpu")


def train(config, runtime, folder, observer=None, resume=False):
    return train_pack([TrialPlan("a", config, folder, resume)], runtime, observer)["a"]


def weights(folder):
    return {f"{hook}/{n}": t for hook, sae in load_run(folder)[1].items() for n, t in sae.state_dict().items()}


def l0(config, folder):
    """Of a run's SAE on the samples for thresholds."""
    source, (sae,) = open_source(config), load_run(folder)[1].values()
    samples, hook = open_samples(config.data, source), config.saes.site(config.saes.keys[0]).reads[0]
    active = n = 0
    for tokens_BT in samples.threshold_batches(7):
        keep_BT = ~torch.isin(tokens_BT, torch.tensor(sorted(source.special_ids)))
        active += int((sae.encode(source.activations(tokens_BT, [hook])[hook][keep_BT]) > 0).sum())
        n += int(keep_BT.sum())
    return active, n


def found(values_parts, k, dtype):
    """The rank of values that lie with several processes."""
    ranks = [Rank(k, dtype, torch.device("cpu")) for _ in values_parts]
    while not ranks[0].found:
        for rank, values_Nh in zip(ranks, values_parts, strict=True):
            for block_bh in values_Nh.split(3):
                rank.count(block_bh)
        total = sum(rank.counts for rank in ranks)
        for rank in ranks:
            rank.counts.copy_(total)
            rank.close_pass()
    assert {float(rank.value) for rank in ranks} == {float(ranks[0].value)}
    return ranks[0].value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [0.1, 1.7, 4])
def test_as_many_values_as_wanted_are_above_the_rank_however_they_are_divided(dtype, k):
    values_Nh = torch.relu(torch.randn(50, 9, generator=torch.Generator().manual_seed(0), dtype=dtype))
    values_Nh[0] *= 1e-20
    theta = found([values_Nh], k, dtype)
    kept = min(int(50 * k), int((values_Nh > 0).sum()))
    assert int((values_Nh > theta).sum()) == kept
    assert theta == values_Nh.flatten().sort(descending=True).values[kept]
    assert found(values_Nh.split([20, 30]), k, dtype) == theta


def test_all_are_kept_where_fewer_are_positive_and_none_of_equal_ones():
    few = torch.tensor([[0.0, 2.0], [0.0, 0.0], [1.0, 0.0]])
    assert found([few], 1.5, torch.float32) == 0
    assert found([torch.full((4, 3), 0.7)], 1.5, torch.float32) == torch.tensor(0.7)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"saes.sae_type": "matryoshka_batch_topk", "saes.normalize_activations": "whiten"},
        {"saes.sae_positions": [{"read": "blocks.1.mlp.hook_in", "write": "blocks.1.hook_mlp_out"}]},
    ],
)
def test_held_out_l0_is_k_and_nothing_else_is_changed(make_config, runtime, tmp_path, changes):
    config = make_config(**HELD_OUT | changes)
    running = make_config(**HELD_OUT | changes | {"saes.threshold": "running"})
    assert stream_key(config) == stream_key(running)
    for name, each in {"held_out": config, "running": running}.items():
        assert train(each, runtime, tmp_path / name).status == "finished"
    active, n = l0(config, tmp_path / "held_out")
    assert active == int(2.5 * n)
    assert l0(running, tmp_path / "running")[0] != active
    ours, theirs = (weights(tmp_path / name) for name in ("held_out", "running"))
    assert {n.rpartition("/")[2] for n in ours if not torch.equal(ours[n], theirs[n])} == {"threshold"}
    (row,) = json.loads((tmp_path / "held_out" / "evaluation.json").read_text()).values()
    assert row["evaluated"]["n_samples"] == 20  # not those that the threshold was set on


def test_it_is_the_same_in_a_pack_and_after_an_interruption(make_config, runtime, tmp_path):
    config, other = make_config(**HELD_OUT), make_config(**HELD_OUT | {"saes.k": 1, "seed": 5})
    running = make_config(**HELD_OUT | {"saes.threshold": "running", "lr": 1e-3})

    class Stopping(Observer):
        def __init__(self):
            self.windows = 0

        def should_interrupt(self):
            self.windows += 1
            return self.windows == 10

    train(config, runtime, tmp_path / "alone")
    plans = {name: TrialPlan(name, c, tmp_path / name) for name, c in zip("abc", (config, other, running), strict=True)}
    train_pack(list(plans.values()), runtime)
    assert train(config, runtime, tmp_path / "again", Stopping()).status == "interrupted"
    assert train(config, runtime, tmp_path / "again", resume=True).status == "finished"
    alone = weights(tmp_path / "alone")
    assert all(torch.equal(t, alone[n]) for n, t in weights(tmp_path / "again").items())
    for name, tensor in weights(tmp_path / "a").items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-5)
    for name, each, k in (("b", other, 1), ("a", config, 2.5)):
        active, n = l0(each, tmp_path / name)
        assert active == int(k * n)


def test_held_out_data_of_their_own_and_stored_rows_keep_both_parts_apart(make_config, tiny_text, tmp_path):
    both = {"data.n_eval_samples": 4, "data.n_threshold_samples": 3}
    config = make_config(**both, **{"data.eval_dataset_name": str(tiny_text)})
    samples = open_samples(config.data, open_source(config))
    (reported,), (other,) = samples.eval_batches(99), samples.threshold_batches(99)
    assert (len(reported), len(other)) == (4, 3)
    whole = make_config(**{"data.n_eval_samples": 7, "data.eval_dataset_name": str(tiny_text)})
    (all_of_them,) = open_samples(whole.data, open_source(whole)).eval_batches(99)
    assert torch.equal(all_of_them, torch.cat([reported, other]))
    rows = StoredRows(config.data, SimpleNamespace(n_rows=20 * 16, path="x"))
    trained = set(next(rows.train(0, 13)).tokens_bT.flatten().tolist())
    (reported,), (other,) = rows.eval_batches(99), rows.threshold_batches(99)
    assert trained == set(range(13 * 16))
    assert (other.min(), other.max()) == (13 * 16, 16 * 16 - 1)
    assert (reported.min(), reported.max()) == (16 * 16, 20 * 16 - 1)


def test_what_it_needs_and_where_it_is_not_is_said(make_config):
    with pytest.raises(UserError, match=r"'saes.threshold: held_out' needs 'data.n_threshold_samples'"):
        make_config(**HELD_OUT | {"data.n_threshold_samples": None})
    one = {"saes.threshold": "running", "saes.per_hook": {"blocks.1.hook_resid_pre": {"threshold": "held_out"}}}
    with pytest.raises(UserError, match=r"needs 'data.n_threshold_samples'"):
        make_config(**HELD_OUT | one | {"data.n_threshold_samples": None})
    with pytest.raises(UserError, match=r"no effect on 'retrain_saes: false'"):
        make_config(**HELD_OUT | {"saes.retrain_saes": False, "saes.pretrained_sae_paths": "x"})
    with pytest.raises(UserError, match=r"saes\.threshold"):
        make_config(**{"saes.threshold": "held_out"})
    too_many = make_config(**HELD_OUT | {"data.n_threshold_samples": 1_000_000})
    source = open_source(too_many)
    with pytest.raises(UserError, match=r"'data.n_threshold_samples': 1000020 held-out samples"):
        open_samples(too_many.data, source)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_stacks_threshold_is_the_one_that_is_saved(make_config, tmp_path):
    config = make_config(**HELD_OUT)
    assert train(config, Runtime("cuda"), tmp_path / "a").status == "finished"
    active, n = l0(config, tmp_path / "a")  # counted on the CPU: other rounding
    assert active == pytest.approx(2.5 * n, rel=0.02)
    (row,) = json.loads((tmp_path / "a" / "evaluation.json").read_text()).values()
    running = make_config(**HELD_OUT | {"saes.threshold": "running"})
    assert train(running, Runtime("cuda"), tmp_path / "b").status == "finished"
    (other,) = json.loads((tmp_path / "b" / "evaluation.json").read_text()).values()
    assert row["l0"] != other["l0"]


def test_the_running_threshold_follows_one_that_falls() -> None:
    mean, windows = torch.tensor(0.0), torch.tensor(0.0)
    for n in range(400):  # a third lower at the end, as in a short run
        latest = 1 - n / 1200
        mean, windows = running_mean(mean, windows, torch.tensor(latest), torch.tensor(1.0))
    assert latest < float(mean) < 1.03 * latest
