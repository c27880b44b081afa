"""The language model: same numbers by every way, and errors that a user can mend."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from saeopt.activations.language_model import LanguageModel
from saeopt.config.io import validate_run
from saeopt.errors import UserError

TOKENS = torch.randint(0, 60, (3, 9), generator=torch.Generator().manual_seed(0))

GROUPED = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED_QUERIES = GROUPED | {"num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": GROUPED_QUERIES,
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32},
    "gpt_neo": {
        "hidden_size": 16, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "window_size": 4, "max_position_embeddings": 32,
    },
    "gpt_neox": GROUPED,
    "qwen2": GROUPED_QUERIES,
    "gemma2": GROUPED_QUERIES | {"head_dim": 4},
    "mistral": GROUPED_QUERIES | {"head_dim": 4},
}  # fmt: skip


def tiny(family: str) -> torch.nn.Module:
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, vocab_size=60, initializer_range=0.3, **FAMILIES[family])
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, None
    return AutoModelForCausalLM.from_config(config)


def language_model(family: str, processing: str = "raw") -> LanguageModel:
    return LanguageModel(tiny(family), None, torch.device("cpu"), processing)


def run_config(model: Path | str, hooks: list[str], **changes: object):
    data = {"dataset_name": "x.jsonl", "context_length": 16, **changes.pop("data", {})}
    raw = {"tlens_model_path": str(model), "data": data, "saes": {"sae_type": "relu", "sae_positions": hooks}}
    return validate_run({**raw, "lr_schedule": "constant", **changes}, "test")


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_hooks_equal_hidden_states_and_the_bridge(family: str):
    lm = language_model(family)
    n = lm.config.num_hidden_layers
    hooks = [f"blocks.{i}.hook_resid_pre" for i in range(n)] + [f"blocks.{n - 1}.hook_resid_post"]
    got = lm.activations(TOKENS, hooks)
    with torch.no_grad():
        hidden = lm._model(TOKENS, output_hidden_states=True, use_cache=False).hidden_states
    for layer in range(n):
        assert torch.equal(got[f"blocks.{layer}.hook_resid_pre"], hidden[layer])
    with torch.no_grad():
        bridged = lm._bridge.activations(TOKENS, hooks)
    for hook in hooks:
        torch.testing.assert_close(got[hook], bridged[hook], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neo"])
def test_the_numbers_of_a_hook_do_not_depend_on_the_other_hooks(family: str):
    lm = language_model(family)
    alone = lm.activations(TOKENS, ["blocks.1.hook_resid_pre"])["blocks.1.hook_resid_pre"]
    both = lm.activations(TOKENS, ["blocks.0.mlp.hook_post", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"])
    assert torch.equal(alone, both["blocks.1.hook_resid_pre"])
    mlp = lm.activations(TOKENS, ["blocks.0.mlp.hook_post"])["blocks.0.mlp.hook_post"]
    assert torch.equal(mlp, both["blocks.0.mlp.hook_post"])


@pytest.mark.parametrize("family", ["llama", "gpt_neo"])
def test_the_compiled_way_gives_the_same_activations(family: str, monkeypatch: pytest.MonkeyPatch):
    lm = language_model(family)
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **kwargs: compiled(module, backend="eager", **kwargs))
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.0.hook_resid_pre"]
    plain, fast = lm.activations(TOKENS, hooks), lm.activations(TOKENS, hooks, compiled=True)
    for hook in hooks:
        torch.testing.assert_close(fast[hook], plain[hook])
    assert all(t.run is not t.module for (_, c), t in lm._plain._trunks.items() if c)  # it did not fall back


def test_every_listed_hook_point_yields_one_vector_per_token_and_can_be_spliced():
    lm = language_model("gpt2")
    assert {"blocks.1.attn.hook_z", "blocks.0.hook_mlp_out", "blocks.2.mlp.hook_post"} <= set(lm.hook_points)
    assert not any(h.endswith(("hook_pattern", "hook_attn_scores")) for h in lm.hook_points)
    clean = lm.logits(TOKENS)
    for hook in lm.hook_points:
        x_BTd = lm.activations(TOKENS, [hook])[hook]
        assert x_BTd.shape == (3, 9, lm.width(hook)), hook
        same = lm.spliced_logits(TOKENS, {hook: lambda x: x})
        torch.testing.assert_close(same, clean, rtol=1e-3, atol=1e-4, msg=hook)


def test_the_bridge_stops_at_the_deepest_hook():
    lm = language_model("gpt2")
    ran: list[int] = []
    for i, block in enumerate(lm._bridge.bridge.blocks):
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
    lm.activations(TOKENS, ["blocks.0.mlp.hook_post", "blocks.1.attn.hook_z"])
    assert ran == [0]


@pytest.mark.parametrize("hook", ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_post", "blocks.1.attn.hook_z"])
def test_splicing_replaces_the_activations_at_one_hook(hook: str):
    lm = language_model("gpt2")
    seen = {}

    def zero(x_BTd: torch.Tensor) -> torch.Tensor:
        seen["x"] = x_BTd.clone()
        return torch.zeros_like(x_BTd)

    clean, spliced = lm.logits(TOKENS), lm.spliced_logits(TOKENS, {hook: zero})
    assert torch.equal(seen["x"], lm.activations(TOKENS, [hook])[hook])
    assert (clean - spliced).abs().max() > 1e-2
    torch.testing.assert_close(lm.logits(TOKENS), clean)
    if hook == "blocks.2.hook_resid_post":
        assert spliced.std(dim=(0, 1)).max() < 1e-6  # nothing but a constant is left for the unembedding


def test_patterns_resolve_in_model_order_without_aliases():
    lm = language_model("gpt2")
    assert lm.resolve(["blocks.2.hook_resid_pre", "blocks.*.hook_resid_pre"]) == [
        f"blocks.{i}.hook_resid_pre" for i in range(3)
    ]
    assert lm.resolve("blocks.*.hook_z") == [f"blocks.{i}.attn.hook_z" for i in range(3)]
    everything = lm.resolve(["blocks.1.hook_*"])
    assert len({id(lm._bridge.bridge.hook_dict[h]) for h in everything}) == len(everything)


def test_compatibility_mode_keeps_the_predictions_and_centres_the_stream():
    raw, folded = language_model("gpt2"), language_model("gpt2", "compatibility")
    hook = "blocks.2.hook_resid_pre"
    torch.testing.assert_close(
        raw.logits(TOKENS).log_softmax(-1), folded.logits(TOKENS).log_softmax(-1), rtol=1e-3, atol=1e-3
    )
    assert folded.activations(TOKENS, [hook])[hook].mean(-1).abs().max() < 1e-4
    assert raw.activations(TOKENS, [hook])[hook].mean(-1).abs().max() > 1e-2


def test_loads_in_the_wanted_precision(tiny_model_dir: Path):
    config = run_config(tiny_model_dir, ["blocks.1.hook_resid_pre"], lm_dtype="bfloat16")
    lm = LanguageModel.load(config)
    assert lm.activations(TOKENS, ["blocks.1.hook_resid_pre"])["blocks.1.hook_resid_pre"].dtype == torch.bfloat16
    assert (lm.context_length, lm.special_ids, lm.width("blocks.0.hook_resid_post")) == (64, {0, 1}, 16)


@pytest.mark.parametrize(
    ("hooks", "near"),
    [
        (["blocks.7.hook_resid_pre"], "blocks.1.hook_resid_pre"),
        (["blocks.0.hook_mlp_outt"], "blocks.0.hook_mlp_out"),
        (["blocks.*.hook_nothing*"], "blocks"),
    ],
)
def test_a_missing_hook_point_is_refused_before_the_weights_are_read(
    tiny_model_dir: Path, hooks: list[str], near: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("saeopt.activations.language_model.load_model", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=near) as error:
        LanguageModel.load(run_config(tiny_model_dir, hooks))
    assert "\n" not in str(error.value)
    assert hooks[0] in str(error.value)


def test_a_context_longer_than_the_model_is_refused(tiny_model_dir: Path):
    config = run_config(tiny_model_dir, ["blocks.0.hook_resid_pre"], data={"context_length": 65})
    with pytest.raises(UserError, match=r"data.context_length.*65.*64"):
        LanguageModel.load(config)


def test_missing_models_and_wrong_folders_give_one_line(tmp_path: Path, tiny_text: Path):
    hooks = ["blocks.0.hook_resid_pre"]
    for path, words in ((tmp_path / "none", "no such folder"), (tmp_path, "no config.json")):
        with pytest.raises(UserError, match=words):
            LanguageModel.load(run_config(path, hooks))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 8}')
    with pytest.raises(UserError, match="holds no"):
        LanguageModel.load(run_config(tmp_path, hooks))
    named = run_config(tmp_path, hooks, tlens_model_path=None, tlens_model_name="nobody/no-such-model")
    with pytest.raises(UserError, match="nobody/no-such-model"):
        LanguageModel.load(named)


def test_stories_from_its_folder_predicts_stories(stories: Path, tinystories: list[str]):
    lm = LanguageModel.load(run_config(stories, ["blocks.2.hook_resid_pre"]))
    assert lm.special_ids == {1, 2}
    ids = lm.tokenizer(tinystories[900])["input_ids"][:128]
    tokens_BT = torch.tensor([ids])
    logits = lm.logits(tokens_BT)[0, :-1]
    assert torch.nn.functional.cross_entropy(logits, tokens_BT[0, 1:]) < 2.2
    hidden = lm._model(tokens_BT, output_hidden_states=True).hidden_states
    assert torch.equal(lm.activations(tokens_BT, ["blocks.2.hook_resid_pre"])["blocks.2.hook_resid_pre"], hidden[2])


def test_the_fingerprint_follows_weights_and_configuration(tiny_model_dir: Path, tmp_path: Path):
    def fingerprint(folder: Path) -> str:
        return LanguageModel.load(run_config(folder, ["blocks.0.hook_resid_pre"])).fingerprint()

    before = fingerprint(tiny_model_dir)
    assert fingerprint(tiny_model_dir) == before
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    assert fingerprint(other) == before
    settings = json.loads((other / "config.json").read_text())
    settings["layer_norm_epsilon" if "layer_norm_epsilon" in settings else "rms_norm_eps"] = 0.5
    (other / "config.json").write_text(json.dumps(settings))
    assert fingerprint(other) != before
