"""Weights that are not those of their folder: refused with the names of some tensors, never filled up by chance."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from saeopt.activations.pretrained import load_model
from saeopt.errors import UserError

Weights = dict[str, Tensor]
CPU = torch.device("cpu")


def under(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if part not in name}


CHANGED: dict[str, tuple[Callable[[Weights], Weights], list[str]]] = {
    "compiled": (under("_orig_mod."), ["missing (lm_head.weight", "unknown", "_orig_mod.model", "without its wrapper"]),
    "ddp": (under("module."), ["missing", "module.lm_head.weight", "without its wrapper"]),
    "a layer": (without("layers.1.mlp"), ["3 missing (model.layers.1.mlp.down_proj.weight", "…"]),
    "head": (without("lm_head"), ["1 missing (lm_head.weight)"]),
    "more": (lambda w: {**w, "v_head.weight": torch.zeros(3)}, ["1 unknown to the model (v_head.weight)"]),
    "shape": (
        lambda w: {**w, "lm_head.weight": w["lm_head.weight"][1:].clone()},
        ["1 of another shape (lm_head.weight (63, 16) instead of (64, 16))"],
    ),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_weights_that_do_not_match_their_folder_are_refused(kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    change, parts = CHANGED[kind]
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as raised:
        load_model(str(folder), torch.float32, CPU)
    for part in [str(folder), *parts]:
        assert part in str(raised.value)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_cut_short_is_one_line(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="holds no causal language model that can be read"):
        load_model(str(folder), torch.float32, CPU)


def test_what_is_stored_otherwise_but_whole_is_loaded(tiny_model_dir: Path, tmp_path: Path) -> None:
    """An old file's constants; a tied head that is not stored; the names of the model without its head."""
    weights = load_file(tiny_model_dir / "model.safetensors")
    old = shutil.copytree(tiny_model_dir, tmp_path / "old")
    constant = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file({**weights, **constant}, old / "model.safetensors", {"format": "pt"})
    assert torch.equal(load_model(str(old), torch.float32, CPU).lm_head.weight, weights["lm_head.weight"])
    neo = AutoConfig.for_model(
        "gpt_neo", vocab_size=60, hidden_size=16, num_layers=2, num_heads=4,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=32,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(neo).save_pretrained(tmp_path / "neo")
    stored = load_file(tmp_path / "neo" / "model.safetensors")
    assert "lm_head.weight" not in stored
    masks = {f"transformer.h.0.attn.attention.{n}": torch.zeros(1) for n in ("bias", "masked_bias")}
    bare = {name.removeprefix("transformer."): tensor for name, tensor in {**stored, **masks}.items()}
    save_file(bare, tmp_path / "neo" / "model.safetensors", {"format": "pt"})
    loaded = load_model(str(tmp_path / "neo"), torch.float32, CPU).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())
