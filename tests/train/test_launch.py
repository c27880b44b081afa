"""What stands between a command line and a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from saeopt.config import load_run_config, validate_run
from saeopt.errors import UserError
from saeopt.training.launch import check_processes, make_runtime, notices, out_of_memory
from saeopt.training.memory import MemberShape, ModelShape, estimate, gpu_step
from saeopt.training.runtime import Runtime

LM = ModelShape(parameters=10, vocabulary=100)
SEED = Path(__file__).resolve().parents[1] / "config" / "seed" / "relu.yaml"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_an_exhausted_device_says_what_to_lower(error: Exception) -> None:
    runtime = cast(Any, SimpleNamespace(device=torch.device("cuda:0")))
    with pytest.raises(UserError) as raised, out_of_memory(load_run_config(SEED), runtime):
        raise error
    for part in ("cuda:0", "data.train_batch_size (now 20", "gradient_accumulation_steps, now 20", "eval_batch_size"):
        assert part in str(raised.value)


def test_other_errors_pass_through() -> None:
    runtime = cast(Any, SimpleNamespace(device=torch.device("cpu")))
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory(load_run_config(SEED), runtime):
        raise RuntimeError("shapes differ")


def test_fewer_processes_than_asked_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_processes(None)
    check_processes(1)
    with pytest.raises(UserError, match="2 processes were asked for, 1 runs"):
        check_processes(2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes(2)


def test_memory_grows_with_members_and_only_the_largest_stack_counts_for_the_step() -> None:
    config = load_run_config(SEED, ["gradient_accumulation_steps=1"])
    one, other = (MemberShape(hook, "relu", 64, 512, 1000) for hook in "ab")
    need, both = (estimate(config, members, LM, 4) for members in ([one], [one, other]))
    assert need["language model"] == 40
    assert need["weights, gradients, optimiser"] == 14_000
    assert both["weights, gradients, optimiser"] == 28_000
    assert both["step and harvest"] == need["step and harvest"]
    stacked = estimate(config, [one, one], LM, 4)
    assert stacked["step and harvest"] > need["step and harvest"]


def test_several_micro_batches_per_window_need_a_sum_of_gradients_on_a_gpu() -> None:
    config = load_run_config(SEED, ["gradient_accumulation_steps=2"])
    one = MemberShape("a", "relu", 64, 512, 1000)
    assert estimate(config, [one], LM, 4)["weights, gradients, optimiser"] == 18_000
    assert estimate(config, [one], LM, 4, "cpu")["weights, gradients, optimiser"] == 16_000


@pytest.mark.parametrize(
    ("sae_type", "d", "h", "tokens", "members", "measured_gb"),
    [
        ("relu", 768, 24576, 4096, 1, 1.132),
        ("relu", 768, 24576, 32768, 1, 4.336),
        ("relu", 2304, 65536, 8192, 1, 7.379),
        ("gated", 768, 24576, 4096, 1, 1.722),
        ("hard_concrete", 768, 24576, 4096, 1, 2.174),
        ("gated_hard_concrete", 768, 24576, 4096, 1, 1.721),
        ("topk", 768, 24576, 4096, 1, 0.963),
        ("topk", 768, 24576, 32768, 1, 2.671),
        ("topk", 2304, 65536, 8192, 1, 6.258),
        ("relu", 768, 24576, 4096, 8, 5.4),
        ("topk", 768, 24576, 4096, 8, 6.751),
        ("gated", 768, 24576, 4096, 8, 6.024),
        ("hard_concrete", 768, 24576, 4096, 8, 8.6),
        ("gated_hard_concrete", 768, 24576, 4096, 8, 6.031),
        ("relu", 64, 2048, 4096, 8, 0.134),
        ("relu", 64, 2048, 4096, 32, 0.242),
        ("topk", 64, 2048, 4096, 32, 1.199),
    ],
)
def test_the_step_needs_what_was_measured(
    sae_type: str, d: int, h: int, tokens: int, members: int, measured_gb: float
) -> None:
    """Peaks that scripts/bench_step.py measured with torch 2.11 on an H100; it has three batches of bf16 inputs.

    Those of the narrow relu stacks, which a library's workspace from a case before would outweigh, are from an H200.
    """
    n_parameters = (3 if sae_type == "hard_concrete" else 2) * d * h
    one = MemberShape("a", sae_type, d, h, n_parameters, 64 if sae_type == "topk" else 0)
    config = load_run_config(SEED, ["gradient_accumulation_steps=1"])
    weights = estimate(config, [one] * members, LM, 2)["weights, gradients, optimiser"]
    assert weights + gpu_step([one] * members, tokens) + 6 * tokens * d == pytest.approx(measured_gb * 1e9, rel=0.15)


def test_a_topk_stack_has_room_for_its_largest_k() -> None:
    large, small = (MemberShape("a", "topk", 64, 2048, 1000, k) for k in (64, 8))
    assert gpu_step([large, small], 4096) == gpu_step([large, large], 4096)
    assert gpu_step([small, small], 4096) < gpu_step([large, small], 4096)


def test_attention_that_is_written_out_and_buffers_count() -> None:
    settings = ["gradient_accumulation_steps=1", "data.context_length=512", "data.train_batch_size=8"]
    config = load_run_config(SEED, settings)
    one = MemberShape("a", "relu", 64, 512, 1000)
    plain = estimate(config, [one], LM, 2)
    eager = estimate(config, [one], ModelShape(10, 100, buffer_bytes=7, written_heads=16), 2)
    assert eager["language model"] - plain["language model"] == 7
    assert eager["step and harvest"] - plain["step and harvest"] == 6 * 16 * 512 * 32768


def test_a_narrow_relu_code_counts_where_the_fast_kernels_do_not_run() -> None:
    one = MemberShape("a", "relu", 64, 3200, 1000)
    need = {}
    for name, settings in {"bf16": [], "float32": ["mixed_precision=no"], "fp16": ["mixed_precision=fp16"]}.items():
        config = load_run_config(SEED, ["data.context_length=512", "data.train_batch_size=16", *settings])
        need[name] = estimate(config, [one], LM, 2)["step and harvest"]
    code = 16 * 512 * 3200
    assert need["float32"] - need["bf16"] > 7 * code
    assert need["fp16"] - need["bf16"] > 40 * code


def test_an_apple_gpu_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert Runtime().device == torch.device("cpu")
    with pytest.raises(UserError, match="--device mps: must be auto, cpu or cuda"):
        make_runtime("mps")


@pytest.mark.parametrize(("own", "told"), [({}, True), ({"recipe": 2}, False), ({"legacy_scaling": False}, False)])
def test_the_notice_about_units_is_for_configs_that_may_be_sae_interpretabilitys(
    own: dict[str, object], told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    saes = {"sae_type": "relu", "sae_positions": "a", "sparsity_coeff": 1}
    config = validate_run({"tlens_model_name": "x", "data": {"dataset_name": "x"}, "saes": saes, **own}, "x")
    with caplog.at_level("INFO", "saeopt"):
        notices(config, resumed=False)
    assert ("normalised units" in caplog.text) is told
