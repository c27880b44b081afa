"""The registry of metrics holds what is measured, and a new entry is enough for a new objective."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from _stores import grid_spec

from saeopt import metrics as registry
from saeopt.evaluation.agreement import agreement
from saeopt.evaluation.cross_entropy import CrossEntropy as CrossEntropy
from saeopt.evaluation.decoder import Projections
from saeopt.evaluation.metrics import Accumulator
from saeopt.metrics import METRICS, Metric, Shown, measured_in_training, value_of
from saeopt.spread import N_SEEDS
from saeopt.testing.cases import build
from saeopt.training.plan import Observer, TrialPlan, TrialResult
from saeopt.training.progress import Bar, Interrupt, RunObserver
from saeopt.trials.create import create_study
from saeopt.trials.storage import Store
from saeopt.views.best import find_best, load_points
from saeopt.views.plots import pareto_plot
from saeopt.views.wandb_sweep import export_wandb_sweep
from saeopt.workers.loop import Options, Worker

HOOK = "blocks.1.hook_resid_pre"
RUN = Path(__file__).parents[1] / "training" / "runs_2026_11" / "topk" / "metrics.jsonl"


def test_what_an_evaluation_measures_is_registered() -> None:
    accumulator = Accumulator(2, 3)
    accumulator.update(torch.randn(4, 2), torch.randn(4, 2), torch.rand(4, 3))
    decoder = Projections(build("relu")).result()
    measured = {**accumulator.result(), **CrossEntropy().result(), **decoder}.keys() - {"log10_density"}
    seeds = agreement([torch.eye(3)] * 2, [torch.ones(3)] * 2)
    assert {*seeds, N_SEEDS} == {m.name for m in METRICS.values() if m.seeds}
    assert {*measured, *seeds, N_SEEDS} == {m.name for m in METRICS.values() if m.evaluation}


def test_what_training_logs_is_registered() -> None:
    lines = RUN.read_text(encoding="utf-8").splitlines()
    logged = {name for line in lines for name in json.loads(line) if not name.startswith("eval_")}
    assert {m.name for m in METRICS.values() if m.training} == (logged & METRICS.keys()) | {"sparsity_coeff"}
    held_out = {name.removeprefix("eval_") for line in lines for name in json.loads(line) if name.startswith("eval_")}
    later = {"c_dec", "s_dec", "gamma", *(m.name for m in METRICS.values() if m.seeds)}
    assert held_out | later == {m.name for m in METRICS.values() if m.evaluation}


def test_an_evaluation_is_logged_with_the_headlines_and_without_what_it_lacks(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "saeopt"):
        RunObserver(Interrupt(), Bar(shown=False), lambda folder: None).on_eval(
            "run", 1000, {HOOK: {"l0": 9.04, "fvu": 0.25}}
        )
    assert "L0 9.0  FVU 0.2500  CE recovered –" in caplog.text


def test_what_follows_from_others_is_known_wherever_they_are() -> None:
    assert value_of({"fvu": 0.25}, "explained_variance") == 0.75
    assert value_of({"ce_sae": 3.0, "ce_clean": 2.5}, "ce_degradation") == 0.5
    assert value_of({"fvu": 0.25}, "ce_recovered") is None
    known = {name for name in METRICS if measured_in_training(name)}
    assert known >= {"loss", "l0", "fvu", "explained_variance", "fraction_alive"}
    assert not known & {"ce_degradation", "cosine", "kl"}


def test_a_registered_metric_that_an_evaluation_measures_is_an_objective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = Metric("probe_accuracy", "probe", ".1%", up=True, shown=Shown.TABLE)
    monkeypatch.setitem(registry.METRICS, probe.name, probe)
    spec = grid_spec(3, objectives=["l0", "probe_accuracy"], output_dir=str(tmp_path / "out"))

    def train(plans: Sequence[TrialPlan], observer: Observer) -> dict[str, TrialResult]:
        for plan in plans:
            observer.on_start(plan.name, 0, 8)
        rows = {p.name: {"l0": 9.0, "fvu": 0.3, "probe_accuracy": 0.5 + 0.1 * int(p.name)} for p in plans}
        return {name: TrialResult("finished", 8, None, {HOOK: row}) for name, row in rows.items()}

    store = Store.open(f"sqlite:///{tmp_path}/store.db")
    create_study(store, spec)
    Worker(store, spec.name, Options(poll=0.05), train, lambda space: 4, threading.Event()).run()
    study = store.study(spec.name)
    assert [d.name for d in study.directions] == ["MINIMIZE", "MAXIMIZE"]
    assert [t.values for t in study.trials] == [[9.0, 0.5], [9.0, 0.6], [9.0, 0.7]]
    assert study.trials[2].user_attrs["probe_accuracy"] == 0.7
    points, _ = load_points(store, spec.name)
    assert [p.label for p in find_best(points, "probe_accuracy")[0].front] == ["#2"]
    assert pareto_plot(points, tmp_path / "f.png", y=[probe.name]).exists()
    single = spec.model_copy(update={"objectives": spec.objectives[1:]})
    export_wandb_sweep(single, tmp_path / "sweep.yaml")
    assert "eval_probe_accuracy" in (tmp_path / "sweep.yaml").read_text()
    notes = [v for v in study._storage.get_study_system_attrs(study._study_id).values() if "| 70.0% |" in str(v)]
    assert len(notes) == 1
    store.close()
