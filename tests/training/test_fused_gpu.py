"""On a GPU: the fused stacks against the autograd reference under bf16, graphs, accumulation, members leaving.

bf16 tolerance: both sides round every product to 8 bits in another order; losses of 30 steps agree to 1 %, mean
squared errors to 1 %, L0 to 2 %; in float32 the loss agrees to 2e-4 (gates that switch on rounding amplify it).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_fused_stacks import VARIANTS, assert_same_modules, batches, fused, make_members, name_of, numbers, train

from saeopt.config.machine import PerformanceConfig
from saeopt.training.step.choose import make_stack, reference_stack
from saeopt.training.step.contract import StackOptions

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NESTED = (0.25, 0.5, 1.0)
ON_GPU: list[dict[str, Any]] = [
    {"sae_type": "batch_topk", "k": 3.5},
    {"sae_type": "batch_topk", "k": [3.0, 1.5, 5.0], "aux_k": 4, "decoder_norm": "free"},
    {"sae_type": "batch_topk", "k": 2.0, "legacy": True, "mse_coeff": 0.5},
    {"sae_type": "matryoshka_batch_topk", "k": [6.0, 2.0, 3.0]},
    {"sae_type": "topk", "k": [5, 2, 3], "prefixes": NESTED},
    {"sae_type": "relu", "prefixes": NESTED},
]
"""Whose fast step is on the GPU alone."""
WIDER = [{"sae_type": name, "d": 160} for name in ("relu", "jumprelu")]
"""Whose code lies in memory."""
TOPK, JUMPRELU, MATRYOSHKA = VARIANTS[-1], {"sae_type": "jumprelu"}, ON_GPU[3]
VARIANTS = VARIANTS + ON_GPU
NUMBERS = [numbers(1e-3, 0.3, 0.5, 1.0), numbers(3e-3, 0.05, 0.7, float("inf")), numbers(1e-3, 0.0, 0.4, 0.1)]


def wide(variant: dict[str, Any], h: int = 320) -> dict[str, Any]:
    return {"d": 48, **variant, "h": h}


def both(variant: dict[str, Any], autocast: torch.dtype | None, accumulation: int = 1, steps: int = 30) -> Any:
    options = StackOptions(dead_after_tokens=2000, autocast=autocast)
    data = batches(steps, torch.float32, "cuda", samples=64, d=variant["d"])
    one, other = (make_members(variant, 3, torch.float32, "cuda") for _ in range(2))
    for sae in one + other:
        with torch.no_grad():
            for name, parameter in sae.named_parameters():
                parameter.mul_(0.3 if name.startswith("W") else 1.0)
            sae.after_step()
    expected = train(reference_stack(one, [1, 2, 3], options), data, accumulation, NUMBERS)
    found = train(fused(other, options, [1, 2, 3]), data, accumulation, NUMBERS)
    return expected, found, one, other


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_float32_equals_the_reference(variant: dict[str, Any], accumulation: int) -> None:
    expected, found, one, other = both(wide(variant), None, accumulation)
    # over a whole batch there are latents at the edge, and the last bit of one decides which of two fires
    edge = 10 if variant["sae_type"].endswith(("batch_topk", "jumprelu")) else 1
    for a_step, b_step in zip(found, expected, strict=True):
        for a, b in zip(a_step, b_step, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-4 * edge)
            assert a == pytest.approx(b, rel=2e-3 * edge, abs=2e-3 * edge)
    assert_same_modules(other, one, 1e-2, 1e-3 * edge)


@pytest.mark.parametrize(
    "variant", [*VARIANTS, *({"sae_type": name, "d": 160} for name in ("relu", "jumprelu"))], ids=name_of
)
def test_bf16_stays_near_the_reference(variant: dict[str, Any]) -> None:
    expected, found, _, _ = both(wide(variant), torch.bfloat16)
    for a, b in zip(found[-1], expected[-1], strict=True):
        assert a["finite"] == b["finite"] == 1.0
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)
        assert a["mse"] == pytest.approx(b["mse"], rel=1e-2)
        assert a["l0"] == pytest.approx(b["l0"], rel=2e-2, abs=0.1)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "topk" not in v["sae_type"]], ids=name_of)
def test_large_members_are_computed_one_after_another(variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saeopt.training.step.gpu.dense.ALONE", 1)
    expected, found, one, other = both(wide(variant), None, steps=12)
    edge = 10 if variant["sae_type"] == "jumprelu" else 1
    for a, b in zip(found[-1], expected[-1], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-4 * edge)
    assert_same_modules(other, one, 1e-2, 1e-3 * edge)


@pytest.mark.parametrize("k", [16, [40, 3, 100]])
@pytest.mark.parametrize("h", [2048, 8192, 20000])
def test_topk_of_wide_dictionaries(h: int, k: int | list[int]) -> None:
    variant = {"sae_type": "topk", "k": k, "d": 48, "h": h, "aux_k": 64}
    expected, found, _, _ = both(variant, None, steps=12)
    for a, b in zip(found[-1], expected[-1], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[6], VARIANTS[12], TOPK, JUMPRELU, MATRYOSHKA], ids=name_of)
def test_state_and_leaving_with_graphs(variant: dict[str, Any]) -> None:
    variant = wide(variant)
    options = StackOptions(dead_after_tokens=2000, autocast=torch.bfloat16)
    data = batches(20, torch.float32, "cuda", samples=64, d=48)
    first, second = make_members(variant, 3, torch.float32, "cuda"), make_members(variant, 3, torch.float32, "cuda")
    stack, again = fused(first, options, [1, 2, 3]), fused(second, options, [1, 2, 3])
    train(stack, data[:10], rows=NUMBERS)
    for i in range(3):
        second[i].load_state_dict(first[i].state_dict())
        again.load_state(i, {k: v.clone() for k, v in stack.state(i).items()})
    stack.remove(0)
    again.remove(0)
    one, other = train(stack, data[10:], rows=NUMBERS[1:]), train(again, data[10:], rows=NUMBERS[1:])
    assert one[-1][0]["loss"] == pytest.approx(other[-1][0]["loss"], rel=1e-4)
    assert one[-1][1]["finite"] == 1.0


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_a_loaded_stack_goes_on_with_the_same_bits(variant: dict[str, Any]) -> None:
    variant = wide(variant)
    options = StackOptions(dead_after_tokens=2000, autocast=torch.bfloat16)
    data = batches(60, torch.float32, "cuda", samples=64, d=48)
    first, second = (make_members(variant, 3, torch.float32, "cuda", seed=seed) for seed in (0, 1))
    stack, again = fused(first, options, [1, 2, 3]), fused(second, options, [1, 2, 3])
    train(stack, data[:40], rows=NUMBERS)
    for i in range(3):
        second[i].load_state_dict(first[i].state_dict())
        again.load_state(i, {k: v.clone() for k, v in stack.state(i).items()})
    train(stack, data[40:], rows=NUMBERS)
    train(again, data[40:], rows=NUMBERS)
    assert_same_modules(second, first, 0, 0)


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[6], VARIANTS[12], JUMPRELU, *ON_GPU], ids=name_of)
def test_windows_of_several_micro_batches_are_replayed_with_the_same_bits(variant: dict[str, Any]) -> None:
    variant = wide(variant)
    options = StackOptions(dead_after_tokens=2000, autocast=torch.bfloat16)
    data = batches(60, torch.float32, "cuda", samples=64, d=48)
    plain, graphed = (make_members(variant, 3, torch.float32, "cuda") for _ in range(2))
    for saes, performance in ((plain, PerformanceConfig(graphs="off")), (graphed, PerformanceConfig())):
        stack = make_stack(saes, [1, 2, 3], options, performance)
        found = train(stack, data, 3, NUMBERS)
        assert stack.assembly.name == "gpu"
        assert bool(stack.graphs.captured) == (performance.graphs == "auto")
        assert all(m["finite"] for m in found[-1])
    assert_same_modules(graphed, plain, 0, 0)


@pytest.mark.parametrize("variant", [VARIANTS[0], VARIANTS[6], VARIANTS[12], JUMPRELU, *ON_GPU], ids=name_of)
def test_windows_that_ranks_add_to_are_replayed_with_the_same_bits(variant: dict[str, Any]) -> None:
    variant = wide(variant)
    options = StackOptions(dead_after_tokens=2000)  # bfloat16 gradients are read, and so added up, in another order
    data = batches(40, torch.float32, "cuda", samples=64, d=48)
    alone, ranked = (make_members(variant, 3, torch.float32, "cuda") for _ in range(2))
    train(fused(alone, options, [1, 2, 3]), data, 1, NUMBERS)
    stack = fused(ranked, options, [1, 2, 3])
    for batch in data:
        stack.accumulate(batch, NUMBERS)
        assert all(t.is_contiguous() for tensors in stack.partial().values() for t in tensors)
        stack.apply(NUMBERS)
    assert stack.assembly.name == "gpu"
    assert stack.graphs.captured
    assert_same_modules(ranked, alone, 0, 0)


@pytest.mark.parametrize(
    "broken", [{"lr": float("inf")}, {"lr": float("nan")}, {"sparsity_coeff": float("nan")}], ids=str
)
@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_a_broken_member_changes_no_more(variant: dict[str, Any], broken: dict[str, float]) -> None:
    """As in the reference: weights, moments, step and counters stay as they were, with graphs too."""
    if "topk" in variant["sae_type"] and "lr" not in broken:
        pytest.skip("it has no λ")
    options = StackOptions(dead_after_tokens=2000, autocast=torch.bfloat16)
    data = batches(20, torch.float32, "cuda", samples=64, d=48)
    saes = make_members(wide(variant), 3, torch.float32, "cuda")
    stack = fused(saes, options, [1, 2, 3])
    train(stack, data[:10], rows=NUMBERS)
    names = [name for name in stack.state(1) if not name.startswith(("pending", "extra", "finite"))]
    before = {name: tensor.clone() for name, tensor in (stack.state(1) | saes[1].state_dict()).items()}
    train(stack, data[10:11], rows=[NUMBERS[0], {**NUMBERS[1], **broken}, NUMBERS[2]])
    found = train(stack, data[11:], rows=NUMBERS)
    assert [row["finite"] for row in found[-1]] == [1.0, 0.0, 1.0]
    after = stack.state(1) | saes[1].state_dict()
    for name in (*names, *saes[1].state_dict()):
        assert name == "beta" or torch.equal(after[name], before[name]), name


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize("d", [48, 64, 576, 768])
def test_adam_on_decoder_rows_is_the_same_every_time(d: int, mode: int) -> None:
    """Rows are read again after they were written, where they have a norm to keep: by threads that must wait."""
    from saeopt.training.step.kernels import rows as kernels_rows  # needs Triton

    members, h, rate, betas, eps = 3, 2048, 0.01, (0.9, 0.999), 1e-8
    generator = torch.Generator("cuda").manual_seed(d + mode)
    g, W, m = (torch.randn(members, h, d, generator=generator, device="cuda") for _ in range(3))
    W /= W.norm(dim=-1, keepdim=True)
    v = m.square() + 0.1
    scale, pull = torch.rand(2, members, h, generator=generator, device="cuda")
    scalars = torch.tensor([rate, 1.0, 0.5, 1.0], device="cuda").repeat(members, 1)
    row_norm = torch.full((members,), 0.7, device="cuda")

    def run() -> list[torch.Tensor]:
        low = torch.empty_like(W, dtype=torch.bfloat16)
        norms, factors = torch.ones(2, members, h, device="cuda")
        W_new, m_new, v_new = (t.clone() for t in (W, m, v))
        kernels_rows.adam_rows(
            g.bfloat16(), W_new, m_new, v_new, low, scalars, betas, eps,
            coefficients=torch.stack([scale, pull], -1), norm_Mh=norms, factor_Mh=factors, row_norm_M=row_norm,
            mode=mode,
        )  # fmt: skip
        return [W_new, m_new, v_new, low, norms, factors]

    first = run()
    for _ in range(30):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    gradient = 0.5 * (scale.unsqueeze(-1) * g.bfloat16().double() + pull.unsqueeze(-1) * W.double())
    m_new = betas[0] * m.double() + (1 - betas[0]) * gradient
    v_new = betas[1] * v.double() + (1 - betas[1]) * gradient.square()
    want = W.double() - rate * m_new / (v_new.sqrt() + eps)
    if mode in (kernels_rows.UNIT, kernels_rows.DIRECTION_UNIT):
        want /= want.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(first[0].double(), want, rtol=1e-5, atol=1e-6)
    used = want if mode < 2 else 0.7 * want / want.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(first[3].double(), used, rtol=1e-2, atol=1e-4)
