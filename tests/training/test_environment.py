"""What `accelerate launch` and the environment ask for is taken over and said, or refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from saeopt import evaluator as evaluation
from saeopt.config import load_run_config
from saeopt.errors import UserError
from saeopt.host.launcher import be_alone, check_alone, launched
from saeopt.runs.weights import load_checkpoint
from saeopt.training import Observer, TrialPlan, train_pack
from saeopt.training.environment import (
    check_accumulation,
    check_environment,
    check_gpus,
    check_joined,
    with_precision,
)
from saeopt.training.launch import resolve
from saeopt.training.runtime import Runtime
from saeopt.workers.loop import start_of


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        n for n in os.environ if n.startswith("ACCELERATE_") or n in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK")
    ]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "True", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "1", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "parallelism"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "'performance.compile'"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "no, bf16 or fp16"),
    ],
)
def test_what_accelerate_offers_and_is_not_done_here_is_refused(
    name: str, value: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_environment()
    monkeypatch.setenv(name, value)
    for check in (check_environment, Runtime):
        with pytest.raises(UserError, match=name) as raised:
            check()
        assert part in str(raised.value)
    monkeypatch.setenv(name, "NO" if "DYNAMO" in name else "no")
    check_environment()


def test_an_accumulation_that_would_not_be_used_is_refused(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    for fine in ("2", "auto"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", fine)
        check_accumulation(make_config())
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    with pytest.raises(UserError, match="'gradient_accumulation_steps' is 2"):
        check_accumulation(make_config())


def test_processes_that_did_not_join_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_joined(1)
    check_gpus(0)
    check_gpus(1)
    check_alone("a worker", "…")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"each is alone.*ACCELERATE_USE_CPU=true accelerate launch --multi_gpu"):
        check_joined(1)
    with pytest.raises(UserError, match="2 processes were started, 1 GPUs are visible"):
        check_gpus(1)
    with pytest.raises(UserError, match="a worker is one process, 2 were started"):
        check_alone("a worker", "…")


def test_a_worker_is_refused_under_a_launcher_and_alone_in_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match="a worker is one process, 2 were started"):
        be_alone("a worker", "…")
    monkeypatch.delenv("LOCAL_RANK")
    be_alone("a worker", "…")
    assert Runtime("cpu").ranks.is_first


def test_evaluate_is_refused_under_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # each process would write the same files
    with pytest.raises(UserError, match="evaluate is one process, 2 were started"):
        evaluation.app(args=[str(tmp_path)], standalone_mode=False)


def test_processes_that_cannot_join_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(**_: object) -> None:
        raise ValueError("environment variable MASTER_ADDR expected, but not set")

    monkeypatch.setattr("saeopt.training.runtime.Accelerator", nobody)
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        Runtime("cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"2 processes were started.* cannot join: .*MASTER_ADDR"):
        Runtime("cpu")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE"])
def test_a_launchers_number_that_is_none_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    field = {"RANK": "rank", "WORLD_SIZE": "size", "LOCAL_WORLD_SIZE": "here"}[name]
    assert launched() == (0, 1, 1)
    monkeypatch.setenv(name, " 3 ")
    assert getattr(launched(), field) == 3
    for wrong in ("two", "-1", "1.0"):
        monkeypatch.setenv(name, wrong)
        with pytest.raises(UserError, match=f"{name}={wrong}: must be a number"):
            launched()


@pytest.mark.parametrize(
    ("chosen", "launched", "device", "precision", "told"),
    [
        ("auto", None, "cpu", "no", "auto on cpu"),
        ("auto", None, "cuda", "bf16", "auto on cuda"),
        ("auto", "no", "cuda", "bf16", "auto on cuda"),  # what accelerate launch says where nobody asked
        ("auto", "FP16", "cpu", "fp16", "ACCELERATE_MIXED_PRECISION"),
        ("bf16", "fp16", "cpu", "bf16", "config"),
        ("no", "fp16", "cuda", "no", "config"),
    ],
)
def test_who_decides_about_precision(
    chosen: str, launched: str | None, device: str, precision: str, told: str, make_config, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    plan, text = with_precision(TrialPlan("a", make_config(mixed_precision=chosen), tmp_path / "a"), device)
    assert plan.config.mixed_precision == precision
    assert text == f"{precision} ({told})"


class StopsAt(Observer):
    def __init__(self, samples: int) -> None:
        self.samples, self.seen = samples, 0

    def progress(self, samples: int, total: int, tokens_per_s: float) -> None:
        self.seen = samples

    def should_interrupt(self) -> bool:
        return self.seen >= self.samples


def test_the_precision_of_a_run_is_written_and_kept_by_its_resume(
    make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For single runs, and for trials, whose config goes on saying auto."""
    config, run_dir, runtime = make_config(), tmp_path / "a", Runtime("cpu")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train_pack([TrialPlan("a", config, run_dir)], runtime, StopsAt(64))
    saved = run_dir / "final_config.yaml"
    assert load_run_config(saved).mixed_precision == load_checkpoint(run_dir).config.mixed_precision == "bf16"
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert start_of(run_dir, config) == 64
    assert with_precision(TrialPlan("a", config, run_dir, resume=True), "cpu")[1] == "bf16 (as it was begun)"
    original = tmp_path / "original.yaml"
    original.write_text(saved.read_text().replace("mixed_precision: bf16", "mixed_precision: auto"))
    assert resolve(original, [], run_dir)[0].mixed_precision == "bf16"
    with pytest.raises(UserError, match="'mixed_precision' is 'no'"):
        resolve(None, ["mixed_precision=no"], run_dir)
    train_pack([TrialPlan("a", config, run_dir, resume=True)], runtime)
    assert load_run_config(saved).mixed_precision == "bf16"


def test_trials_begun_in_different_precisions_go_on_together(make_config, tmp_path: Path) -> None:
    config, runtime = make_config(), Runtime("cpu")
    for name in ("no", "bf16"):
        train_pack([TrialPlan(name, make_config(mixed_precision=name), tmp_path / name)], runtime, StopsAt(64))
    alone = load_run_config(tmp_path / "bf16" / "final_config.yaml")
    plans = [TrialPlan(name, config, tmp_path / name, resume=True) for name in ("no", "bf16")]
    results = train_pack(plans, runtime)
    assert {r.samples for r in results.values()} == {256}
    assert load_run_config(tmp_path / "bf16" / "final_config.yaml") == alone
    whole = train_pack([TrialPlan("whole", alone, tmp_path / "whole")], runtime)["whole"]
    assert results["bf16"].evaluation == whole.evaluation
    assert results["no"].evaluation != whole.evaluation
