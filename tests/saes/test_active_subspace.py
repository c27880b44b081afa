"""`init: active_subspace`: initial directions lie where the activations vary."""

from __future__ import annotations

import pytest
import torch

from saeopt.saes.base import Widths
from saeopt.saes.init import active_subspace
from saeopt.testing.cases import build

D, H, RANK = 8, 40, 3


def low_rank(n: int = 500, noise: float = 1e-3, seed: int = 0) -> torch.Tensor:
    """Activations of which all but a little lies in three dimensions, far from 0."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(D, RANK, generator=torch.Generator().manual_seed(7)))[0].T
    x_Nd = torch.randn(n, RANK, generator=generator) @ basis + noise * torch.randn(n, D, generator=generator)
    return x_Nd.double() + 5


def outside(W: torch.Tensor, x_Nd: torch.Tensor) -> float:
    """The largest part of a row (a direction) that lies outside of the three leading components."""
    basis = torch.linalg.svd(x_Nd - x_Nd.mean(0), full_matrices=False).Vh[:RANK]
    rows = W / W.norm(dim=-1, keepdim=True)
    return (rows - rows @ basis.T @ basis).norm(dim=-1).max().item()


def test_the_rank_is_the_least_that_holds_99_percent_of_the_variance():
    x_Nd = low_rank()
    basis = active_subspace(x_Nd)
    assert basis.shape == (RANK, D)
    torch.testing.assert_close(basis @ basis.T, torch.eye(RANK).double())
    assert outside(basis, x_Nd) < 1e-6
    assert len(active_subspace(low_rank(noise=1.0))) == D
    assert len(active_subspace(torch.ones(5, D).double())) == D  # nothing varies


@pytest.mark.parametrize("sae_type", ["relu", "gated", "hard_concrete", "topk"])
def test_encoder_and_decoder_start_in_it(sae_type):
    x_Nd = low_rank()
    for init, inside in (("active_subspace", True), ("random", False), (None, False)):
        sae = build(sae_type, {"init": init}, d=D, h=H)
        sae.initialise(x_Nd, torch.Generator().manual_seed(0))
        for W in (sae.W_dec, *(matrix.T for matrix in sae.encoders())):
            assert (outside(W, x_Nd) < 1e-6) is inside
        torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(H).double())


def test_a_transcoder_reads_in_the_subspace_of_what_it_reads_and_writes_in_that_of_what_it_writes():
    x_Nd, widths = low_rank(), Widths((D,), (D,), False)
    y_Ne = low_rank(seed=1) @ torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3)).double())[0]
    sae = build("topk", {"init": "active_subspace", "decoder_norm": "unit"}, d=D, h=H, widths=widths)
    sae.initialise(x_Nd, torch.Generator().manual_seed(0), y_Ne)
    assert outside(sae.W_enc.T, x_Nd) < 1e-6
    assert outside(sae.W_dec, y_Ne) < 1e-6
