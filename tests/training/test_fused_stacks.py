"""The fused stacks equal the autograd reference: gradients, 50 steps of training, metrics, state, members leaving."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from saeopt.config.machine import PerformanceConfig
from saeopt.saes.base import SAE
from saeopt.saes.registry import get_sae
from saeopt.training.step.choose import make_stack, reference_stack
from saeopt.training.step.contract import EXTRA, Example, Numbers, Place, StackOptions
from saeopt.training.step.stack import Stack

D, H, T = 6, 20, 5
VARIANTS: list[dict[str, Any]] = [
    {"sae_type": "relu"},
    {"sae_type": "relu", "decoder_norm": "unit"},
    {"sae_type": "relu", "legacy": True, "mse_coeff": 0.7},
    {"sae_type": "gated"},
    {"sae_type": "gated", "decoder_norm": "unit", "magnitude_activation": "softplus", "aux_coeff": 0.3},
    {"sae_type": "gated", "decoder_norm": "free"},
    {"sae_type": "gated", "recipe": 1},
    {"sae_type": "gated", "legacy": True, "magnitude_activation": None},
    {"sae_type": "hard_concrete"},
    {"sae_type": "hard_concrete", "input_dependent_gates": False, "magnitude_activation": "relu"},
    {"sae_type": "hard_concrete", "decoder_norm": "unit", "legacy": True},
    {"sae_type": "gated_hard_concrete"},
    {"sae_type": "gated_hard_concrete", "aux_form": "seed", "legacy": True},
    {"sae_type": "gated_hard_concrete", "decoder_norm": "unit", "magnitude_activation": "softplus"},
    {"sae_type": "jumprelu"},
    {"sae_type": "jumprelu", "decoder_norm": "free", "legacy": True, "mse_coeff": 0.7, "max_density": 0.1},
    {"sae_type": "jumprelu", "decoder_norm": "free", "penalty": "tanh", "pre_activation_coeff": 0.1},
    {"sae_type": "jumprelu", "penalty": "tanh", "max_density": 0.1},
    {"sae_type": "jumprelu", "penalty": "quadratic", "l0_penalty_target": 3.0, "max_density": 0.1},
    {"sae_type": "topk", "k": 3},
    {"sae_type": "topk", "k": 2, "h": 64, "decoder_norm": "free", "aux_k": 4},
    {"sae_type": "topk", "k": 3, "recipe": 1},
    {"sae_type": "topk", "k": 4, "legacy": True, "mse_coeff": 0.5},
    {"sae_type": "topk", "k": [3, 1, 5]},
    {"sae_type": "topk", "k": 3, "prefixes": [[0.3, 0.5, 1]] * 3},
    {"sae_type": "batch_topk", "k": [3.3, 0.5, 5]},
    {"sae_type": "batch_topk", "k": 2, "h": 64, "decoder_norm": "free", "aux_k": 4},
    {"sae_type": "matryoshka_batch_topk", "k": 3, "legacy": True, "mse_coeff": 0.5},
]
Step = list[dict[str, float]]  # the members' metrics


def numbers(lr: float, sparsity_coeff: float, beta: float, max_grad_norm: float) -> Numbers:
    known = {"lr": lr, "sparsity_coeff": sparsity_coeff, "beta": beta, "max_grad_norm": max_grad_norm}
    return {**known, "bandwidth": beta}


NUMBERS = [numbers(3e-3, 0.3, 0.5, 1.0), numbers(1e-2, 0.05, 0.7, 1e9), numbers(1e-3, 0.0, 0.4, 0.1)]


def name_of(variant: dict[str, Any]) -> str:
    return "-".join(str(v) for v in variant.values())


def make_members(variant: dict[str, Any], n: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> list[SAE]:
    """Awkward on purpose: non-zero biases, decoder rows of many lengths, one latent that never fires.

    A list in the variant gives each member its own.
    """
    fields = {k: v for k, v in variant.items() if k not in ("legacy", "recipe", "d", "h")}
    d, h = variant.get("d", D), variant.get("h", H)
    cls = get_sae(fields["sae_type"])
    saes = []
    for i in range(n):
        own = {name: value[i] if isinstance(value, list) else value for name, value in fields.items()}
        config = cls.Config(sae_positions=["x"], **own)
        legacy, recipe = variant.get("legacy", False), variant.get("recipe", 2)
        sae = cls(d, h, config, legacy_scaling=legacy, recipe=recipe, dtype=dtype)
        generator = torch.Generator().manual_seed(100 * seed + i)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
            sae.b_dec.add_(1.0)
            for bias in ("b_enc", "b_gate", "b_mag"):
                if bias in dict(sae.named_parameters()):
                    sae.get_parameter(bias)[3] = -50.0
            if "threshold" in dict(sae.named_parameters()):
                sae.get_parameter("threshold").abs_()
            sae.after_step()
            sae.scale.fill_(0.8)
            if "variance" in dict(sae.named_buffers()):
                sae.get_buffer("variance").fill_(5.0 + i)  # each member's own, whatever the stream
        saes.append(sae.to(device))
    return saes


def batches(n: int, dtype: torch.dtype, device: str = "cpu", samples: int = 6, d: int = D) -> list[Example]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for i in range(n):
        x_Nd = torch.randn(samples * T, d, generator=generator, dtype=torch.float64) * 2 + 0.5
        keep_N = torch.rand(samples * T, generator=generator) > 0.25 if i % 3 else None
        x_Nd, keep_N = x_Nd.to(device, dtype), None if keep_N is None else keep_N.to(device)
        made.append(Example(x_Nd, x_Nd, keep_N, Place(i * samples, samples, T)))
    return made


def fused(saes: list[SAE], options: StackOptions, seeds: list[int] | None = None) -> Stack:
    stack = make_stack(saes, seeds or list(range(len(saes))), options, PerformanceConfig(stack="fused"))
    assert stack.assembly.name != "reference"
    return stack


def train(stack: Stack, data: list[Example], accumulation: int = 1, rows: list[Numbers] = NUMBERS) -> list[Step]:
    logged = []
    for start in range(0, len(data), accumulation):
        for batch in data[start : start + accumulation]:
            stack.accumulate(batch, rows)
        stack.apply(rows)
        logged.append(stack.metrics())
    return logged


def about(name: str) -> Callable[[str], str]:
    """A failed comparison says which tensor it was."""
    return lambda message: f"{name}: {message}"


def assert_same_modules(one: list[SAE], other: list[SAE], rtol: float, atol: float) -> None:
    for a, b in zip(one, other, strict=True):
        for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
            torch.testing.assert_close(x, y, rtol=rtol, atol=atol, msg=about(name))


def assert_same_metrics(one: list[Step], other: list[Step], rel: float) -> None:
    for a_step, b_step in zip(one, other, strict=True):
        for a, b in zip(a_step, b_step, strict=True):
            assert a == pytest.approx(b, rel=rel, abs=rel, nan_ok=True)


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_fifty_steps_equal_autograd_in_float64(variant: dict[str, Any]) -> None:
    options = StackOptions(dead_after_tokens=60)
    one, other = make_members(variant, 3, torch.float64), make_members(variant, 3, torch.float64)
    data = batches(50, torch.float64)
    expected = train(reference_stack(one, [1, 2, 3], options), data)
    found = train(fused(other, options, [1, 2, 3]), data)
    assert_same_metrics(found, expected, 1e-9)
    assert_same_modules(other, one, 1e-9, 1e-11)


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_gradients_and_sums_equal_autograd(variant: dict[str, Any]) -> None:
    """The gradient itself: one step of plain descent is read off Adam's first moment (m = 0.1 g, unclipped)."""
    options = StackOptions(dead_after_tokens=60)
    rows = [numbers(1e-3, 0.3, 0.5, float("inf"))] * 2
    one, other = make_members(variant, 2, torch.float64), make_members(variant, 2, torch.float64)
    reference, stack = reference_stack(one, [1, 2], options), fused(other, options, [1, 2])
    for each in (reference, stack):
        train(each, batches(4, torch.float64), accumulation=4, rows=rows)
    for i in range(2):
        expected, found = reference.state(i), stack.state(i)
        assert set(expected) == set(found)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-13, msg=about(name))


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_loss_in_float32_stays_within_1e_4(variant: dict[str, Any]) -> None:
    options = StackOptions(dead_after_tokens=60)
    data = batches(50, torch.float32)
    rows = NUMBERS[:2]
    expected = train(reference_stack(make_members(variant, 2, torch.float32), [1, 2], options), data, rows=rows)
    found = train(fused(make_members(variant, 2, torch.float32), options, [1, 2]), data, rows=rows)
    for a, b in zip(found[-1], expected[-1], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_alone_equals_stacked_and_leaving_disturbs_nobody(variant: dict[str, Any]) -> None:
    options = StackOptions(dead_after_tokens=60)
    data = batches(12, torch.float64)
    together, alone = make_members(variant, 3, torch.float64), make_members(variant, 3, torch.float64)
    stack = fused(together, options, [1, 2, 3])
    train(stack, data[:6])
    stack.remove(0)
    train(stack, data[6:], rows=NUMBERS[1:])
    single = fused(alone[2:], options, [3])
    train(single, data, rows=NUMBERS[2:])
    assert_same_modules([together[2]], [alone[2]], 1e-12, 1e-14)
    gone = fused(alone[:1], options, [1])
    train(gone, data[:6], rows=NUMBERS[:1])
    assert_same_modules([together[0]], [alone[0]], 1e-12, 1e-14)


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_state_goes_on_exactly_also_in_the_reference(variant: dict[str, Any]) -> None:
    options = StackOptions(dead_after_tokens=60)
    data = batches(10, torch.float64)
    first, second, third = (make_members(variant, 2, torch.float64, seed=s) for s in (0, 1, 2))
    rows = NUMBERS[:2]
    stack = fused(first, options, [1, 2])
    train(stack, data[:5], rows=rows)
    saved = [({k: v.clone() for k, v in stack.state(i).items()}, first[i].state_dict()) for i in range(2)]
    saved = [(s, {k: v.clone() for k, v in w.items()}) for s, w in saved]
    again, reference = fused(second, options, [1, 2]), reference_stack(third, [1, 2], options)
    for i, (state, weights) in enumerate(saved):
        for target, saes in ((again, second), (reference, third)):
            saes[i].load_state_dict(weights)
            target.load_state(i, {**state, EXTRA + "norm": torch.ones(first[0].h)})  # a GPU's checkpoint
            with pytest.raises(ValueError, match="too much or too little"):
                target.load_state(i, {**state, "more": torch.ones(1)})
    for each in (stack, again, reference):
        train(each, data[5:], rows=rows)
    assert_same_modules(second, first, 0, 0)
    assert_same_modules(third, first, 1e-9, 1e-11)


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_members_of_two_stacks_merge_into_a_third_as_if_alone(variant: dict[str, Any]) -> None:
    options = StackOptions(dead_after_tokens=60)
    data = batches(10, torch.float64)
    together, alone, merged = (make_members(variant, 3, torch.float64) for _ in range(3))
    left, right = fused(together[:2], options, [1, 2]), fused(together[2:], options, [3])
    train(left, data[:5], rows=NUMBERS[:2])
    train(right, data[:5], rows=NUMBERS[2:])
    survivors = fused([merged[1], merged[2]], options, [2, 3])
    for place, (stack, index, number) in enumerate([(left, 1, 1), (right, 0, 2)]):
        merged[number].load_state_dict(together[number].state_dict())
        survivors.load_state(place, {k: v.clone() for k, v in stack.state(index).items()})
    train(survivors, data[5:], rows=NUMBERS[1:])
    for number in (1, 2):
        train(fused([alone[number]], options, [number + 1]), data, rows=[NUMBERS[number]])
    assert_same_modules(merged[1:], alone[1:], 1e-9, 1e-11)


def test_a_broken_member_keeps_its_last_finite_weights() -> None:
    options = StackOptions(dead_after_tokens=60)
    data = batches(6, torch.float64)
    saes, alone = make_members(VARIANTS[0], 2, torch.float64), make_members(VARIANTS[0], 2, torch.float64)
    stack = fused(saes, options, [1, 2])
    train(stack, data[:3], rows=NUMBERS[:2])
    before = saes[0].W_enc.detach().clone()
    broken = [{**NUMBERS[0], "sparsity_coeff": float("nan")}, NUMBERS[1]]
    stack.accumulate(data[3], broken)
    stack.apply(broken)
    found = stack.metrics()
    train(stack, data[4:], rows=NUMBERS[:2])
    assert [m["finite"] for m in found] == [0.0, 1.0]
    assert torch.equal(saes[0].W_enc, before)
    train(fused(alone[1:], options, [2]), data, rows=NUMBERS[1:2])
    assert_same_modules(saes[1:], alone[1:], 1e-12, 1e-14)


def test_a_step_for_autoencoders_refuses_another_target() -> None:
    stack, (example,) = fused(make_members(VARIANTS[0], 1, torch.float64), StackOptions(60)), batches(1, torch.float64)
    with pytest.raises(ValueError, match="y must be x"):
        stack.step(Example(example.x_Nd, example.x_Nd * 2, None, example.place), NUMBERS[:1])


def test_two_ranks_sum_to_one() -> None:
    """Sums of two halves of a window, added, give the step of the whole."""
    options = StackOptions(dead_after_tokens=60)
    data = batches(2, torch.float64)
    for variant in VARIANTS:
        whole, left, right = (make_members(variant, 2, torch.float64) for _ in range(3))
        stacks = [fused(saes, options, [1, 2]) for saes in (whole, left, right)]
        for batch in data:
            stacks[0].accumulate(batch, NUMBERS[:2])
        stacks[1].accumulate(data[0], NUMBERS[:2])
        stacks[2].accumulate(data[1], NUMBERS[:2])
        for a, b in zip(stacks[1].partial()["sum"], stacks[2].partial()["sum"], strict=True):
            a += b
        stacks[0].apply(NUMBERS[:2])
        stacks[1].apply(NUMBERS[:2])
        assert_same_modules(left, whole, 1e-10, 1e-12)


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[3], VARIANTS[6]], ids=name_of)
def test_weights_that_are_written_to_from_outside_are_seen(variant: dict[str, Any]) -> None:
    options = StackOptions(dead_after_tokens=60)
    data = batches(4, torch.float64)
    first, second = (make_members(variant, 2, torch.float64, seed=s) for s in (0, 1))
    stack = fused(first, options, [1, 2])
    for mine, theirs in zip(first, second, strict=True):
        mine.load_state_dict(theirs.state_dict())
    train(stack, data, rows=NUMBERS[:2])
    train(fused(second, options, [1, 2]), data, rows=NUMBERS[:2])
    assert_same_modules(first, second, 0, 0)


@pytest.mark.parametrize(("sae_type", "autocast", "told"), [
    ("topk", torch.bfloat16, True), ("topk", None, False), ("relu", torch.bfloat16, False),
])  # fmt: skip
def test_a_precision_that_has_no_effect_on_the_cpu_is_told(
    monkeypatch: pytest.MonkeyPatch, sae_type: str, autocast: torch.dtype | None, told: bool
) -> None:
    from saeopt.training.step import choose as stacks

    notices: list[str] = []
    monkeypatch.setattr(stacks, "_notice", notices.append)
    extra: dict[str, Any] = {"k": 2} if sae_type == "topk" else {}
    architecture = get_sae(sae_type)
    saes = [architecture(4, 8, architecture.Config(sae_type=sae_type, sae_positions=["x"], **extra))]
    stacks.make_stack(saes, [0], StackOptions(100, autocast=autocast), PerformanceConfig())
    assert any("mixed_precision" in text for text in notices) == told
