"""Run by the interpreter of sae-lens' environment: our weights spliced into the same model by its own class.

python sae_lens_worker.py GIVEN FOUND
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAEMetadata


def main(given_path: str, found_path: str) -> None:
    given: dict[str, Any] = torch.load(given_path)
    model = SAETransformerBridge.boot_transformers(given["model"], dtype=torch.float32)
    saes = []
    for hook, weights in given["saes"].items():
        d, h = weights["W_enc"].shape
        config = StandardSAEConfig(d_in=d, d_sae=h, apply_b_dec_to_input=True, metadata=SAEMetadata(hook_name=hook))
        saes.append(StandardSAE(config))
        saes[-1].load_state_dict(weights)
    found: dict[str, Any] = {}
    for error in (False, True):
        logits, cache = model.run_with_cache_with_saes(given["tokens"], saes=saes, use_error_term=error)
        found[f"logits {error}"] = logits.detach()
        found[f"cache {error}"] = {name: x.detach() for name, x in cache.items() if "hook_sae" in name}
        with model.saes(saes, use_error_term=error):
            name = model.get_sae_hook_name(saes[0])

            def steered(acts: torch.Tensor, hook: object) -> torch.Tensor:
                return acts + given["push"]

            found[f"steered {error}"] = model.run_with_hooks(given["tokens"], fwd_hooks=[(name, steered)]).detach()
    torch.save(found, found_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
