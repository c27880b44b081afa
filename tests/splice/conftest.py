"""A small hooked model in double precision, and SAEs whose every parameter is random."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from saeopt.saes.base import SAE
from saeopt.testing.cases import build, normalise_awkwardly

HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="session")
def bridge(tiny_model_dir: Path) -> Any:
    return TransformerBridge.boot_transformers(str(tiny_model_dir), dtype=torch.float64)


@pytest.fixture
def model(bridge: Any) -> Iterator[Any]:
    """The model; whatever a test did, it must be left as it was."""
    points = dict(bridge.hook_dict)
    yield bridge
    assert bridge.hook_dict == points
    assert not any(point.fwd_hooks or point.bwd_hooks for point in points.values())
    assert not bridge.original_model._forward_pre_hooks


@pytest.fixture
def tokens() -> Tensor:
    """Three samples that begin with BOS; one has EOS in its middle."""
    tokens_BT = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    tokens_BT[:, 0] = 0
    tokens_BT[1, 4] = 1
    return tokens_BT


@pytest.fixture
def make_sae() -> Callable[..., SAE]:
    def make(sae_type: str = "relu", *, d: int = 16, h: int = 24, **given: Any) -> SAE:
        """One that also centres and scales in units of its own."""
        fields = {"normalize_activations": "mean_scale", **given.pop("fields", {})}
        sae = normalise_awkwardly(build(sae_type, fields, d=d, h=h, **given))
        return sae.requires_grad_(False)

    return make
