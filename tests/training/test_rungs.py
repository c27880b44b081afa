"""Rungs of the loop, with observers written by hand: who is paused could go on as if nothing had been."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_loop import plan, weights
from test_processes import ENVIRONMENT, JOB, free_port, write_job

from saeopt.runs.folder import RunFolder, resume_point
from saeopt.training import Observer, measuring, train_pack
from saeopt.training.plan import Rungs
from saeopt.training.runtime import Runtime

RUNG = 96  # no multiple of the samples between checkpoints, nor of those between log steps


@pytest.fixture(scope="module")
def runtime():
    return Runtime("cpu")


class Halving(Observer):
    """Pauses whom it is told to pause, and remembers what it was asked."""

    def __init__(self, *behind, held_out=0, leaves=False):
        self.behind, self.held_out, self.leaves = behind, held_out, leaves
        self.asked, self.ended, self.checkpoints = [], [], set()

    def rungs(self, total, window):
        return Rungs((RUNG, total), self.held_out)

    def on_rung(self, samples, metrics):
        assert not self.checkpoints & {(name, samples) for name in metrics}, "judged before anything is written"
        self.asked.append((samples, metrics))
        return {name: f"{name} is behind" for name in self.behind if name in metrics}

    def on_checkpoint(self, name, samples, path):
        self.checkpoints.add((name, samples))

    def on_end(self, name, result):
        self.ended.append((name, result.status, result.samples))

    def should_interrupt(self):
        return self.leaves and bool(self.asked)


def kinds(make_config, **changes):
    hooks = {"saes.sae_positions": ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]}
    return {
        "a": make_config(seed=1, **changes),
        "b": make_config(seed=2, **changes),
        "c": make_config(**{"saes.sae_type": "topk", "saes.k": 4}, **hooks, **changes),
    }


def tensors(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("shuffle", [0, 2000], ids=["in order", "shuffle buffer"])
def test_who_is_paused_goes_on_to_the_bits_of_a_run_without_rungs(make_config, runtime, tmp_path, shuffle):
    data = {"data.shuffle_buffer_tokens": shuffle} if shuffle else {}
    configs = kinds(make_config, **data)
    train_pack([plan(c, tmp_path / "whole", name) for name, c in configs.items()], runtime)
    observer = Halving("a", "b", "c")
    results = train_pack([plan(c, tmp_path / "cut", name) for name, c in configs.items()], runtime, observer)
    assert observer.ended == [(name, "paused", RUNG) for name in configs]
    assert [samples for samples, _ in observer.asked] == [RUNG]
    for name, result in results.items():
        folder = RunFolder(tmp_path / "cut" / name)
        assert (result.reason, result.checkpoint) == (f"{name} is behind", folder.weights_path(RUNG))
        assert (folder.status()["status"], resume_point(folder.path)) == ("paused", RUNG)
    again = Halving("a", "b", "c")
    train_pack([plan(c, tmp_path / "cut", name, resume=True) for name, c in configs.items()], runtime, again)
    assert again.ended == [(name, "finished", 256) for name in configs]
    assert again.asked == [], "who starts at a rung is past it"
    for name in configs:
        assert same(weights(tmp_path / "whole" / name), weights(tmp_path / "cut" / name)), name


def test_what_is_paused_has_the_checkpoint_of_an_interrupted_run_and_the_others_have_one_too(
    make_config, runtime, tmp_path
):
    configs = kinds(make_config)
    paused, left = Halving("b"), Halving(leaves=True)
    train_pack([plan(c, tmp_path / "paused", name) for name, c in configs.items()], runtime, paused)
    results = train_pack([plan(c, tmp_path / "left", name) for name, c in configs.items()], runtime, left)
    assert {r.status for r in results.values()} == {"interrupted"}
    assert {r.samples for r in results.values()} == {RUNG}, "who is wanted elsewhere leaves at the rung itself"
    assert sorted(paused.ended) == [("a", "finished", 256), ("b", "paused", RUNG), ("c", "finished", 256)]
    files = [("a", "weights_path"), ("b", "weights_path"), ("b", "state_path"), ("c", "weights_path")]
    for name, of in files:  # who went on has newer states
        one, other = (getattr(RunFolder(tmp_path / end / name), of)(RUNG) for end in ("paused", "left"))
        assert same(tensors(one), tensors(other)), (name, of)


def test_the_rung_tells_what_training_measures_of_everybody(make_config, runtime, tmp_path):
    configs = kinds(make_config)
    observer = Halving("a")
    train_pack([plan(c, tmp_path, name) for name, c in configs.items()], runtime, observer)
    [(_, metrics)] = observer.asked
    assert {name: sorted(rows) for name, rows in metrics.items()} == {
        name: sorted(c.saes.sae_positions) for name, c in configs.items()
    }
    rows = [row for of in metrics.values() for row in of.values()]
    assert all({"fvu", "l0"} <= row.keys() and "cosine" not in row for row in rows)
    written = [json.loads(line) for line in RunFolder(tmp_path / "b").metrics_path.read_text().splitlines()]
    assert any(row["samples"] == RUNG for row in written), "the log has what was compared"


def test_held_out_samples_are_evaluated_in_one_pass_for_all(make_config, runtime, tmp_path, monkeypatch):
    configs = kinds(make_config)
    passes, evaluate = [], measuring.evaluate

    def counted(saes, *args, **kwargs):
        passes.append(sorted(saes))
        return evaluate(saes, *args, **kwargs)

    monkeypatch.setattr(measuring, "evaluate", counted)
    observer = Halving("a", held_out=7)
    results = train_pack([plan(c, tmp_path, name) for name, c in configs.items()], runtime, observer)
    members = [(name, hook) for name, c in configs.items() for hook in c.saes.sae_positions]
    assert passes[0] == sorted(members)
    assert passes[1:] == [[m for m in sorted(members) if m[0] != "a"]], "the end: without who was paused"
    [(_, metrics)] = observer.asked
    for name, rows in metrics.items():
        for row in rows.values():
            assert row.keys() >= {"fvu", "cosine", "ce_recovered"}, name
            assert row["n_tokens"] < 0.7 * results["b"].evaluation["blocks.1.hook_resid_pre"]["n_tokens"]
    assert results["a"].evaluation == metrics["a"]


def test_rungs_change_no_bit_of_who_goes_on(make_config, runtime, tmp_path):
    configs = kinds(make_config)
    for end, observer in (("with", Halving(held_out=10)), ("without", Observer())):
        train_pack([plan(c, tmp_path / end, name) for name, c in configs.items()], runtime, observer)
    for name in configs:
        assert same(weights(tmp_path / "with" / name), weights(tmp_path / "without" / name)), name


@pytest.mark.slow
def test_ranks_agree_on_who_is_paused(make_config, tmp_path: Path):
    """What the second rank's observer says counts nowhere, or the ranks would wait for each other for ever."""
    configs = {name: c for name, c in kinds(make_config, **{"data.train_batch_size": 4}).items() if name != "c"}
    rungs = {"samples": [RUNG], "held_out": 10, "behind": [["b"], ["a"]]}
    job = write_job(tmp_path / "job.json", configs, rungs=rungs)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    port = f"--master_port={free_port()}"
    subprocess.run([*command, port, str(JOB), job], check=True, env=ENVIRONMENT, timeout=300)
    told = [json.loads((tmp_path / f"results_{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1] == {"a": ["finished", 256], "b": ["paused", RUNG]}
    assert resume_point(tmp_path / "b") == RUNG
