"""Small SAEs and configs for the evaluation tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from saeopt.config import RunConfig, validate_run
from saeopt.saes.base import SAE
from saeopt.saes.registry import get_sae

HOOKS = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]


@pytest.fixture
def config() -> RunConfig:
    return make_config()


def make_config(**saes: object) -> RunConfig:
    raw = {
        "tlens_model_name": "tiny",
        "lr_schedule": "constant",
        "legacy_scaling": False,
        "data": {"dataset_name": "tiny"},
        "saes": {"sae_type": "relu", "sae_positions": HOOKS, **saes},
    }
    return validate_run(raw, "test")


@pytest.fixture
def make_sae() -> Callable[..., SAE]:
    def make(d: int = 4, h: int = 8, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> SAE:
        config = make_config()
        sae = get_sae(config.saes.sae_type)(d, h, config.saes, recipe=config.recipe, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        for parameter in sae.parameters():
            parameter.data.normal_(generator=generator)
        sae.scale.fill_(scale)
        return sae.requires_grad_(False)

    return make
