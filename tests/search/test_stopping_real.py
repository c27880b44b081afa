"""Real packs: four topk SAEs that learn and four that cannot, all on one stream. Who cannot is stopped."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from saeopt.config.study_file import study_spec
from saeopt.trials.create import create_study
from saeopt.trials.storage import Store
from saeopt.views import monitoring
from saeopt.workers.local import LocalTraining
from saeopt.workers.loop import Options, Worker


@pytest.fixture(scope="module")
def training() -> LocalTraining:
    return LocalTraining("cpu")


@pytest.mark.parametrize(
    ("kind", "objectives", "every"),
    [
        ("pareto", ["fvu", "cosine"], 120),
        ("median", ["fvu"], 0),
    ],
    ids=["pareto of what evaluations measure", "median"],
)
def test_the_hopeless_of_one_pack_are_stopped(
    kind: str, objectives: list[str], every: int, training: LocalTraining, stories: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in ("on_trial_start", "on_trial_end", "on_study_progress"):
        monkeypatch.setattr(monitoring, name, lambda *args, **kwargs: None)
    text = stories.parents[1] / "data/tinystories-1000/tinystories_1000.json"
    base: dict[str, Any] = {
        "recipe": 2, "tlens_model_path": str(stories), "threads": 1, "warmup_samples": 0, "log_every_n_grad_steps": 5,
        "save_every_n_samples": 0, "eval_every_n_samples": every,
        "data": {
            "dataset_name": str(text), "is_tokenized": False, "column_name": "text", "context_length": 64,
            "n_train_samples": 600, "n_eval_samples": 20, "train_batch_size": 8,
        },
        "saes": {"sae_type": "topk", "sae_positions": ["blocks.2.hook_resid_pre"], "dict_size_to_input_ratio": 8},
    }  # fmt: skip
    raw = {
        "name": "s", "base": base, "space": {"saes.k": [8, 16, 24, 32], "lr": [5e-3, 1e-5]}, "objectives": objectives,
        "early_stopping": {"type": kind, "warmup": 0.2, "n_startup_trials": 1, "collapse": None},
        "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    spec = study_spec(raw, "s.yaml")
    store = Store.open(f"sqlite:///{tmp_path}/store.db")
    create_study(store, spec)
    Worker(store, "s", Options(poll=0.05), training, lambda space: 8, threading.Event()).run()
    trials = store.study("s").trials
    store.close()
    hopeless = [t for t in trials if t.params["lr"] < 1e-4]
    assert [t.state.name for t in hopeless] == ["PRUNED"] * 4, [t.user_attrs.get("reason") for t in trials]
    assert all(f"stopped early by {kind} at" in t.user_attrs["reason"] for t in hopeless)
    assert all(t.user_attrs["samples"] < 600 for t in hopeless)
    assert any(t.state.name == "COMPLETE" for t in trials)
