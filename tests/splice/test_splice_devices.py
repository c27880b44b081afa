"""A model in bfloat16 with SAEs in float32, as one has them on a GPU; on the CPU the same test runs everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import saeopt
from saeopt.testing.cases import build

HOOK = "blocks.1.hook_resid_pre"
CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_model_in_bfloat16_is_spliced_and_steered(tiny_model_dir: Path, tokens: Tensor, device: str) -> None:
    model: Any = TransformerBridge.boot_transformers(str(tiny_model_dir), dtype=torch.bfloat16, device=device)
    sae = build("topk", {}, d=16, h=24, dtype=torch.float32).requires_grad_(False).to(device)
    tokens = tokens.to(device)
    plain = model(tokens)
    with saeopt.splice(model, {HOOK: sae}, use_error_term=True) as spliced:
        assert torch.equal(model(tokens), plain)
        assert spliced.latents[HOOK].dtype == torch.float32
        loss = model(tokens, return_type="loss")
        assert torch.autograd.grad(loss, spliced.latents[HOOK])[0].any()
        means = spliced.means(tokens)[HOOK]
        ablated = spliced.ablate(HOOK, range(24), to=means).model(tokens)
        steered = spliced.clear().steer(HOOK, 3, 4.0, positions=[2]).model(tokens)
        text = model.generate(tokens[:1], max_new_tokens=4, do_sample=False, verbose=False, stop_at_eos=False)
    assert text.shape == (1, 13)
    for changed in (ablated, steered):
        assert changed.dtype == torch.bfloat16
        assert changed.isfinite().all()
        assert not torch.equal(changed, plain)
    assert torch.equal(steered[:, :2], plain[:, :2])
    with saeopt.splice(model, {HOOK: sae}):
        in_place = model(tokens)
    assert (in_place - plain).abs().max() > 0.1
    other = "cpu" if device == "cuda" else "meta"
    message = rf"the SAE at '{HOOK}' is on {other}, the model on {device}.*: saeopt\.load\(…, device='{device}"
    with pytest.raises(saeopt.UserError, match=message), saeopt.splice(model, {HOOK: sae.to(other)}):
        model(tokens)
