"""Models that do not predict the next token are one line, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from saeopt.activations.pretrained import read_model_config
from saeopt.errors import UserError


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "t5"}, r"an encoder–decoder model \(t5\)"),
        ({"model_type": "bart"}, r"an encoder–decoder model \(bart\)"),
        ({"model_type": "bert"}, r"a masked language model \(bert\)"),
        ({"model_type": "distilbert"}, r"a masked language model \(distilbert\)"),
        ({"model_type": "vit"}, r"another kind of model \(vit\)"),
    ],
)
def test_what_is_no_causal_language_model_is_refused(tmp_path: Path, config: dict[str, str], words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"holds {words}, and a causal language model is needed"):
        read_model_config(str(tmp_path), True)


@pytest.mark.parametrize("config", [{"model_type": "gpt2"}, {"model_type": "bert", "is_decoder": True}])
def test_causal_language_models_pass(tmp_path: Path, config: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_config(str(tmp_path), True).model_type == config["model_type"]
