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


ROWS = [
    ("pareto", ["fvu", "explained_variance"], {}),
    ("pareto", ["fvu", "cosine"], {"eval_every_n_samples": 120}),
    ("median", ["fvu"], {}),
    ("asha", ["fvu"], {}),
    ("halving", ["fvu", "explained_variance"], {}),
    ("halving", ["fvu", "cosine"], {}),
]


@pytest.mark.parametrize("pack", [8, pytest.param(2, marks=pytest.mark.slow)], ids=["one pack of 8", "packs of 2"])
@pytest.mark.parametrize(("kind", "objectives", "fields"), ROWS, ids=[f"{k} {'+'.join(o)}" for k, o, _ in ROWS])
def test_the_hopeless_are_stopped_in_every_row(
    kind: str, objectives: list[str], fields: dict[str, Any], pack: int, training: LocalTraining, stories: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in ("on_trial_start", "on_trial_end", "on_trial_paused", "on_study_progress"):
        monkeypatch.setattr(monitoring, name, lambda *args, **kwargs: None)
    text = stories.parents[1] / "data/tinystories-1000/tinystories_1000.json"
    base: dict[str, Any] = {
        "recipe": 2, "tlens_model_path": str(stories), "threads": 1, "warmup_samples": 0, "log_every_n_grad_steps": 5,
        "save_every_n_samples": 0, **fields,
        "data": {
            "dataset_name": str(text), "is_tokenized": False, "column_name": "text", "context_length": 64,
            "n_train_samples": 600, "n_eval_samples": 20, "train_batch_size": 8,
        },
        "saes": {"sae_type": "topk", "sae_positions": ["blocks.2.hook_resid_pre"], "dict_size_to_input_ratio": 8},
    }  # fmt: skip
    rule = {"rungs": [0.2]} if kind == "halving" else {"warmup": 0.2, "n_startup_trials": 1}
    raw = {
        "name": "s", "base": base, "space": {"saes.k": [8, 16, 24, 32], "lr": [5e-3, 1e-5]}, "objectives": objectives,
        "early_stopping": {"type": kind, "collapse": None, **rule}, "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    spec = study_spec(raw, "s.yaml")
    store = Store.open(f"sqlite:///{tmp_path}/store.db")
    create_study(store, spec)
    Worker(store, "s", Options(poll=0.05), training, lambda space: pack, threading.Event()).run()
    trials = store.study("s").trials
    store.close()
    hopeless = [t for t in trials if t.params["lr"] < 1e-4]
    assert [t.state.name for t in hopeless] == ["PRUNED"] * 4, [t.user_attrs.get("reason") for t in trials]
    how = "paused" if kind == "halving" else "stopped early"
    assert all(t.user_attrs["reason"].startswith(f"{how} by {kind} at ") for t in hopeless)
    assert all(t.user_attrs["samples"] < 600 for t in hopeless)
    assert trials[6].params == {"saes.k": 32, "lr": 5e-3}
    assert trials[6].state.name == "COMPLETE", "the best of all in every objective"
