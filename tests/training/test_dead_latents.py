"""scripts/dead_latents.py: what it trains, and what it makes of the numbers."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import dead_latents

from saeopt.saes.registry import ARCHITECTURES


def test_every_architecture_is_tried_with_its_fields_defaults_and_only_fields_that_it_has(tmp_path, monkeypatch):
    line = f"x --model m --data d --positions h --out {tmp_path} --l0 8 16 --set lr=0.002"
    line += " --variant old:recipe=2 --variant new:recipe=3,saes.resample_every_tokens=0,lr=0.001"
    monkeypatch.setattr(sys, "argv", line.split())
    found = list(dead_latents.jobs(dead_latents.options()))
    assert {what["type"] for what, _ in found} == set(ARCHITECTURES)
    assert len(found) == 4 * len(ARCHITECTURES)
    for what, config in found:
        assert (config.recipe, config.lr) == ((2, 0.002) if what["variant"] == "old" else (3, 0.001))
        assert (config.saes.sae_type, config.saes.target_l0) == (what["type"], what["target"])
        asked = getattr(config.saes, "resample_every_tokens", None)
        assert asked == (0 if what["variant"] == "new" and "topk" not in what["type"] else None)
        usual = type(config.saes)(sae_type=what["type"], sae_positions=["h"])
        assert config.saes.decoder_norm == usual.decoder_norm


def test_fronts_are_compared_where_the_first_variants_middle_target_ended():
    found = []
    for variant, scale, more in (("old", 1.0, 0.0), ("new", 0.9, 0.02)):
        for seed in (0, 1):
            for l0, fvu in ((8.0, 0.2 * scale), (16.0, 0.1 * (scale + more * seed)), (32.0, 0.05 * scale)):
                what = {"type": "relu", "variant": variant, "seed": seed, "target": l0, "hook": "h"}
                found.append({**what, "dead": 0.01, "l0": l0, "fvu": fvu})
    text = dead_latents.at_equal_l0(found)
    assert "relu h new: 0.910 (0.900 … 0.920)" in text
    assert "| relu | new | 16 | 1.0% (16.0, 0.0910) |" in dead_latents.table(found)
