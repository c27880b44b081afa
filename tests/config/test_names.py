"""Names from other libraries and papers: what is wrong is named, and what was meant is suggested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from saeopt.activations.hook_points import hook_of_module, match_hooks, residual_hooks
from saeopt.config import load_run_config
from saeopt.config.study_file import study_spec
from saeopt.errors import UserError


def raw(sae_type: str = "relu") -> dict[str, Any]:
    return {
        "recipe": 2, "tlens_model_name": "gpt2",
        "data": {"dataset_name": "x.jsonl", "n_train_samples": 100},
        "saes": {"sae_type": sae_type, "sae_positions": ["blocks.2.hook_resid_pre"]},
    }  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(raw()))
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("saes.lambda=3", "did you mean 'saes.sparsity_coeff'?"),
        ("saes.l1=3", "did you mean 'saes.sparsity_coeff'?"),
        ("saes.L1-coeff=3", "did you mean 'saes.sparsity_coeff'?"),
        ("lambda=3", "did you mean 'saes.sparsity_coeff'?"),
        ("saes.expansion=4", "did you mean 'saes.dict_size_to_input_ratio'?"),
        ("saes.k=8", "; relu has 'saes.sparsity_coeff'"),
        ("saes.topk=8", "'saes.k' is a field of sae_type topk"),
        ("saes.aux_coeff=1", "'saes.aux_coeff' is a field of sae_type gated, "),
        ("saes.lambda@blocks.2.hook_resid_pre=3", "did you mean 'saes.sparsity_coeff'?"),
        ("data.ctx_len=8", "did you mean 'data.context_length'?"),
        ("n_eval_samples=8", "did you mean 'data.n_eval_samples'?"),
        ("saes.sparsity_coef=8", "did you mean 'sparsity_coeff'"),
        ("data.context_length=-3", "'data.context_length': must be greater than 0 (got -3)"),
        ("saes.sae_type=rleu", "did you mean 'relu'?"),
        ("saes.retrain_saes=false", "needs 'pretrained_sae_paths'"),
        ("data=3", "must be a section"),
        ("lr.x=3", "'lr' has no fields"),
    ],
)
def test_a_bad_option_is_named_and_not_the_file(file: Path, change: str, said: str) -> None:
    if change == "lr.x=3":
        file.write_text(yaml.safe_dump({**raw(), "lr": 1e-3}))
    with pytest.raises(UserError) as error:
        load_run_config(file, ["seed=1", change, "lr=1e-3"] if change != "lr.x=3" else [change])
    text = str(error.value)
    assert text.startswith(f"--set {change}: ")
    assert said in text
    assert "mine.yaml" not in text


def test_what_is_wrong_in_the_file_names_the_file_whatever_options_there_are(file: Path) -> None:
    file.write_text(yaml.safe_dump({**raw(), "lamda": 1}))
    with pytest.raises(UserError, match=r"mine\.yaml: unknown key 'lamda'"):
        load_run_config(file, ["saes.sparsity_coeff=1", "lr=1e-3"])


@pytest.mark.parametrize(("name", "said"), [("saes.lambda", "'saes.sparsity_coeff'"), ("l1", "'saes.sparsity_coeff'"),
                                            ("expansion", "'saes.dict_size_to_input_ratio'")])  # fmt: skip
def test_the_space_of_a_study_suggests_the_same(name: str, said: str) -> None:
    with pytest.raises(UserError, match=f"did you mean {said}"):
        study_spec({"name": "s", "base": raw(), "space": {name: [1, 2]}}, "s.yaml")


@pytest.mark.parametrize(
    ("module", "hook"),
    [
        ("model.layers.2", "blocks.2.hook_resid_post"),
        ("transformer.h.11", "blocks.11.hook_resid_post"),
        ("gpt_neox.layers.0.mlp", "blocks.0.hook_mlp_out"),
        ("layers.3.self_attn", "blocks.3.hook_attn_out"),
        ("model.layers.*", "blocks.*.hook_resid_post"),
        ("model.layers.4.input_layernorm", "blocks.4.ln1.hook_normalized"),
        ("model.embed_tokens", "hook_embed"),
        ("hidden_states[3]", "blocks.3.hook_resid_pre"),
        ("blocks.2", "blocks.2.hook_resid_post"),
        ("blocks.2.hook_resid_pre", None),
        ("lm_head", None),
        ("model.layers.2.nonsense", None),
    ],
)
def test_a_module_of_hugging_face_has_its_hook_point(module: str, hook: str | None) -> None:
    assert hook_of_module(module) == hook


def test_the_error_names_the_hook_point_that_is_meant() -> None:
    with pytest.raises(UserError, match=r"'model\.layers\.2'; that is 'blocks\.2\.hook_resid_post' here"):
        match_hooks(["model.layers.2"], residual_hooks(4))
    with pytest.raises(UserError, match=r"near ones: blocks\.\d\.hook_resid_post"):
        match_hooks(["model.layers.9"], residual_hooks(4))
