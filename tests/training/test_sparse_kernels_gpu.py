"""Kernels of the sparse steps and of jumprelu against plain torch, element by element.

They need a GPU, or Triton's interpreter: TRITON_INTERPRET=1 and the package triton.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from saeopt.training.step.kernels.batch import Ragged  # needs Triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() or INTERPRETED), reason="needs a CUDA device"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


def pre_activations(kind: str, members: int, n: int, h: int) -> tuple[Tensor, Tensor]:
    pre, bias = random(members, n, h), random(members, h, seed=1) * 0.1
    if kind == "ties":
        pre, bias = (pre * 2).round() / 2, bias * 0
    elif kind == "constant":
        pre, bias = torch.ones_like(pre), bias * 0
    elif kind == "few are positive":
        pre -= 2.5
    elif kind == "uneven":
        pre *= (random(members, n, 1, seed=2) * 3).exp()
    return pre, bias


def assert_near(found: Tensor, expected: Tensor) -> None:
    """By the largest of all: what is small here is a difference of large numbers."""
    tolerance = 1e-5 if found.dtype == torch.float32 else 1e-2
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


KINDS = ["noise", "ties", "constant", "few are positive", "uneven"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("kind", "n", "h", "ks", "dtype"),
    [
        *((kind, 37, 320, (3.0, 7.5), torch.float32) for kind in KINDS),
        ("noise", 20, 20, (3.0, 1.0, 5.0), torch.float32),
        ("noise", 20, 20, (20.0,), torch.float32),
        ("noise", 5, 1001, (2.0, 0.4), torch.float32),
        ("uneven", 64, 1024, (8.0, 2.0), torch.bfloat16),
        ("uneven", 3000, 8192, (64.0, 8.0), torch.bfloat16),
        ("noise", 4096, 24576, (64.0,), torch.bfloat16),
    ],
)  # fmt: skip
def test_the_largest_of_a_batch_are_those_of_a_sort(
    kind: str, n: int, h: int, ks: tuple[float, ...], dtype: torch.dtype, masked: bool
) -> None:
    from saeopt.training.step.kernels import batch  # needs Triton

    if INTERPRETED and n * h > 2**17:
        pytest.skip("too large for the interpreter")
    members = len(ks)
    pre, bias = pre_activations(kind, members, n, h)
    pre = pre.to(dtype)
    keep = (random(n, seed=3) > -0.5).float() if masked else None
    kept = n if keep is None else int(keep.sum())
    want = torch.tensor([int(k * kept) for k in ks], dtype=torch.int32, device=DEVICE)
    floor = batch.first_floors(members, pre.device)
    for factor in (1.0, 1.0, 1.2, 0.3):  # nothing is known; as it was left; too high; so low that the bag has no room
        floor.copy_((floor.view(torch.float32) * factor).view(torch.int32).clamp_min(1))
        found = batch.select(pre, bias, keep, want, int(max(ks) * n), floor)
        assert_largest(found, pre, bias, keep, want)


def assert_largest(found: Ragged, pre: Tensor, bias: Tensor, keep: Tensor | None, want: Tensor) -> None:
    """What lies where, against a stable sort."""
    members, n, h = pre.shape
    for member in range(members):
        code = torch.relu(pre[member].float() + bias[member]) * (1.0 if keep is None else keep[:, None])
        flat = code.view(-1)
        order = flat.sort(descending=True, stable=True).indices[: int(want[member])]
        order = order[flat[order] > 0].sort().values
        used = len(order)
        tokens, latents = found.rows[member].long() - member * n, found.latents[member].long()
        assert torch.equal(tokens[:used] * h + latents[:used], order)
        assert torch.equal(found.values[member, :used], flat[order])
        assert (found.values[member, used:] == 0).all()
        assert (latents[used:] == h).all()
        assert (tokens[used:] == n).all()
        ends = torch.bincount(order // h, minlength=n).cumsum(0)
        assert torch.equal(found.start[member].long(), torch.nn.functional.pad(ends, (1, 0)))


class Entries(NamedTuple):
    """A code as the kernels take it, and for each entry its member and token."""

    values: Tensor
    latents: Tensor
    at: Tensor
    rows: Tensor | None = None
    start: Tensor | None = None

    def dense(self, entries: Tensor, members: int, n: int, h: int) -> Tensor:
        """What belongs to the entries that are used, (M, N, h)."""
        used = self.values.view(-1) > 0
        flat = torch.zeros(members * n * h, device=DEVICE)
        flat[self.at[used] * h + self.latents.view(-1).long()[used]] = entries.reshape(-1)[used]
        return flat.view(members, n, h).double()


def entries_of(pre: Tensor, keep: Tensor | None, ks: tuple[float, ...], k: int) -> Entries:
    """The k largest of every token, or as many as `ks` of all, then with tokens of none and of very many."""
    from saeopt.training.step.kernels import batch  # needs Triton

    members, n, h = pre.shape
    if k:
        kept = 1.0 if keep is None else keep[None, :, None]
        values, latents = (torch.relu(pre) * kept).topk(k, sorted=False)
        latents = torch.where(values > 0, latents, h).int().view(-1, k)
        at = torch.arange(members * n, device=DEVICE).repeat_interleave(k)
        return Entries(values.view(-1, k).contiguous(), latents, at)
    count = n if keep is None else int(keep.sum())
    want = torch.tensor([int(one * count) for one in ks], dtype=torch.int32, device=DEVICE)
    bias, floor = torch.zeros(members, h, device=DEVICE), batch.first_floors(members, pre.device)
    values, latents, rows, start = batch.select(pre, bias, keep, want, int(max(ks) * n), floor)
    assert (start[:, 1:] - start[:, :-1]).max() > 2 * max(ks)
    return Entries(values, latents, rows.view(-1).long(), rows, start)


@pytest.mark.parametrize("widths", [[320], [20, 40, 80, 160, 320]])
@pytest.mark.parametrize(("n", "ks", "k"), [(41, (9.0, 3.5), 0), (90, (12.0,), 0), (41, (0.0, 0.0), 5)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_and_gradients_of_prefixes_and_ragged_codes(
    n: int, ks: tuple[float, ...], k: int, widths: list[int], masked: bool, dtype: torch.dtype
) -> None:
    from saeopt.training.step.kernels import ragged  # needs Triton
    from saeopt.training.step.kernels import topk as kernels_topk

    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies the bits of bfloat16")
    members, h, d, factor = len(ks), 320, 200, 1.7
    keep = (random(n, seed=3) > -0.5).float() if masked else None
    kept = torch.ones(n, device=DEVICE) if keep is None else keep
    W, b_dec, x = random(members, h, d, seed=4).to(dtype), random(members, d, seed=5), random(n, d, seed=6)
    scale, centred = torch.full((members,), 0.8, device=DEVICE), random(members, n, d, seed=7).to(dtype)
    ends = torch.tensor(widths, dtype=torch.int32, device=DEVICE)
    given = entries_of(pre_activations("uneven", members, n, h)[0].clamp(max=50), keep, ks, k)
    values, latents = given.values, given.latents
    code = given.dense(values, members, n, h)
    errors, dots, (last, every) = ragged.decode(values, latents, given.start, ends, W, b_dec, x, scale, keep, factor)
    steps = [
        (code[..., :width] @ W[:, :width].double() + b_dec[:, None] - 0.8 * x) * kept[None, :, None] for width in widths
    ]
    learns_from = [torch.stack(steps[g:]).sum(0) for g in range(len(widths))]
    assert_near(errors, torch.stack(learns_from, 1))
    assert_near(last.sum(1).to(dtype), steps[-1].square().sum(-1))
    assert_near(every.sum(1).to(dtype), torch.stack(steps).square().sum((0, 3)))
    g_code, g_dec = torch.zeros_like(code), torch.zeros_like(W, dtype=torch.float64)
    for first, width, error in zip([0, *widths], widths, learns_from, strict=False):
        own = slice(first, width)
        g_code[..., own] = factor * (error @ W[:, own].double().mT) * (code[..., own] > 0)
        g_dec[:, own] = factor * code[..., own].mT @ error
    assert_near(given.dense(dots, members, n, h).to(dtype), g_code)
    keys = kernels_topk.sort_keys(latents, members, h)
    read = (keys, values, dots, errors, centred, h, factor, given.rows, ends)
    found, again = kernels_topk.by_latent(*read), kernels_topk.by_latent(*read)
    expected = g_dec, g_code.mT @ centred.double(), g_code.sum(1), (code > 0).double().sum(1)
    for one, other, wanted in zip(found, again, expected, strict=True):
        assert torch.equal(one, other)
        assert_near(one.to(dtype), wanted)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_jumprelu_learns_from_the_band_alone(dtype: torch.dtype, masked: bool) -> None:
    from saeopt.training.step.kernels import jumprelu as kernels_jumprelu  # needs Triton

    members, n, h = 2, 300, 200
    pre, bias = random(members, n, h).to(dtype), random(members, h, seed=1) * 0.1
    theta, push = random(members, h, seed=2).abs() * 0.3, random(members, h, seed=3).abs()
    g, keep = random(members, n, h, seed=4).to(dtype), (random(n, seed=5) > -0.5).float() if masked else None
    kept = torch.ones(n, device=DEVICE) if keep is None else keep
    width = torch.tensor([0.2, 0.7], device=DEVICE)
    pi, near, code = pre.float() + bias[:, None], theta[:, None], pre.clone()
    kernels_jumprelu.code(code, bias, theta, width)
    torch.testing.assert_close(code.float(), pi * (pi > near), rtol=1e-2 if dtype == torch.bfloat16 else 0, atol=0)
    used = torch.where(pi > near, code.float(), pi)  # what is open is known as it was rounded
    band = ((used - near).abs() < width[:, None, None] / 2) & (kept > 0)[None, :, None]
    open_MNh = (pi > near) & (kept > 0)[None, :, None]
    behind = g.clone()
    sums = kernels_jumprelu.backward(code, behind, keep, theta, width, push).sum(1)
    torch.testing.assert_close(behind, g * open_MNh, rtol=0, atol=0)
    torch.testing.assert_close(sums[0], (g.float() * open_MNh).sum(1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(sums[1], ((near * g.float() + push[:, None]) * band).sum(1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(sums[2], open_MNh.float().sum(1), rtol=0, atol=0)
