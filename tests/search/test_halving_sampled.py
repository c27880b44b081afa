"""A sampled study under the default rule, with real packs: all trials are proposed, and each ends once."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_halving_real import SAMPLES, Spy, make_spec, work

from saeopt.search.stopping import with_default_rule
from saeopt.trials.storage import Store
from saeopt.workers.local import LocalTraining


@pytest.mark.parametrize("pack", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_sampled_study_under_its_default_rule_comes_to_its_end(
    pack: int, tiny_model_dir: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saeopt.views import monitoring

    for name in ("on_trial_start", "on_trial_end", "on_trial_paused", "on_study_progress"):
        monkeypatch.setattr(monitoring, name, lambda *args, **kwargs: None)
    space = {"lr": {"low": 1e-6, "high": 1e-2, "log": True}, "saes.k": {"low": 2, "high": 16, "int": True}}
    sampler = {"type": "tpe", "n_startup_trials": 4, "seed": 0}
    fields = {"objectives": ["l0", "explained_variance"], "space": space, "sampler": sampler, "max_trials": 10}
    made = make_spec(tiny_model_dir, tiny_text, tmp_path / "out", {"type": "none"}, **fields)
    rule = made.early_stopping.model_copy()
    rule.model_fields_set.discard("type")
    spec = with_default_rule(made.model_copy(update={"early_stopping": rule}))
    assert spec.early_stopping.type == "halving"
    store = Store.open(f"sqlite:///{tmp_path}/store.db")
    work(store, spec, Spy(LocalTraining("cpu")), pack=pack)
    trials = store.study("s").trials
    store.close()
    assert len(trials) == 10
    assert {t.state.name for t in trials} <= {"COMPLETE", "PRUNED"}
    ended = [t.user_attrs["samples"] for t in trials]
    assert set(ended) <= {28, 80, SAMPLES}, ended
    assert all(t.user_attrs["reason"].startswith("paused by halving at ") for t in trials if t.state.name == "PRUNED")
    assert sum(t.state.name == "COMPLETE" for t in trials) >= 2
