"""Mixtures of experts: hook points that are not what they are called are refused, and plans need no weights."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from saeopt.activations.language_model import LanguageModel, check_hooks
from saeopt.errors import UserError
from saeopt.training.dry_run import shapes, weightless

SIZES = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 32, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 4},
}
FUSED = {
    "gpt2": {"num_key_value_heads": 4},
    "gpt_neox": {"num_key_value_heads": 4},
    "phi3": {},
}  # queries, keys and values in one projection


def config_of(family: str):
    return AutoConfig.for_model(family, **{**SIZES, **{**FAMILIES, **FUSED}[family]})


def real(family: str) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(AutoModelForCausalLM.from_config(config_of(family)), None, torch.device("cpu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_hook_points_of_neurons_that_experts_do_not_have_are_refused(family: str) -> None:
    lm = real(family)
    for asked in ("blocks.1.mlp.hook_post", "blocks.*.mlp.hook_post", "blocks.0.mlp.hook_pre"):
        for refuse in (lm.resolve, lambda p: check_hooks(p, lm.config)):
            with pytest.raises(UserError, match=r"mlp\.hook_p.* has no neurons.*mlp\.hook_(in|out)"):
                refuse([asked])
    assert "blocks.1.mlp.hook_out" in lm.resolve(["blocks.1.mlp.hook_*"])
    assert not {"blocks.1.mlp.hook_pre", "blocks.1.mlp.hook_post"} & set(lm.hook_points)
    assert lm.activations(torch.arange(8)[None], ["blocks.1.mlp.hook_out"])["blocks.1.mlp.hook_out"].shape == (1, 8, 16)


@pytest.mark.parametrize("family", [*FAMILIES, *FUSED])
def test_a_plan_without_weights_knows_the_same_hook_points(
    family: str, make_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**{"saes.sae_positions": ["blocks.*.hook_resid_post", "blocks.0.hook_mlp_out"]})
    monkeypatch.setattr("saeopt.activations.pretrained.read_model_config", lambda *_: config_of(family))
    model, size = weightless(config)
    lm = real(family)
    assert model._bridge.widths == lm._bridge.widths
    assert size.parameters == sum(p.numel() for p in lm._model.parameters())
    assert [(m.hook_point, m.d) for m in shapes(config, model)] == [
        ("blocks.0.hook_mlp_out", 16), ("blocks.0.hook_resid_post", 16), ("blocks.1.hook_resid_post", 16),
    ]  # fmt: skip


def test_a_plan_of_a_model_without_attention(make_config, monkeypatch: pytest.MonkeyPatch) -> None:
    mamba = AutoConfig.for_model("mamba", vocab_size=60, hidden_size=16, num_hidden_layers=2, state_size=4)
    monkeypatch.setattr("saeopt.activations.pretrained.read_model_config", lambda *_: mamba)
    config = make_config(**{"saes.sae_positions": ["blocks.1.hook_resid_pre"]})
    model, size = weightless(config)
    assert (size.written_heads, [m.d for m in shapes(config, model)]) == (0, [16])


def test_a_model_that_cannot_run_without_weights_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of("mixtral"))
    lm = LanguageModel(model, None, torch.device("meta"))

    def depends_on_values(*_args: object, **_kwargs: object) -> None:
        raise NotImplementedError("aten::nonzero: attempted to run\nthis operator")

    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", depends_on_values)
    with pytest.raises(UserError, match="a plan without weights cannot be made for MixtralForCausalLM: aten::nonzero"):
        lm.width("blocks.0.hook_resid_post")
