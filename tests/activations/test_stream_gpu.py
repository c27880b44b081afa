"""The stream on a GPU: what the side stream harvests is right under a slow consumer, and the host never waits."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from saeopt.activations.harvest import _order
from saeopt.activations.language_model import LanguageModel
from saeopt.activations.stream import ActivationStream
from saeopt.activations.tokens import TokenData
from saeopt.config.io import validate_run
from saeopt.saes.noise import derived_seed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HOOKS = ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_post"]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=1000, n_embd=64, n_layer=4, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    network: torch.nn.Module = GPT2LMHeadModel(config)
    return LanguageModel(network.cuda(), None, torch.device("cuda"))


@pytest.mark.parametrize(
    ("settings", "shuffle"),
    [
        ({"lm_batch_size": 24}, 0),
        ({"lm_batch_size": 3}, 0),
        ({"lm_batch_size": 16}, 5 * 8 * 64),
        ({"cached": True}, 0),
        ({"cached": True, "lm_batch_size": 16}, 0),
        ({"cached": True, "lm_batch_size": 16}, 5 * 8 * 64),
    ],
)
def test_a_slow_consumer_sees_the_right_activations(
    model: LanguageModel, tmp_path: Path, settings: dict[str, object], shuffle: int
) -> None:
    rng = random.Random(0)
    rows = [[rng.randrange(1, 1000) for _ in range(rng.randrange(20, 200))] for _ in range(2000)]
    (tmp_path / "ids.json").write_text(json.dumps(rows))
    settings = dict(settings)
    activations = {"cache": str(tmp_path / "cache") if settings.pop("cached", False) else "off"}
    data = {
        "dataset_name": str(tmp_path / "ids.json"), "context_length": 64, "n_eval_samples": 4, "n_train_samples": 320,
        "train_batch_size": 8, "shuffle_buffer_tokens": shuffle,
    }  # fmt: skip
    raw = {"tlens_model_path": "x", "lr_schedule": "constant", "data": data, "activations": activations, **settings}
    config = validate_run({**raw, "saes": {"sae_type": "relu", "sae_positions": HOOKS}}, "test")
    tokens = TokenData.load(config.data, model)
    stream = ActivationStream(model, tokens, HOOKS, config)
    weight = torch.randn(2048, 2048, device="cuda")
    found = []
    for i in range(30):
        # Everything is compiled and cached by now: from here on the host must not wait for the device.
        torch.cuda.set_sync_debug_mode("error" if i >= 12 else "default")
        batch = next(stream)
        for _ in range(20):
            weight = (weight @ weight).clamp_(-1, 1)
        found.append(({h: x.clone() for h, x in batch.x.items()}, batch.keep_N.clone()))
    torch.cuda.set_sync_debug_mode("default")
    stream.close()
    group = stream.schedule.group
    for first in range(0, 30 - (30 % group if shuffle else 0), group):  # a group's order is that of all its tokens
        rows_nT = tokens.calibration(8 * 30)[first * 8 : (first + group) * 8]
        wanted = model.activations(rows_nT, HOOKS)
        seed = derived_seed("activation shuffle", 0, first // group, 0) if shuffle else None
        shuffled_N = _order(rows_nT.numel(), seed)
        order_N = torch.arange(rows_nT.numel()) if shuffled_N is None else shuffled_N
        for hook in HOOKS:
            x_Nd = torch.cat([x[hook] for x, _ in found[first : first + group]])
            torch.testing.assert_close(x_Nd, wanted[hook].flatten(0, 1)[order_N.cuda()], rtol=1e-4, atol=1e-5)
        keep_N = torch.cat([keep for _, keep in found[first : first + group]])
        assert torch.equal(keep_N.cpu(), (rows_nT != 0).flatten()[order_N])
