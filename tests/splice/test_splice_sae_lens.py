"""The same weights in the same model by sae-lens' SAETransformerBridge: logits and caches must be the same.

Its environment comes from `scripts/interop_envs.sh sae-lens`; without it the test is skipped.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import saeopt
from saeopt.testing.cases import build, normalise_awkwardly

ROOT = Path(__file__).parents[2]
HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out")


def test_logits_caches_and_steering_are_those_of_sae_lens(tiny_model_dir: Path, tmp_path: Path) -> None:
    python = Path(os.environ.get("INTEROP_DIR", ROOT / ".interop")) / "sae-lens" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{python} is missing: scripts/interop_envs.sh sae-lens makes it")
    saes = {
        hook: normalise_awkwardly(build("relu", {"normalize_activations": "mean_scale"}, d=16, h=24, seed=i)).float()
        for i, hook in enumerate(HOOKS)
    }
    # theirs has no place for a mean of its own: b_dec, which is also taken from x
    folded = {hook: sae.folded().state_dict() for hook, sae in saes.items()}
    weights = {hook: {n: s[n] for n in ("W_enc", "W_dec", "b_enc", "b_dec")} for hook, s in folded.items()}
    tokens = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    push = torch.zeros(24).index_fill(0, torch.tensor([3]), 2.5)
    given = {"model": str(tiny_model_dir), "saes": weights, "tokens": tokens, "push": push}
    torch.save(given, tmp_path / "given.pt")
    quiet = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    worker = [python, Path(__file__).with_name("sae_lens_worker.py"), tmp_path / "given.pt", tmp_path / "found.pt"]
    done = subprocess.run(worker, env=quiet, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(tmp_path / "found.pt")

    model: Any = TransformerBridge.boot_transformers(str(tiny_model_dir), dtype=torch.float32)
    length = folded[HOOKS[0]]["W_dec"][3].norm()
    for error in (False, True):
        with saeopt.splice(model, saes, use_error_term=error, exclude_special_tokens=False) as spliced:
            logits, cache = model.run_with_cache(tokens)
            torch.testing.assert_close(logits, theirs[f"logits {error}"], rtol=1e-5, atol=1e-4)
            found = theirs[f"cache {error}"]
            assert len(found) == 2 * (6 if error else 5)
            for name, x in found.items():
                # x̂ of theirs is in raw units too, as weights that are folded leave no others
                torch.testing.assert_close(cache[name], x, rtol=1e-5, atol=1e-4, msg=name)
            steered = spliced.steer(HOOKS[0], 3, 2.5 * length).model(tokens)
            torch.testing.assert_close(steered, theirs[f"steered {error}"], rtol=1e-5, atol=1e-4)
            assert (steered - logits).abs().max() > 0.1
