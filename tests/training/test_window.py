"""The window channel: tallies, buffers that follow from them, and controls that learn from windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fused_stacks import NUMBERS, batches, make_members
from threshold_sae import CountingSAE, Steering, ThresholdSAE

from saeopt.config.machine import PerformanceConfig
from saeopt.runs.folder import RunFolder
from saeopt.runs.tensor_file import read_tensors
from saeopt.saes.base import SAE
from saeopt.saes.registry import get_sae
from saeopt.training import Observer, TrialPlan, pack, train_pack
from saeopt.training.controls import Controls, schedules
from saeopt.training.pack import Member, Pack
from saeopt.training.runtime import Runtime
from saeopt.training.step.choose import FAST, reference_stack
from saeopt.training.step.contract import Example, StackOptions
from saeopt.training.step.stack import Assembly, Stack
from saeopt.training.step.tally import join

HOOK = "blocks.1.hook_resid_pre"
OPTIONS = StackOptions(dead_after_tokens=60)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
every_step = pytest.mark.parametrize(
    "step", ["reference", "cpu", pytest.param("gpu", marks=[pytest.mark.gpu, needs_gpu])]
)


def members(cls: type[SAE], n: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[SAE]:
    """relu members of another class; of a width that kernels like, where they are meant for a GPU."""
    made = []
    shape = {"d": 48, "h": 320} if device == "cuda" else {}
    for plain in make_members({"sae_type": "relu", **shape}, n, dtype):
        sae = cls(plain.d, plain.h, plain.config, dtype=dtype)
        sae.load_state_dict(plain.state_dict(), strict=False)
        made.append(sae.to(device))
    return made


def stack_of(step: str, saes: list[SAE], watcher: Controls | None = None) -> Stack:
    """relu's own passes, whatever the class."""
    seeds = list(range(len(saes)))
    if step == "reference":
        return reference_stack(saes, seeds, OPTIONS, watcher)
    row, form = FAST["relu"], FAST["relu"].form(saes[0])
    assembly: Assembly = (
        row.cpu(form, saes, OPTIONS) if step == "cpu" else row.gpu(form, saes, OPTIONS, PerformanceConfig())
    )
    return Stack(saes, seeds, OPTIONS, assembly, watcher)


def data_for(saes: list[SAE], n: int) -> list[Example]:
    return batches(n, torch.float32, saes[0].W_enc.device.type, d=saes[0].d)


def run(stack: Stack, data: list[Example], parts: int = 1) -> None:
    for at in range(0, len(data), parts):
        for example in data[at : at + parts]:
            stack.accumulate(example, NUMBERS[: len(stack.saes)])
        stack.apply(NUMBERS[: len(stack.saes)])


def broken(example: Example) -> Example:
    x_Nd = example.x_Nd.clone()
    x_Nd[2, 1] = math.inf
    return Example(x_Nd, x_Nd, None, example.place)


def snapshot(stack: Stack) -> list[dict[str, torch.Tensor]]:
    states = [stack.state(i) | sae.state_dict() for i, sae in enumerate(stack.saes)]
    return [{k: t.detach().clone() for k, t in s.items() if not k.startswith(("pending", "extra"))} for s in states]


def test_micro_batches_and_ranks_give_the_threshold_of_one_window() -> None:
    data = batches(24, torch.float64)
    whole, four, *ranks = (
        reference_stack(members(ThresholdSAE, 2, dtype=torch.float64), [1, 2], OPTIONS) for _ in range(4)
    )
    for at in range(0, 24, 4):
        window = data[at : at + 4]
        keep_N = torch.cat([torch.ones(len(e.x_Nd)).bool() if e.keep_N is None else e.keep_N for e in window])
        x_Nd = torch.cat([e.x_Nd for e in window])
        run(whole, [Example(x_Nd, x_Nd, keep_N, window[0].place)])
        run(four, window, 4)
        for rank, own in zip(ranks, (window[:1], window[1:]), strict=True):
            for example in own:
                rank.accumulate(example, NUMBERS[:2])
        both = [rank.partial() for rank in ranks]
        for how, tensors in both[0].items():
            for left, right in zip(tensors, both[1][how], strict=True):
                join(left, right, how)
                right.copy_(left)
        for rank in ranks:
            rank.apply(NUMBERS[:2])
    for i in range(2):
        theta = whole.saes[i].threshold
        assert theta > 0
        for other in (four, *ranks):
            for name in ("threshold", "windows", "share"):
                torch.testing.assert_close(
                    other.saes[i].get_buffer(name), whole.saes[i].get_buffer(name), rtol=1e-9, atol=0
                )
        assert torch.equal(ranks[0].saes[i].threshold, ranks[1].saes[i].threshold)


def test_the_first_window_gives_its_own_smallest_activation() -> None:
    (sae,) = members(ThresholdSAE, 1, dtype=torch.float64)
    (example,) = batches(1, torch.float64)
    f_Nh = sae.encode(example.x_Nd)
    run(reference_stack([sae], [1], OPTIONS), [example])
    torch.testing.assert_close(sae.threshold, f_Nh[f_Nh > 0].min().detach())


@every_step
@pytest.mark.parametrize("cls", [ThresholdSAE, CountingSAE])
def test_a_broken_window_changes_nothing(cls: type[SAE], step: str) -> None:
    """Weights, moments, step, counters of silent tokens, buffers: as if it had not been, but for `finite`."""
    if cls is ThresholdSAE and step != "reference":
        pytest.skip("tallies of its own")
    saes = members(cls, 2, "cuda" if step == "gpu" else "cpu")
    stack, data = stack_of(step, saes), data_for(saes, 8)
    run(stack, data[:6])
    before = snapshot(stack)
    assert before[0]["windows"] == 6
    for example in (broken(data[6]), data[7]):  # a sound one afterwards makes it no better
        run(stack, [example])
    for old, new in zip(before, snapshot(stack), strict=True):
        assert not new.pop("finite")
        assert old.pop("finite")
        for name, tensor in old.items():
            assert torch.equal(new[name], tensor), name
    assert [row["finite"] for row in stack.metrics()] == [0.0, 0.0]


def test_the_threshold_goes_on_bit_for_bit_and_leaves_with_its_member() -> None:
    data = batches(12, torch.float32)
    whole, first, second = (reference_stack(members(ThresholdSAE, 3), [1, 2, 3], OPTIONS) for _ in range(3))
    run(whole, data)
    run(first, data[:5])
    for i, sae in enumerate(second.saes):
        sae.load_state_dict({k: t.clone() for k, t in first.saes[i].state_dict().items()})
        second.load_state(i, {k: t.clone() for k, t in first.state(i).items()})
    gone = first.saes[0]
    first.remove(0)
    left = gone.get_buffer("threshold").clone()
    run(second, data[5:])
    for a, b in zip(whole.saes, second.saes, strict=True):
        assert all(torch.equal(t, b.state_dict()[k]) for k, t in a.state_dict().items())
    for example in data[5:]:
        first.accumulate(example, NUMBERS[1:])
        first.apply(NUMBERS[1:])
    for a, b in zip(whole.saes[1:], first.saes, strict=True):
        torch.testing.assert_close(a.get_buffer("threshold"), b.get_buffer("threshold"))
    assert torch.equal(gone.get_buffer("threshold"), left)


def test_what_is_declared_must_be_given() -> None:
    class Forgetful(ThresholdSAE):
        def training_forward(self, *given: Any) -> Any:
            forward = super().training_forward(*given)
            del forward.tallies["largest"]
            return forward

    stack = reference_stack(members(Forgetful, 1), [1], OPTIONS)
    with pytest.raises(ValueError, match=r"Forgetful declares tallies \['smallest', 'largest', 'positive'\]"):
        run(stack, batches(1, torch.float32))


# ---- controls
Make = Callable[..., Any]


def steered(group: list[Member], total: int) -> list[Any]:
    return [*schedules(group, total), Steering()]


@every_step
def test_a_control_moves_a_number_alike_on_every_step(make_config: Make, step: str) -> None:
    device = "cuda" if step == "gpu" else "cpu"
    found = []
    for kind in ("reference", step):
        saes = members(ReluPlain, 3, device)
        group = [Member(str(i), HOOK, make_config(), sae) for i, sae in enumerate(saes)]
        controls = Controls(group, steered(group, 256))
        stack, path = stack_of(kind, saes, controls), []
        for at, example in enumerate(data_for(saes, 12)):
            numbers = controls.numbers(16 * at + 16)
            path.append([float(row["sparsity_coeff"]) for row in numbers])
            (stack.step if at % 2 else stack.accumulate)(example, numbers)
            if not at % 2:
                stack.apply(numbers)
        assert len({tuple(row) for row in path}) == 12  # λ moves in every window
        found.append(torch.tensor(path))
        lambdas = controls.states[-1]["ln"].clone()
        stack.accumulate(broken(example), numbers)
        stack.apply(numbers)
        assert torch.equal(controls.states[-1]["ln"], lambdas)
    torch.testing.assert_close(found[0], found[1], rtol=1e-2 if step == "gpu" else 1e-4, atol=1e-6)


class ReluPlain(CountingSAE):
    """relu by its own class, so that every step takes it."""


def test_controls_follow_the_members_that_are_left(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "controls_of", steered)
    config = make_config(gradient_accumulation_steps=1)
    made = [Member(str(i), HOOK, config, get_sae("relu")(6, 20, config.saes)) for i in range(3)]
    trained = Pack(made, Runtime("cpu"), total_samples=256)
    controls = trained.groups[0].controls
    controls.states[-1]["ln"].copy_(torch.tensor([-3.0, -2.0, -1.0]))
    trained.drop(made[:1], "pruned")
    told = [row["sparsity_coeff"] for _, row in trained.metrics(16)]  # a λ that moves is logged
    assert told == pytest.approx([math.exp(-2), math.exp(-1)])
    state = trained.state(made[2])
    trained.load_state(made[1], state)
    assert [row["sparsity_coeff"] for _, row in trained.metrics(16)] == pytest.approx([math.exp(-1)] * 2)


def test_a_run_with_threshold_and_control_resumes_bit_for_bit(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "controls_of", steered)
    runtime = Runtime("cpu")
    config = make_config(**{"saes.sae_type": "threshold_sae:ThresholdSAE", "data.n_eval_samples": 0})

    class Interrupt(Observer):
        polls = 0

        def should_interrupt(self) -> bool:
            self.polls += 1
            return self.polls == 7

    train_pack([TrialPlan("a", config, tmp_path / "whole")], runtime)
    assert train_pack([TrialPlan("a", config, tmp_path / "cut")], runtime, Interrupt())["a"].status == "interrupted"
    train_pack([TrialPlan("a", config, tmp_path / "cut", resume=True)], runtime)
    whole, cut = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut")
    assert cut.weights_path(256).read_bytes() == whole.weights_path(256).read_bytes()
    assert cut.state_path(256).read_bytes() == whole.state_path(256).read_bytes()
    state = read_tensors(whole.state_path(256))
    assert state[f"{HOOK}/control.steering.ln"] != -2
