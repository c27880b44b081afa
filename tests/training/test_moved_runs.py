"""A run whose data or language model have moved, or that goes on from another folder, is still the same run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from saeopt.config import load_run_config
from saeopt.errors import UserError
from saeopt.runs.folder import RunFolder
from saeopt.runs.tensor_file import read_metadata, read_tensors, write_tensors
from saeopt.runs.weights import load_run
from saeopt.training import Observer, TrialPlan, train_pack
from saeopt.training.launch import resolve
from saeopt.training.runtime import Runtime
from saeopt.workers.folder import start_of


class Interrupt(Observer):
    polls = 0

    def should_interrupt(self) -> bool:
        self.polls += 1
        return self.polls == 7


def go_on(run_dir: Path, *changes: str):
    config, _ = resolve(None, changes, run_dir)
    return train_pack([TrialPlan("a", config, run_dir, resume=True)], Runtime("cpu"))["a"]


def test_a_run_goes_on_where_its_data_and_model_lie_now_if_they_are_the_same(
    make_config, tiny_model_dir, tiny_text, tmp_path, monkeypatch
):
    first = tmp_path / "first"
    first.mkdir()
    monkeypatch.chdir(first)
    shutil.copytree(tiny_model_dir, "model")
    shutil.copy(tiny_text, "text.jsonl")
    config = make_config(
        **{"tlens_model_path": "model", "data.dataset_name": "text.jsonl", "data.n_train_samples": 192}
    )
    train_pack([TrialPlan("whole", config, tmp_path / "whole")], Runtime("cpu"))
    cut = train_pack([TrialPlan("a", config, tmp_path / "a")], Runtime("cpu"), Interrupt())["a"]
    assert cut.status == "interrupted"
    shutil.copytree(tmp_path / "a", tmp_path / "b")

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert go_on(tmp_path / "a").status == "finished"  # from another folder

    run = tmp_path / "b"
    lines = (first / "text.jsonl").read_text().splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(lines[:-1]))
    (first / "text.jsonl").rename(tmp_path / "moved.jsonl")
    (first / "model").rename(tmp_path / "moved_model")
    moved = [f"data.dataset_name={tmp_path}/moved.jsonl", f"tlens_model_path={tmp_path}/moved_model"]
    before = sorted(p.name for p in run.iterdir())
    with pytest.raises(UserError, match=r"'data.dataset_name': .*fewer.jsonl does not give the tokens"):
        go_on(run, f"data.dataset_name={tmp_path}/fewer.jsonl", moved[1])
    with pytest.raises(UserError, match=r"'lr' is .* not the same run"):
        go_on(run, *moved, "lr=0.5")
    assert sorted(p.name for p in run.iterdir()) == before
    assert go_on(run, *moved).status == "finished"
    whole, other = (load_run(folder)[1] for folder in (tmp_path / "whole", run))
    for hook, sae in whole.items():
        for name, tensor in sae.state_dict().items():
            assert torch.equal(tensor, other[hook].state_dict()[name])
    assert load_run_config(RunFolder(run).config_path).data.dataset_name == f"{tmp_path}/moved.jsonl"


def test_another_language_model_at_the_same_place_is_noticed(make_config, tiny_model_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = make_config(tlens_model_path=str(tmp_path / "model"))
    train_pack([TrialPlan("a", config, tmp_path / "a")], Runtime("cpu"), Interrupt())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"the language model .* does not give the model"):
        go_on(tmp_path / "a")


def test_a_worker_takes_up_a_trial_whose_paths_are_found_elsewhere(make_config, tiny_text, tmp_path, monkeypatch):
    for host in ("one", "two"):
        (tmp_path / host).mkdir()
        shutil.copy(tiny_text, tmp_path / host / "text.jsonl")
    monkeypatch.chdir(tmp_path / "one")
    here = make_config(**{"data.dataset_name": "text.jsonl"})
    train_pack([TrialPlan("a", here, tmp_path / "a")], Runtime("cpu"), Interrupt())
    (tmp_path / "one" / "text.jsonl").unlink()
    monkeypatch.chdir(tmp_path / "two")
    there = make_config(**{"data.dataset_name": "text.jsonl"})
    assert there.data.dataset_name != here.data.dataset_name
    assert start_of(tmp_path / "a", there) > 0


def test_a_run_of_a_version_without_fingerprints_does_not_move(make_config, tiny_text, tmp_path):
    train_pack([TrialPlan("a", make_config(), tmp_path / "a")], Runtime("cpu"), Interrupt())
    state = next((tmp_path / "a" / "state").iterdir())
    tensors, metadata = read_tensors(state), read_metadata(state)
    write_tensors(state, tensors, {k: v for k, v in metadata.items() if k != "identity"})
    shutil.copy(tiny_text, tmp_path / "moved.jsonl")
    with pytest.raises(UserError, match=r"'data.dataset_name' is not what .*final_config.yaml says"):
        go_on(tmp_path / "a", f"data.dataset_name={tmp_path}/moved.jsonl")
    assert go_on(tmp_path / "a").status == "finished"
