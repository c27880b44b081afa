"""Halving with real packs: who is paused, merged, promoted; all bits are those of an undisturbed pack."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from saeopt.config.study import StudySpec
from saeopt.config.study_file import study_spec
from saeopt.training import train_pack
from saeopt.training.plan import Observer, TrialPlan, TrialResult
from saeopt.trials import claims, paused
from saeopt.trials.create import create_study, planned_cells
from saeopt.trials.rungs import Rung
from saeopt.trials.storage import Store
from saeopt.views import monitoring
from saeopt.workers.local import LocalTraining
from saeopt.workers.loop import Options, Worker
from saeopt.workers.training import ChildTraining

HOOK = "blocks.1.hook_resid_pre"
SAMPLES = 256


@pytest.fixture(scope="module")
def training() -> LocalTraining:
    return LocalTraining("cpu")


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("on_trial_start", "on_trial_end", "on_trial_paused", "on_study_progress"):
        monkeypatch.setattr(monitoring, name, lambda *args, **kwargs: None)


def make_spec(model: Path, text: Path, folder: Path, rule: dict[str, Any], **fields: Any) -> StudySpec:
    base: dict[str, Any] = {
        "recipe": 2, "tlens_model_path": str(model), "threads": 1, "warmup_samples": 0, "log_every_n_grad_steps": 8,
        "save_every_n_samples": 0, "keep_checkpoints": None,
        "data": {
            "dataset_name": str(text), "is_tokenized": False, "streaming": False, "column_name": "text",
            "context_length": 16, "n_train_samples": SAMPLES, "train_batch_size": 4, "n_eval_samples": 16,
        },
        "saes": {"sae_type": "topk", "sae_positions": [HOOK], "dict_size_to_input_ratio": 4, "k": 4},
    }  # fmt: skip
    base["data"] |= fields.pop("data", {})
    base["activations"] = {"cache": fields.pop("cache", "off")}
    space = fields.pop("space", {"seed": [0, 1, 2, 3], "lr": [1e-2, 1e-6]})
    raw = {"name": "s", "base": base, "space": space, "objectives": ["fvu"], "output_dir": str(folder)}
    return study_spec(raw | {"early_stopping": {"type": "halving", "collapse": None, **rule}, **fields}, "s.yaml")


class Spy:
    """Trains for real, and remembers which trials were trained together from where."""

    def __init__(self, training: LocalTraining | ChildTraining) -> None:
        self.training = training
        self.packs: list[tuple[list[str], int]] = []

    def __call__(self, plans: Sequence[TrialPlan], observer: Observer) -> dict[str, TrialResult]:
        starts: list[int] = []
        inner = observer.on_start
        observer.on_start = lambda name, at, total: (starts.append(at), inner(name, at, total))[1]  # type: ignore[method-assign]
        results = self.training(plans, observer)
        self.packs.append(([plan.name for plan in plans], starts[0]))
        return results


def work(store: Store, spec: StudySpec, spy: Spy, pack: int = 4, **options: Any) -> int:
    create_study(store, spec)
    return Worker(store, "s", Options(poll=0.05, **options), spy, lambda space: pack, threading.Event()).run()


def weights(folder: Path, samples: int = SAMPLES) -> dict[str, bytes]:
    with safe_open(folder / f"samples_{samples}.safetensors", "pt") as file:
        return {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("how", ["in order", "shuffle buffer", "cache"])
def test_survivors_merge_into_a_full_pack_and_get_the_bits_of_an_undisturbed_one(
    how: str, training: LocalTraining, tiny_model_dir: Path, tiny_text: Path, tmp_path: Path
) -> None:
    data: dict[str, Any] = {"shuffle_buffer_tokens": 256} if how == "shuffle buffer" else {}
    cache = str(tmp_path / "cache") if how == "cache" else "off"
    spec = make_spec(tiny_model_dir, tiny_text, tmp_path / "out", {"rungs": [0.3], "keep": 0.5}, data=data, cache=cache)
    store, spy = Store.open(f"sqlite:///{tmp_path}/store.db"), Spy(training)
    work(store, spec, spy)
    good = [t.number for t in store.study("s").trials if t.params["lr"] > 1e-4]
    assert spy.packs == [(["0", "1", "2", "3"], 0), (["4", "5", "6", "7"], 0), (list(map(str, good)), 80)]
    trials = store.study("s").trials
    assert {t.number: t.state.name for t in trials} == {n: "COMPLETE" if n in good else "PRUNED" for n in range(8)}
    cells, _ = planned_cells(spec)
    plans = [TrialPlan(str(n), cells[n].config, tmp_path / "alone" / str(n)) for n in good]
    train_pack(plans, training.runtime)
    for n in good:
        assert weights(spec.run_dir(n)) == weights(tmp_path / "alone" / str(n)), n
    store.close()


def test_promoted_trials_go_on_to_the_bits_of_an_undisturbed_pack(
    training: LocalTraining, tiny_model_dir: Path, tiny_text: Path, tmp_path: Path
) -> None:
    spec = make_spec(tiny_model_dir, tiny_text, tmp_path / "out", {"rungs": [0.3, 0.6], "keep": 0.5})
    store, spy = Store.open(f"sqlite:///{tmp_path}/store.db"), Spy(training)
    work(store, spec, spy)
    ended = [t.number for t in store.study("s").trials if t.state.name == "PRUNED" and t.params["lr"] < 1e-4]
    assert ended == [1, 3, 5, 7]
    reason = store.study("s").trials[1].user_attrs["reason"]
    assert reason.startswith("paused by halving at 80 of 256 samples: place ")
    assert "is ahead (fvu " in reason
    assert paused.promote(store, store.study_id("s"), ended) == ended
    work(store, spec, spy)
    assert spy.packs[-1] == (["1", "3", "5", "7"], 80), "no later rung pauses what a person has promoted"
    fresh = Store.open(f"sqlite:///{tmp_path}/store.db")
    assert {t.state.name for t in fresh.study("s").trials if t.number in ended} == {"COMPLETE"}
    cells, _ = planned_cells(spec)
    train_pack([TrialPlan(str(n), cells[n].config, tmp_path / "alone" / str(n)) for n in ended], training.runtime)
    for n in ended:
        assert weights(spec.run_dir(n)) == weights(tmp_path / "alone" / str(n)), n
    store.close()
    fresh.close()


@pytest.mark.slow  # a training process of its own
def test_survivors_leave_their_training_process_at_the_rung_itself(
    tiny_model_dir: Path, tiny_text: Path, tmp_path: Path
) -> None:
    spec = make_spec(tiny_model_dir, tiny_text, tmp_path / "out", {"rungs": [0.3], "keep": 0.5})
    store, child = Store.open(f"sqlite:///{tmp_path}/store.db"), ChildTraining("cpu")
    try:
        spy = Spy(child)
        work(store, spec, spy)
    finally:
        child.close()
    assert [start for _, start in spy.packs] == [0, 0, 80]
    assert claims.counts(store, store.study_id("s"))["COMPLETE"] == 4
    store.close()


def test_the_curves_of_what_is_paused_are_drawn_once_its_pack_is_over(
    training: LocalTraining, tiny_model_dir: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, Any]] = []
    end = lambda *where, curves=True, **more: told.append(("drawn" if curves else "told", where[2]))  # noqa: E731
    monkeypatch.setattr(monitoring, "on_trial_end", end)
    monkeypatch.setattr(monitoring, "on_trial_paused", lambda *where: told.append(("drawn", where[2])))
    spec = make_spec(
        tiny_model_dir, tiny_text, tmp_path / "out", {"rungs": [0.3], "keep": 0.5}, space={"lr": [1e-2, 1e-6]}
    )
    store = Store.open(f"sqlite:///{tmp_path}/store.db")
    work(store, spec, Spy(training))
    assert told == [("told", 2), ("drawn", 1), ("drawn", 2)]
    store.close()


@pytest.mark.parametrize("keep", [True, False])
def test_the_checkpoints_of_what_is_paused_stay_as_the_study_says(
    keep: bool, training: LocalTraining, tiny_model_dir: Path, tiny_text: Path, tmp_path: Path
) -> None:
    rule = {"rungs": [0.3], "keep": 0.5, "keep_paused": keep}
    spec = make_spec(tiny_model_dir, tiny_text, tmp_path / "out", rule, space={"lr": [1e-2, 1e-6]})
    store = Store.open(f"sqlite:///{tmp_path}/store.db")
    work(store, spec, Spy(training))
    left = sorted(path.name for path in spec.run_dir(1).rglob("*80.safetensors"))
    assert left == (["80.safetensors", "samples_80.safetensors"] if keep else [])
    assert (spec.run_dir(0) / f"samples_{SAMPLES}.safetensors").exists()
    assert paused.promote(store, store.study_id("s"), [1]) == ([1] if keep else [])
    store.close()


def test_what_training_does_not_measure_is_evaluated_at_the_rungs(
    training: LocalTraining, tiny_model_dir: Path, tiny_text: Path, tmp_path: Path
) -> None:
    rule = {"rungs": [0.5], "keep": 0.5, "rung_eval_samples": 8}
    spec = make_spec(tiny_model_dir, tiny_text, tmp_path / "out", rule, objectives=["cosine", "explained_variance"])
    store, spy = Store.open(f"sqlite:///{tmp_path}/store.db"), Spy(training)
    work(store, spec, spy, pack=8)
    hopeless = [t for t in store.study("s").trials if t.params["lr"] < 1e-4]
    assert {t.state.name for t in hopeless} == {"PRUNED"}, [t.user_attrs for t in hopeless]
    assert all("cosine" in t.user_attrs["reason"] for t in hopeless)
    assert spy.packs == [([str(n) for n in range(8)], 0)], "nobody else comes: the others go on where they are"
    store.close()


def test_what_is_left_of_a_budget_goes_to_the_best_paused_trials(
    training: LocalTraining, tiny_model_dir: Path, tiny_text: Path, tmp_path: Path
) -> None:
    rule = {"rungs": [0.3, 0.6], "keep": 0.25}
    samples = SAMPLES + 3 * 80 + 2 * (SAMPLES - 80)  # one to its end, three to the rung, and two of them to their ends
    lrs = {"lr": [1e-2, 3e-3, 1e-3, 1e-6]}
    spec = make_spec(tiny_model_dir, tiny_text, tmp_path / "out", rule, space=lrs, budget={"tokens": 16 * samples})
    store, spy = Store.open(f"sqlite:///{tmp_path}/store.db"), Spy(training)
    work(store, spec, spy, pack=1)
    states = {t.number: t.state.name for t in store.study("s").trials}
    assert states == {0: "COMPLETE", 1: "COMPLETE", 2: "COMPLETE", 3: "PRUNED"}
    begun = [names[0] for names, start in spy.packs if start >= 80]
    assert list(dict.fromkeys(begun)) == ["1", "2"], "the best of those that were paused first"
    store.close()


def test_who_was_killed_before_its_verdict_is_judged_when_it_is_claimed(
    training: LocalTraining, tiny_model_dir: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = {"rungs": [0.3], "keep": 0.5}
    spec = make_spec(tiny_model_dir, tiny_text, tmp_path / "out", rule, space={"lr": [1e-2, 1e-6]})
    store, spy = Store.open(f"sqlite:///{tmp_path}/store.db"), Spy(training)
    with monkeypatch.context() as killed:  # stored and checkpointed, but nobody was judged
        killed.setattr(Rung, "judge", lambda *args: {})
        killed.setattr(Rung, "others_come", lambda *args: True)
        create_study(store, spec)
        ended = threading.Event()

        def once(plans: Sequence[TrialPlan], observer: Observer) -> dict[str, TrialResult]:
            results = spy(plans, observer)
            ended.set()
            return results

        Worker(store, "s", Options(poll=0.05), once, lambda space: 2, ended).run()
    work(store, spec, spy)
    assert spy.packs == [(["0", "1"], 0), (["0"], 80)], "who is behind is not trained again"
    found = store.study("s").trials
    assert [t.state.name for t in found] == ["COMPLETE", "PRUNED"]
    assert found[1].user_attrs["reason"].startswith("paused by halving at 80 of 256 samples: place 2 of 2")
    store.close()
