"""What other libraries save themselves gives here the code and the reconstruction that it gives there, to 1e-5."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from peer_sessions import close, run_peer
from peers_worker import activations

import saeopt
from saeopt.errors import UserError

WHERE = {
    "sae-lens": {
        "standard": "blocks.0.hook_resid_pre",
        "gated-reads-x": "blocks.3.hook_resid_pre",
        "Transcoder": "blocks.1.hook_resid_mid->blocks.1.hook_mlp_out",
        "training-batchtopk": "blocks.0.hook_attn_out",
    },
    "dictionary-learning": {"topk": "blocks.3.hook_resid_post", "new": "new"},
    "sparsify": {"layers.10": "blocks.10.hook_resid_post", "layers.1.mlp": "layers.1.mlp"},
    "circuit-tracer": {"relu/layer_1": "blocks.1.hook_resid_mid->blocks.1.hook_mlp_out"},
}
"""Some of the SAEs → the keys under which they are found."""
REFUSED = {
    "SkipTranscoder": "sae_weights.safetensors: has a skip connection (W_skip)",
    "layer_norm": "cfg.json: 'normalize_activations: layer_norm' scales each token",
    "constant_norm_rescale": "cfg.json: 'normalize_activations: constant_norm_rescale' scales each token",
    "skip": "has a skip connection (W_skip)",
}


@pytest.mark.parametrize("library", WHERE)
def test_codes_and_reconstructions_are_the_librarys_own(library: str, tmp_path: Path) -> None:
    found, x_Nd, seen = run_peer(library, "save", tmp_path), activations(), set()
    for name, theirs in found.items():
        folder, _, layer = name.partition("/layer_")
        if folder in REFUSED:
            continue
        saes = saeopt.load(tmp_path / folder)
        key = list(saes)[int(layer or 0)]
        assert key == WHERE[library].get(name, key)
        close(saes[key].encode(x_Nd), theirs["code"], f"{name}: code")
        close(saes[key](x_Nd), theirs["decoded"], f"{name}: reconstruction")
        seen.add(name)
    assert set(WHERE[library]) <= seen
    for folder, reason in REFUSED.items():
        if (tmp_path / folder).exists():
            with pytest.raises(UserError, match=re.escape(reason)):
                saeopt.load(tmp_path / folder)
