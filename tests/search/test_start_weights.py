"""`start_from` with `from_weights`: trials that begin with the weights of another study's, by real workers."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _chaos import PRELOAD, run_worker
from _worker_kit import Trainer, spec_in, start, states

from saeopt.config.io import load_run_config
from saeopt.config.study import StudySpec
from saeopt.config.study_file import study_spec
from saeopt.errors import HostError, UserError, WorkerFault
from saeopt.files import digest
from saeopt.reach import with_fitting_weights
from saeopt.search.space import Space
from saeopt.trials.create import create_study
from saeopt.trials.starts import check_weights, with_starts
from saeopt.trials.storage import Store
from saeopt.views import monitoring
from saeopt.workers import loop

HOOK = "blocks.1.hook_resid_pre"
forks = multiprocessing.get_context("forkserver")


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/store.db"


@pytest.fixture
def spec(tiny_model_dir: Path, tiny_text: Path, tmp_path: Path) -> Callable[..., StudySpec]:
    def make(name: str, **fields: Any) -> StudySpec:
        base = {
            "tlens_model_path": str(tiny_model_dir), "threads": 1, "lr_schedule": "constant",
            "log_every_n_grad_steps": 1,
            "data": {
                "dataset_name": str(tiny_text), "is_tokenized": False, "streaming": False, "column_name": "text",
                "context_length": 16, "n_train_samples": 128, "train_batch_size": 4, "n_eval_samples": 16,
            },
            "saes": {"sae_type": "topk", "sae_positions": [HOOK], "dict_size_to_input_ratio": 4, "k": 4},
        }  # fmt: skip
        raw = {"name": name, "base": base, "output_dir": str(tmp_path / "out"), "heartbeat": 0.5, "grace": 3.0}
        return study_spec(raw | fields, f"{name}.yaml")

    return make


def work(address: str, study: str, log: Path) -> None:
    forks.set_forkserver_preload(PRELOAD)
    process = forks.Process(target=run_worker, args=(address, study, log))
    process.start()
    process.join(240)
    assert process.exitcode == 0, log.read_text()


def found(spec: StudySpec) -> list[Any]:
    assert spec.start_from is not None
    return spec.start_from.found or []


def first_fvu(run: Path) -> float:
    return float(json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["fvu"])


def test_trials_begin_with_the_weights_where_they_fit(
    spec: Callable[..., StudySpec], address: str, tmp_path: Path
) -> None:
    small = spec("small", space={"lr": [1e-3, 5e-3]})
    store = Store.open(address)
    create_study(store, small)
    work(address, "small", tmp_path / "small.log")
    asked = {"study": "small", "top": 2, "from_weights": True}
    space = {"lr": {"low": 1e-4, "high": 1e-2}, "saes.dict_size_to_input_ratio": [4]}
    more = {"sampler": {"type": "tpe", "n_startup_trials": 3}, "max_trials": 3, "start_from": asked}
    new, _ = with_starts(spec("new", space=space, **more), address)
    new, said = with_fitting_weights(new)
    assert said == ["2 of 2 start from the weights of those trials"]
    create_study(store, new)
    work(address, "new", tmp_path / "new.log")
    trials = store.study("new").trials
    assert [t.state.name for t in trials] == ["COMPLETE"] * 3
    assert [t.user_attrs.get("started_from") for t in trials] == [
        *(f"small #{one.trial}, its weights" for one in found(new)), None,
    ]  # fmt: skip
    for i, one in enumerate(found(new)):
        begun = json.loads((new.run_dir(i) / "begun_from.json").read_text())
        assert begun == {HOOK: {"file": one.weights.file, "sha256": one.weights.sha256, "sae": HOOK}}
        assert digest(Path(one.weights.file)) == one.weights.sha256
        assert first_fvu(new.run_dir(i)) < 0.9 * first_fvu(small.run_dir(one.trial))
    assert not (new.run_dir(2) / "begun_from.json").exists()
    config = Space(store.spec("new")).config(dict(trials[0].params))
    assert config.saes.pretrained_sae_paths == [found(new)[0].weights.file]

    wider, _ = with_starts(spec("wider", space=space | {"saes.dict_size_to_input_ratio": [8]}, **more), address)
    wider, said = with_fitting_weights(wider)
    assert said[0].startswith("0 of 2 start from the weights of those trials; ")
    assert said[0].endswith("16×64 W_enc, here 16×128")
    assert [one.weights for one in found(wider)] == [None, None]
    relu, _ = with_starts(spec("relu", space=space | {"sae_type": ["relu"]}, **more), address)
    assert "topk is not relu" in with_fitting_weights(relu)[1][0]
    with pytest.raises(UserError, match="--elsewhere"):
        with_fitting_weights(with_starts(spec("there", space=space, **more), address)[0], elsewhere=True)
    with pytest.raises(UserError, match="beside 'seeds: 2': all would start"):
        with_fitting_weights(with_starts(spec("seeds", space=space, seeds=2, **more), address)[0])

    file = Path(found(new)[0].weights.file)
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(UserError, match="has changed since the study was made"):
        check_weights(found(new)[0].weights)
    file.unlink()
    with pytest.raises(HostError, match="No such file"):
        check_weights(found(new)[0].weights)
    with pytest.raises(UserError, match="has no weights of trial"):
        with_starts(spec("late", space=space, **more), address)
    store.close()


@pytest.fixture
def other_model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """Another model with the same tokenizer: 24 wide, three layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "other"
    shutil.copytree(tiny_model_dir, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = LlamaConfig.from_pretrained(tiny_model_dir)
    config.hidden_size, config.num_hidden_layers, config.intermediate_size, config.head_dim = 24, 3, 48, 12
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_study_of_another_model_width_and_architecture_starts_from_the_l0_that_was_reached(
    spec: Callable[..., StudySpec], address: str, tmp_path: Path, other_model: Path
) -> None:
    small = spec("small", space={"saes.k": [4, 8], "lr": [1e-3]})
    store = Store.open(address)
    create_study(store, small)
    work(address, "small", tmp_path / "small.log")
    saes = {"sae_type": "relu", "sae_positions": ["blocks.2.hook_resid_pre"], "dict_size_to_input_ratio": 8}
    base = {**small.base, "tlens_model_path": str(other_model), "saes": saes}
    space = {"saes.target_l0": {"low": 2, "high": 16, "log": True}, "lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    asked = {"study": "small", "front": True, "from_weights": True}
    more = {"sampler": {"type": "tpe", "n_startup_trials": 2}, "max_trials": 3, "start_from": asked}
    new, said = with_starts(spec("new", base=base, space=space, **more), address)
    assert [line.partition(":")[0] for line in said] == ["first come the fronts of study small"]
    new, said = with_fitting_weights(new)
    assert said[0].startswith("0 of 2 start from the weights of those trials; ")
    assert {one.params["saes.target_l0"] for one in found(new)} == {4.0, 8.0}
    assert {one.params["lr"] for one in found(new)} == {1e-3}
    create_study(store, new)
    work(address, "new", tmp_path / "new.log")
    trials = store.study("new").trials
    assert [t.state.name for t in trials] == ["COMPLETE"] * 3, [t.user_attrs.get("reason") for t in trials]
    for i, one in enumerate(found(new)):
        assert trials[i].user_attrs["started_from"] == f"small #{one.trial}"
        config = load_run_config(new.run_dir(i) / "final_config.yaml")
        assert config.saes.target_l0 == one.params["saes.target_l0"]
        assert config.tlens_model_path == str(other_model)
    store.close()


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, StudySpec, Path]:
    """A study of four trials whose first starts from a file, which training only pretends to read."""
    for name in ("on_trial_start", "on_trial_end", "on_trial_paused", "on_study_progress"):
        monkeypatch.setattr(monitoring, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(loop, "_HOST_PAUSE", 0.0)
    file = tmp_path / "samples_64.safetensors"
    file.write_bytes(b"weights")
    start_from = {
        "study": "other", "top": 1,
        "found": [{"trial": 5, "params": {"lr": 0.002}, "weights": {"file": str(file), "sha256": digest(file)}}],
    }  # fmt: skip
    more = {"sampler": "random", "max_trials": 4, "start_from": start_from, "early_stopping": "none"}
    spec = spec_in(tmp_path, space={"lr": {"low": 1e-3, "high": 1e-2}}, **more)
    return Store.open(f"sqlite:///{tmp_path}/pretended.db"), spec, file


def test_a_trial_whose_weights_have_changed_fails_with_a_line_and_the_others_go_on(
    pretended: tuple[Store, StudySpec, Path],
) -> None:
    store, spec, file = pretended
    worker = start(store, spec, Trainer())
    file.write_bytes(b"other weights")
    worker.run()
    assert states(store) == ["FAIL", *["COMPLETE"] * 3]
    assert "has changed since the study was made" in store.study("s").trials[0].user_attrs["reason"]
    store.close()


def test_a_host_without_the_weights_gives_the_trial_back_and_the_worker_says_why(
    pretended: tuple[Store, StudySpec, Path],
) -> None:
    store, spec, file = pretended
    worker = start(store, spec, Trainer())
    kept = file.read_bytes()
    file.unlink()
    with pytest.raises(WorkerFault, match=r"samples_64\.safetensors: No such file or directory: trials start from its"):
        worker.run()
    assert states(store)[0] == "WAITING"
    file.write_bytes(kept)
    assert start(store, spec, Trainer()).run() == 4
    assert states(store) == ["COMPLETE"] * 4
    store.close()


def test_a_trial_that_goes_on_from_its_checkpoint_needs_the_weights_no_more(
    pretended: tuple[Store, StudySpec, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, spec, file = pretended
    worker = start(store, spec, Trainer())
    file.unlink()
    monkeypatch.setattr(loop, "start_of", lambda folder, config: 32)
    worker.run()
    assert states(store) == ["COMPLETE"] * 4
    store.close()
