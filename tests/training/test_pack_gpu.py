"""On a GPU: stacks that take turns, as in a pack. With CUDA graphs the same bits as without, near the reference step.

Between any two calls the memory that graphs share is overwritten with NaN, and so is what the allocator has free: a
tensor that is read after another stack's replay could not go unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_fused_stacks import VARIANTS, assert_same_modules, make_members, name_of, numbers

from saeopt.config.machine import PerformanceConfig
from saeopt.saes.base import SAE
from saeopt.training.step.choose import make_stack, reference_stack
from saeopt.training.step.contract import Example, Place, StackOptions
from saeopt.training.step.gpu import graphs as graphs_module
from saeopt.training.step.stack import Stack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
D, SAMPLES, T = 48, 64, 5
DEAD_AFTER = 3 * SAMPLES * T
RELU, GATED, CONCRETE, GATED_CONCRETE = VARIANTS[0], VARIANTS[3], VARIANTS[6], VARIANTS[9]
TOPK = {"sae_type": "topk", "k": 12, "aux_k": 16}
WIDE_TOPK = {**TOPK, "h": 1024, "k": 5}  # another share of dead latents, other places for them
BATCH_TOPK = {"sae_type": "batch_topk", "k": 9.5, "aux_k": 16}
MATRYOSHKA = {"sae_type": "matryoshka_batch_topk", "k": 12.0, "aux_k": 16}
JUMPRELU = {"sae_type": "jumprelu"}
MIXTURES: dict[str, list[dict[str, Any]]] = {
    "topk": [TOPK],
    "relu": [RELU],
    "gated": [GATED],
    "hard_concrete": [CONCRETE],
    "gated_hard_concrete": [GATED_CONCRETE],
    "two topk": [TOPK, WIDE_TOPK],
    "relu, gated": [RELU, GATED],
    "batch_topk": [BATCH_TOPK],
    "matryoshka_batch_topk": [MATRYOSHKA],
    "jumprelu": [JUMPRELU],
    "all": [RELU, GATED, TOPK, CONCRETE, GATED_CONCRETE, WIDE_TOPK, BATCH_TOPK, MATRYOSHKA, JUMPRELU],
}
Leaving = dict[int, list[int]]
"""Window -> numbers of the stacks whose first member leaves before it."""


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Overwrite free memory between calls, of the graphs' pool by a graph that was captured before all others."""
    sizes = [2**9, 2**12, 2**16, 2**20, 2**21, 2**22, 2**23]
    graph = torch.cuda.CUDAGraph()

    def spoil() -> None:
        held = [torch.full((size // 4,), float("nan"), device="cuda") for size in sizes for _ in range(4)]
        del held

    with torch.cuda.graph(graph, pool=graphs_module._pool(torch.device("cuda", 0))[0]):
        spoil()
    plain: Callable[..., Any] = graphs_module.Graphs.__call__

    def call(self: Any, *arguments: Any) -> Any:
        found = plain(self, *arguments)
        graph.replay()
        spoil()
        return found

    monkeypatch.setattr(graphs_module.Graphs, "__call__", call)
    yield
    torch.cuda.synchronize()


def data_of(hook: int, windows: int, micro: int) -> list[list[Example]]:
    """Two populations in turn, so that latents die and come back; masked tokens in every third window."""
    generator = torch.Generator().manual_seed(hook)
    means = torch.randn(2, D, generator=generator) * 2
    made = []
    for window in range(windows):
        batches = []
        for i in range(micro):
            x_Nd = torch.randn(SAMPLES * T, D, generator=generator) + means[window // 9 % 2]
            keep_N = (torch.rand(SAMPLES * T, generator=generator) > 0.25).cuda() if window % 3 == 2 else None
            x_Nd = x_Nd.cuda()
            batches.append(Example(x_Nd, x_Nd, keep_N, Place((window * micro + i) * SAMPLES, SAMPLES, T)))
        made.append(batches)
    return made


def train(stacks: list[Stack], data: list[list[list[Example]]], leaving: Leaving) -> list[list[dict[str, float]]]:
    """As a pack does: every stack's gradients, then every stack's optimiser; or whole steps. The last metrics."""
    found: list[list[dict[str, float]]] = []
    for window in range(len(data[0])):
        for number in leaving.get(window, []):
            stacks[number].remove(0)
        rates = [[numbers(1e-3 * (1 + i), 0.1, 0.5, 1.0) for i in range(len(stack.saes))] for stack in stacks]
        rows = [data[number % len(data)][window] for number in range(len(stacks))]
        if len(rows[0]) == 1:
            for stack, batches, own in zip(stacks, rows, rates, strict=True):
                stack.step(batches[0], own)
        else:
            for stack, batches, own in zip(stacks, rows, rates, strict=True):
                for batch in batches:
                    stack.accumulate(batch, own)
            for stack, own in zip(stacks, rates, strict=True):
                stack.apply(own)
        if window % 5 == 4:
            found = [stack.metrics() for stack in stacks]
    return found


def members_of(mixture: str, hooks: int, count: int) -> list[list[SAE]]:
    """The members of every stack, stack number % hooks at a hook point."""
    stacks = []
    for number in range(hooks * len(MIXTURES[mixture])):
        variant = {"h": 320, **MIXTURES[mixture][number // hooks], "d": D}
        saes = make_members(variant, count, torch.float32, "cuda", seed=number)
        for sae in saes:
            with torch.no_grad():
                for name, parameter in sae.named_parameters():
                    parameter.mul_(0.3 if name.startswith("W") else 1.0)
                sae.after_step()
        stacks.append(saes)
    return stacks


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize(("hooks", "count"), [(1, 6), (2, 3), (3, 1), (3, 5)])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_graphs_change_no_bit(mixture: str, hooks: int, count: int, micro: int, poison: None) -> None:
    data = [data_of(hook, 45, micro) for hook in range(hooks)]
    total = hooks * len(MIXTURES[mixture])
    leaving = {20: [0], 26: list(range(total)), 33: [total - 1]} if count > 2 else {}
    options = StackOptions(DEAD_AFTER, autocast=torch.bfloat16)
    saes, found = {}, {}
    for setting in ("off", "auto"):
        members = members_of(mixture, hooks, count)
        stacks = [make_stack(one, [7] * count, options, PerformanceConfig(graphs=setting)) for one in members]
        found[setting] = train(stacks, data, leaving)
        saes[setting] = [sae for one in members for sae in one]
        captured = [bool(stack.graphs.captured) for stack in stacks]
        assert captured == [setting == "auto"] * total
    assert all(row["finite"] == 1.0 for rows in found["off"] for row in rows)
    assert found["auto"] == found["off"]
    assert_same_modules(saes["auto"], saes["off"], 0, 0)


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_stacks_in_turn_equal_the_reference(mixture: str, micro: int, poison: None) -> None:
    data = [data_of(hook, 24, micro) for hook in range(3)]
    total = 3 * len(MIXTURES[mixture])
    leaving = {12: [0], 16: list(range(total))}
    options = StackOptions(DEAD_AFTER)
    one, other = members_of(mixture, 3, 3), members_of(mixture, 3, 3)
    expected = train([reference_stack(saes, [7] * 3, options) for saes in one], data, leaving)
    found = train([make_stack(saes, [7] * 3, options, PerformanceConfig()) for saes in other], data, leaving)
    for got, want in zip(found, expected, strict=True):
        for a, b in zip(got, want, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
            assert a == pytest.approx(b, rel=1e-2, abs=5e-3)


@pytest.mark.parametrize("variant", [TOPK, WIDE_TOPK, BATCH_TOPK, MATRYOSHKA], ids=name_of)
def test_the_data_makes_latents_die_and_come_back(variant: dict[str, Any]) -> None:
    """Without this the cases above would say nothing of the auxiliary loss."""
    saes = make_members({"h": 320, **variant, "d": D}, 1, torch.float32, "cuda")
    stack = make_stack(saes, [7], StackOptions(DEAD_AFTER), PerformanceConfig())
    shares, places = [], set()
    for batches in data_of(0, 45, 1):
        stack.step(batches[0], [numbers(1e-3, 0.1, 0.5, 1.0)])
        shares.append(stack.metrics()[0]["fraction_dead"])
        places.add(stack.shape)
    assert any(b > a for a, b in pairwise(shares))
    assert any(b < a for a, b in pairwise(shares))
    assert len(places) > 1


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("densities", [[], [1.0], [1.0, 0.5, 0.5, 0.3]])
def test_gradients_per_latent_however_often_it_fires(densities: list[float], members: int) -> None:
    from saeopt.training.step.kernels import topk as kernels_topk  # needs Triton

    n, h, k, d = 1500, 700, 6, 80
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(h - 10, generator=generator)[:k] + 10 for _ in range(members * n)])
    for latent, density in enumerate(densities):
        index[torch.rand(members * n, generator=generator) < density, latent] = latent
    values = torch.rand(members * n, k, generator=generator) + 0.1
    empty = torch.rand(members * n, k, generator=generator) < 0.05
    index[empty], values[empty] = h, 0
    dots = torch.randn(members * n, k, generator=generator) * (values > 0)
    error, centred = torch.randn(2, members, n, d, generator=generator)
    index, values, dots, error, centred = (t.cuda() for t in (index, values, dots, error, centred))
    keys = kernels_topk.sort_keys(index.int(), members, h)
    found = kernels_topk.by_latent(keys, values, dots, error, centred, h, 2.0)
    again = kernels_topk.by_latent(keys, values, dots, error, centred, h, 2.0)
    dense = [torch.zeros(members * n, h + 1, device="cuda").scatter_(1, index, t) for t in (values, dots)]
    code, g_code = (t[:, :h].view(members, n, h).double() for t in dense)
    want = 2 * code.mT @ error.double(), g_code.mT @ centred.double(), g_code.sum(1), (code > 0).double().sum(1)
    for got, same, expected in zip(found, again, want, strict=True):
        assert torch.equal(got, same)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-3)
