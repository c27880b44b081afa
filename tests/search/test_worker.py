"""The worker's loop with a pretended trainer: packs, failures, early stopping, signals."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest
from _worker_kit import HOOK, TOTAL, OutOfMemoryError, Trainer, good, run_in_step, spec_in, start, states
from optuna_dashboard._app import create_app

from saeopt.config.study_file import study_spec
from saeopt.training.plan import Observer, TrialPlan, TrialResult
from saeopt.trials import claims, endings, presence
from saeopt.trials import internals as db
from saeopt.trials.attributes import evaluation_of
from saeopt.trials.create import create_study
from saeopt.trials.storage import Store
from saeopt.views import monitoring
from saeopt.views.best import find_best, load_points
from saeopt.views.figures import front_figure
from saeopt.views.points import fronts
from saeopt.views.status import as_json, gather


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("on_trial_start", "on_trial_end", "on_trial_paused", "on_study_progress"):
        monkeypatch.setattr(monitoring, name, lambda *args, **kwargs: None)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    opened = Store.open(f"sqlite:///{tmp_path}/store.db")
    yield opened
    opened.close()


def test_packs_are_trained_and_every_trial_is_told(store: Store, tmp_path: Path) -> None:
    trainer = Trainer()
    worker = start(store, spec_in(tmp_path), trainer)
    assert worker.run() == 6
    assert trainer.packs == [["0", "1", "2", "3"], ["4", "5"]]
    trial = store.study("s").trials[0]
    assert (trial.state.name, trial.values) == ("COMPLETE", [20.0, 0.8])
    assert store.study("s").user_attrs["intermediate_values"] == "l0"
    assert (trial.user_attrs["fvu"], trial.user_attrs["l0"]) == (0.2, 20.0)
    assert 1 < len(trial.intermediate_values) <= 50
    assert evaluation_of(trial.user_attrs) == {HOOK: {"l0": 20.0, "fvu": 0.2}}
    log = (tmp_path / "out/s/0/trial.log").read_text()
    assert "training trials 0, 1, 2, 3 on " in log
    assert "trial 0: complete (" in log
    assert (tmp_path / "out/s/5/trial.log").read_text().count("training trials 4, 5") == 1
    assert set(worker.me.latest) == {"4", "5"}
    assert worker.me.latest["5"] == {"samples": TOTAL, "l0": 20.0, "fvu": 0.2}
    with store.read() as connection:
        attributes = db.get_attrs(connection, db.study_attrs, worker.study_id)
    assert presence.workers(attributes) == []


def test_a_failing_trial_is_found_in_its_pack_and_fails_alone(store: Store, tmp_path: Path) -> None:
    def before(names: list[str]) -> None:
        if "2" in names:
            raise ValueError("trial two is broken")

    trainer = Trainer(before=before)
    start(store, spec_in(tmp_path, 4, retries=1), trainer).run()
    assert states(store) == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert trainer.packs == [["0", "1", "2", "3"], ["0"], ["1"], ["2"], ["3"], ["2"]]
    attrs = store.study("s").trials[2].user_attrs
    assert attrs["reason"] == "ValueError: trial two is broken"
    assert "in before" in attrs["traceback"]
    assert attrs["failures"] == 2
    log = (tmp_path / "out/s/2/trial.log").read_text()
    assert log.count("trial 2 failed (for good): ValueError: trial two is broken") == 1
    assert "trial 0: complete" not in log.partition("training these 4 trials one by one")[0]


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_out_of_memory_halves_the_pack_and_counts_for_nobody(store: Store, tmp_path: Path, error: RuntimeError) -> None:
    def before(names: list[str]) -> None:
        if len(names) > 2:
            raise error

    trainer = Trainer(before=before)
    start(store, spec_in(tmp_path, 6), trainer).run()
    assert [len(p) for p in trainer.packs] == [4, 2, 2, 2]
    assert set(states(store)) == {"COMPLETE"}
    assert all("failures" not in t.user_attrs for t in store.study("s").trials)


def test_what_had_ended_before_its_pack_failed_is_told_and_not_trained_again(store: Store, tmp_path: Path) -> None:
    class Failing(Trainer):
        def __call__(self, plans: Sequence[TrialPlan], observer: Observer) -> dict[str, TrialResult]:
            if len(plans) == 1:
                return super().__call__(plans, observer)
            self.packs.append([p.name for p in plans])
            observer.on_start(plans[0].name, 0, TOTAL)
            observer.on_end(plans[0].name, TrialResult("stopped", 8, "hopeless"))
            raise RuntimeError("the others")

    trainer = Failing()
    start(store, spec_in(tmp_path, 3), trainer).run()
    assert trainer.packs == [["0", "1", "2"], ["1"], ["2"]]
    assert states(store) == ["PRUNED", "COMPLETE", "COMPLETE"]
    assert store.study("s").trials[0].user_attrs["reason"] == "hopeless"


def test_a_signal_gives_the_trials_back(store: Store, tmp_path: Path) -> None:
    trainer = Trainer()
    worker = start(store, spec_in(tmp_path), trainer)
    threading.Timer(0.3, worker.interrupted.set).start()
    trainer.measure = lambda plan, samples: time.sleep(0.02) or good(plan, samples)  # type: ignore[func-returns-value]
    assert worker.run() == 0
    assert states(store) == ["WAITING"] * 6
    assert "saeopt:losses" not in store.study("s").trials[0].system_attrs


def test_a_stopped_study_gets_its_trials_back_and_the_worker_ends(store: Store, tmp_path: Path) -> None:
    trainer = Trainer(measure=lambda plan, samples: time.sleep(0.02) or good(plan, samples))  # type: ignore[func-returns-value]
    worker = start(store, spec_in(tmp_path), trainer)
    threading.Timer(0.3, claims.set_stopped, (store, worker.study_id, True)).start()
    worker.run()
    assert states(store) == ["WAITING"] * 6


def test_a_collapsed_trial_is_stopped_with_its_reason_and_is_infeasible(store: Store, tmp_path: Path) -> None:
    def measure(plan: TrialPlan, samples: int) -> dict[str, float]:
        return {"l0": 0.1 if plan.name == "1" else 20.0, "fvu": 0.5}

    start(store, spec_in(tmp_path, 3), Trainer(measure)).run()
    trials = store.study("s").trials
    assert [t.state.name for t in trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert trials[1].user_attrs["reason"].startswith(f"collapsed: {HOOK}: L0 0.1 is below 0.5")
    assert trials[1].user_attrs["samples"] < TOTAL
    assert max(trials[1].constraints.values()) > 0
    assert max(trials[0].constraints.values()) <= 0


OBJECTIVES = [
    [{"metric": "l0"}, {"metric": "explained_variance"}],
    [{"metric": "l0"}],
    [{"metric": "l0"}, {"metric": "fvu"}, {"metric": "explained_variance"}],
]


@pytest.mark.parametrize("collapse", [{}, {"constraint": False}, None])
@pytest.mark.parametrize("objectives", OBJECTIVES)
def test_no_view_prefers_a_trial_that_collapsed_at_its_end(
    objectives: list[dict[str, str]], collapse: dict[str, bool] | None, store: Store, tmp_path: Path
) -> None:
    """Optuna's own best trials, the dashboard's (which knows no constraints), and `best`."""
    spec = spec_in(tmp_path, 4, objectives=objectives, early_stopping={"collapse": collapse})

    def measure(plan: TrialPlan, samples: int) -> dict[str, float]:
        if samples < TOTAL or plan.name in ("0", "2"):
            return {"l0": 20.0 + int(plan.name), "fvu": 0.5}
        return {"l0": 0.4, "fvu": 0.5} if plan.name == "1" else {"l0": 2.0, "fvu": 1.0}

    start(store, spec, Trainer(measure)).run()
    study = store.study("s")
    assert [t.state.name for t in study.trials] == ["COMPLETE", "PRUNED", "COMPLETE", "PRUNED"]
    assert "L0 0.4 is below 0.5" in study.trials[1].user_attrs["reason"]
    assert "FVU 1 has reached 1" in study.trials[3].user_attrs["reason"]
    best = study.best_trials if len(objectives) > 1 else [study.best_trial]
    assert [t.number for t in best] == [0]
    assert [t["number"] for t in dashboards_view(store)["best_trials"]] == [0]
    points, _ = load_points(store, "s")
    assert len(points) == 4  # the collapsed ones are counted, and are no candidates
    assert [p.label for front in fronts(points).values() for p in front] == ["#0"]


@pytest.mark.parametrize(("min_l0", "state", "front"), [(0.5, "COMPLETE", ["#0", "#1"]), (1.0, "PRUNED", ["#1"])])
def test_the_studys_own_rule_says_what_collapsed_means_for_worker_sampler_status_best_and_front(
    min_l0: float, state: str, front: list[str], store: Store, tmp_path: Path
) -> None:
    rule = {"min_l0": min_l0, "patience": 1000}  # judged at the end only
    spec = spec_in(tmp_path, 2, early_stopping={"collapse": rule})

    def measure(plan: TrialPlan, samples: int) -> dict[str, float]:
        return {"l0": 0.7, "fvu": 0.5} if plan.name == "0" else {"l0": 20.0, "fvu": 0.2}

    start(store, spec, Trainer(measure)).run()
    trial = store.study("s").trials[0]
    assert trial.state.name == state
    assert (max(trial.constraints.values()) > 0) == (state == "PRUNED")
    points, _ = load_points(store, "s")
    assert [p.label for p in fronts(points)[HOOK]] == front
    (best,) = find_best(points)
    assert (best.n, best.usable, [p.label for p in best.front]) == (2, len(front), front)
    shown = as_json(gather(store, "s"))
    assert [f"#{p['trial']}" for p in shown["front"][HOOK]] == front
    lines = [trace for trace in front_figure(points).data if trace.mode == "lines"]
    assert [len(trace.x) for trace in lines] == [len(front)]


def dashboards_view(store: Store) -> Any:
    """What the dashboard's page of the study gets."""
    environment: dict[str, Any] = {}
    setup_testing_defaults(environment)
    environment |= {"PATH_INFO": f"/api/studies/{store.study_id('s')}", "QUERY_STRING": "after=0"}
    app: Any = create_app(store.optuna)
    return json.loads(b"".join(app(environment, lambda *answer: None)))


@pytest.mark.parametrize("rule", ["median", "asha", "hyperband"])
def test_a_bad_trial_of_a_single_objective_is_pruned(store: Store, tmp_path: Path, rule: str) -> None:
    def measure(plan: TrialPlan, samples: int) -> dict[str, float]:
        return {"l0": 20.0, "fvu": 0.9 if plan.name == "7" else 0.1 + 0.01 * int(plan.name)}

    spec = spec_in(tmp_path, 8, objectives=["fvu"], early_stopping={"type": rule, "n_startup_trials": 3})
    run_in_step(store, spec, measure)
    trials = store.study("s").trials
    assert trials[0].state.name == "COMPLETE"
    if rule != "hyperband":  # its brackets may put the bad trial where nothing is compared
        assert trials[7].state.name == "PRUNED"
        assert rule in trials[7].user_attrs["reason"]
        assert trials[7].values == pytest.approx([0.9])


def test_a_trial_that_is_worse_in_every_objective_is_stopped(store: Store, tmp_path: Path) -> None:
    def measure(plan: TrialPlan, samples: int) -> dict[str, float]:
        worse = plan.name == "5"
        return {"l0": 60.0 if worse else 20.0, "fvu": 0.6 if worse else 0.2}

    spec = spec_in(tmp_path, 6, early_stopping={"type": "pareto", "n_startup_trials": 3})
    run_in_step(store, spec, measure)
    trials = store.study("s").trials
    assert [t.state.name for t in trials] == ["COMPLETE"] * 5 + ["PRUNED"]
    assert "better in every objective" in trials[5].user_attrs["reason"]


def test_max_trials_ends_the_worker(store: Store, tmp_path: Path) -> None:
    assert start(store, spec_in(tmp_path), Trainer(), max_trials=5).run() == 5
    assert states(store).count("COMPLETE") == 5


def test_a_worker_waits_for_trials_that_others_train_and_takes_over_when_they_die(store: Store, tmp_path: Path) -> None:
    spec = spec_in(tmp_path, 1)
    worker = start(store, spec, Trainer())
    assert len(claims.claim(store, worker.study_id, 1, {"worker": "doomed"})) == 1
    before = time.monotonic()
    assert worker.run() == 1
    assert time.monotonic() - before > 0.9
    assert states(store) == ["COMPLETE"]


def test_sequential_raises_the_first_error_and_gives_the_trial_back(store: Store, tmp_path: Path) -> None:
    def before(names: list[str]) -> None:
        raise ValueError("broken")

    worker = start(store, spec_in(tmp_path, 2), Trainer(before=before), sequential=True)
    with pytest.raises(ValueError, match="broken"):
        worker.run()
    assert states(store) == ["WAITING", "WAITING"]


def test_a_trial_without_the_metric_of_its_objective_is_pruned_with_a_reason(store: Store, tmp_path: Path) -> None:
    start(store, spec_in(tmp_path, 1, objectives=["kl"]), Trainer()).run()
    (trial,) = store.study("s").trials
    assert trial.state.name == "PRUNED"
    assert "no finite value" in trial.user_attrs["reason"]


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2", "gp", "qmc"])
def test_samplers_propose_every_trial_once_in_a_conditional_space(store: Store, tmp_path: Path, sampler: str) -> None:
    base = spec_in(tmp_path).base
    space = {
        "sae_type": ["relu", "topk"],
        "saes.sparsity_coeff": {"low": 0.05, "high": 10, "log": True, "when": {"sae_type": "relu"}},
        "saes.k": {"low": 4, "high": 64, "int": True, "log": True, "when": {"sae_type": "topk"}},
        "saes.dict_size_to_input_ratio": [8, 16, 32],
    }
    raw = {"name": "s", "base": base, "space": space, "sampler": {"type": sampler, "n_startup_trials": 4}}
    spec = study_spec({**raw, "max_trials": 14, "output_dir": str(tmp_path / "out")}, "s.yaml")

    def measure(plan: TrialPlan, samples: int) -> dict[str, float]:
        ratio = plan.config.saes.dict_size_to_input_ratio
        collapsed = plan.config.saes.sae_type == "relu" and plan.config.saes.sparsity_coeff > 3
        return {"l0": 0.1 if collapsed else ratio, "fvu": 2.0 / ratio}

    start(store, spec, Trainer(measure), pack=3).run()
    trials = store.study("s").trials
    assert len(trials) == 14
    assert {t.state.name for t in trials} <= {"COMPLETE", "PRUNED"}
    for trial in trials:
        other = "saes.k" if trial.params["saes.sae_type"] == "relu" else "saes.sparsity_coeff"
        assert other not in trial.params
        assert len(trial.params) == 3
    assert len({str(sorted(t.params.items())) for t in trials}) == 14


def test_cmaes_and_random_streams_pack_only_what_fits_together(store: Store, tmp_path: Path) -> None:
    space = {"data.train_batch_size": [4, 8], "lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    spec = spec_in(
        tmp_path, objectives=["fvu"], space=space, sampler={"type": "cmaes", "n_startup_trials": 2}, max_trials=8
    )
    trainer = Trainer()
    start(store, spec, trainer, pack=4).run()
    trials = store.study("s").trials
    assert {t.state.name for t in trials} == {"COMPLETE"}
    for pack in trainer.packs:
        assert len({trials[int(n)].params["data.train_batch_size"] for n in pack}) == 1


@pytest.mark.parametrize(
    ("pack", "packs"), [("auto", [4] + [2] * 10), (24, [4, 20])], ids=["auto", "as large as the study"]
)
def test_proposals_are_made_in_rounds_that_have_seen_results(
    store: Store, tmp_path: Path, pack: int | str, packs: list[int]
) -> None:
    space = {"lr": {"low": 1e-4, "high": 1e-2, "log": True}}
    spec = spec_in(tmp_path, space=space, sampler={"type": "tpe", "n_startup_trials": 4}, max_trials=24)
    ended: list[int] = []
    trainer = Trainer(before=lambda names: ended.append(sum(s == "COMPLETE" for s in states(store))))
    start(store, spec, trainer, pack=24, auto=pack == "auto").run()
    assert [len(names) for names in trainer.packs] == packs
    assert ended == [sum(packs[:i]) for i in range(len(packs))]


def test_samplers_do_not_read_the_queue(store: Store, tmp_path: Path) -> None:
    spec = spec_in(tmp_path, 40)
    study_id = create_study(store, spec).study_id
    taken = claims.claim(store, study_id, 3, {"worker": "w"})
    blind = store.sampling_study("s")
    assert [t.number for t in blind.get_trials(deepcopy=False)] == [0, 1, 2]
    endings.finish(store, taken[1], "COMPLETE", [1.0, 2.0])
    assert [t.state.name for t in blind.get_trials(deepcopy=False)] == ["RUNNING", "COMPLETE", "RUNNING"]
    assert blind.get_trials(deepcopy=False)[1].values == [1.0, 2.0]


def test_auto_packs_what_the_free_memory_holds(tmp_path: Path, tiny_model_dir: Path, monkeypatch: Any) -> None:
    import torch

    from saeopt.search.space import Space
    from saeopt.workers.local import LocalTraining

    base = spec_in(tmp_path).base | {"tlens_model_path": str(tiny_model_dir)}
    base["data"] = base["data"] | {"context_length": 16}
    spec = spec_in(tmp_path, base=base, space={"saes.dict_size_to_input_ratio": [8, 512]})
    trainer = LocalTraining("cpu")
    assert trainer.fitting(Space(spec).largest().config) == 8

    class Runtime:
        device = torch.device("cuda")

    trainer._runtime = Runtime()  # type: ignore[assignment]
    sizes = {}
    for free in (2**20, 2**27, 2**40):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        sizes[free] = trainer.fitting(Space(spec).largest().config)
    assert sizes[2**20] == 1
    assert 1 < sizes[2**27] < 64
    assert sizes[2**40] == 64


@pytest.mark.parametrize(("dtype", "size"), [("auto", 2), ("float32", 4)])
def test_packs_are_sized_for_the_language_models_precision(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: Any, dtype: str, size: int
) -> None:
    import torch

    from saeopt.search.space import Space
    from saeopt.training import dry_run
    from saeopt.workers.local import LocalTraining

    base = spec_in(tmp_path).base | {"tlens_model_path": str(tiny_model_dir), "lm_dtype": dtype}
    base["data"] = base["data"] | {"context_length": 16}
    trainer = LocalTraining("cuda")
    trainer._runtime = SimpleNamespace(device=torch.device("cuda"))  # type: ignore[assignment]
    asked = []
    estimate = dry_run.estimate
    monkeypatch.setattr(dry_run, "estimate", lambda *a, **k: asked.append(a[3]) or estimate(*a, **k))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    trainer.fitting(Space(spec_in(tmp_path, base=base)).largest().config)
    assert set(asked) == {size}
