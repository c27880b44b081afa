"""Kernels of the sparse steps and of jumprelu against plain torch, element by element.

They need a GPU, or Triton's interpreter: TRITON_INTERPRET=1 and the package triton.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

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
    assert (found.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


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
    found = batch.select(pre, bias, keep, want, int(max(ks) * n))
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


@pytest.mark.parametrize("widths", [[320], [20, 40, 80, 160, 320]])
@pytest.mark.parametrize(("n", "ks", "k"), [(41, (9.0, 3.5), 0), (90, (12.0,), 0), (41, (0.0, 0.0), 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_errors_and_gradients_of_prefixes_and_ragged_codes(
    n: int, ks: tuple[float, ...], k: int, widths: list[int], masked: bool
) -> None:
    """Tokens of none, of some and of very many latents; k > 0: every token has k."""
    from saeopt.training.step.kernels import batch, ragged  # needs Triton
    from saeopt.training.step.kernels import topk as kernels_topk

    members, h, d, factor = len(ks), 320, 40, 1.7
    pre = pre_activations("uneven", members, n, h)[0].clamp(max=50)
    keep = (random(n, seed=3) > -0.5).float() if masked else None
    kept = torch.ones(n, device=DEVICE) if keep is None else keep
    W, b_dec, x = random(members, h, d, seed=4), random(members, d, seed=5), random(n, d, seed=6)
    scale, centred = torch.full((members,), 0.8, device=DEVICE), random(members, n, d, seed=7)
    ends = torch.tensor(widths, dtype=torch.int32, device=DEVICE)
    if k:
        values, latents = (torch.relu(pre) * kept[None, :, None]).topk(k, sorted=False)
        latents = torch.where(values > 0, latents, h).int().view(-1, k)
        values, rows, at = values.view(-1, k).contiguous(), None, torch.arange(members * n, device=DEVICE)
        at = at.repeat_interleave(k)
    else:
        want = torch.tensor([int(one * int(kept.sum())) for one in ks], dtype=torch.int32, device=DEVICE)
        code_of = batch.select(pre, torch.zeros(members, h, device=DEVICE), keep, want, int(max(ks) * n))
        values, latents, rows = code_of.values, code_of.latents, (code_of.rows, code_of.start)
        assert (code_of.start[:, 1:] - code_of.start[:, :-1]).max() > 2 * max(ks)
        at = code_of.rows.view(-1).long()
    used = values.view(-1) > 0

    def dense(entries: Tensor) -> Tensor:
        flat = torch.zeros(members * n * h, device=DEVICE)
        flat[at[used] * h + latents.view(-1).long()[used]] = entries.reshape(-1)[used]
        return flat.view(members, n, h).double()

    code, first = dense(values), 0
    errors, dots, (last, every) = ragged.decode(values, latents, rows, ends, W, b_dec, x, scale, keep, factor)
    steps = [
        (code[..., :width] @ W[:, :width].double() + b_dec[:, None] - 0.8 * x) * kept[None, :, None] for width in widths
    ]
    learns_from = [torch.stack(steps[g:]).sum(0) for g in range(len(widths))]
    assert_near(errors, torch.stack(learns_from, 1))
    assert_near(last, steps[-1].square().sum(-1))
    assert_near(every, torch.stack(steps).square().sum((0, 3)))
    g_code, g_dec = torch.zeros_like(code), torch.zeros_like(W, dtype=torch.float64)
    for width, error in zip(widths, learns_from, strict=True):
        own = slice(first, width)
        g_code[..., own] = factor * (error @ W[:, own].double().mT) * (code[..., own] > 0)
        g_dec[:, own] = factor * code[..., own].mT @ error
        first = width
    assert_near(dense(dots), g_code)
    keys = kernels_topk.sort_keys(latents, members, h)
    by_latent = [
        kernels_topk.by_latent(
            keys, values, dots, errors, centred, h, factor, None if rows is None else rows[0], ends
        )
        for _ in range(2)
    ]  # fmt: skip
    expected = g_dec, g_code.mT @ centred.double(), g_code.sum(1), (code > 0).double().sum(1)
    for found, again, one in zip(*by_latent, expected, strict=True):
        assert torch.equal(found, again)
        assert_near(found, one)


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
