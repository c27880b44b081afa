"""Data mixtures and chat templates are refused in one line that names the field and says that they are planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from saeopt.activations.documents import check_column
from saeopt.config import DataConfig, load_run_config
from saeopt.config.study_file import study_spec
from saeopt.errors import UserError

MIXTURES, CHAT = "mixtures of data sets are planned", "chat templates are planned"
DATA = {"dataset_name": "x.txt", "is_tokenized": False, "n_train_samples": 100}
SAES = {"sae_type": "topk", "k": 4, "sae_positions": ["blocks.0.hook_resid_pre"]}


def run(**fields: Any) -> dict[str, Any]:
    data = DATA | fields.pop("data", {})
    return {"tlens_model_name": "gpt2", "data": data, "saes": SAES, **fields}


@pytest.mark.parametrize(
    ("given", "field", "what"),
    [
        (run(data={"dataset_name": ["a", "b"]}), "data.dataset_name", MIXTURES),
        (run(data={"dataset_name": {"a": 0.3, "b": 0.7}}), "data.dataset_name", MIXTURES),
        (run(data={"dataset_name": [{"name": "a", "weight": 1}]}), "data.dataset_name", MIXTURES),
        (run(data={"eval_dataset_name": ["a", "b"]}), "data.eval_dataset_name", MIXTURES),
        (run(data={"mixture": {"a": 0.3}}), "data.mixture", MIXTURES),
        (run(data={"weights": [1, 2]}), "data.weights", MIXTURES),
        (run(datasets=["a", "b"]), "datasets", MIXTURES),
        (run(data={"chat_template": "default"}), "data.chat_template", CHAT),
        (run(data={"apply-chat-template": True}), "data.apply-chat-template", CHAT),
        (run(chat_template="x"), "chat_template", CHAT),
    ],
)
def test_a_config_is_refused(given: dict[str, Any], field: str, what: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(given))
    with pytest.raises(UserError) as told:
        load_run_config(file)
    assert f"{file}: " in str(told.value)
    assert f"'{field}': " in str(told.value)
    assert what in str(told.value)


@pytest.mark.parametrize(
    ("change", "what"),
    [("data.dataset_name=[a, b]", MIXTURES), ("data.mixture=[a, b]", MIXTURES), ("data.chat_template=x", CHAT)],
)
def test_the_command_line_is_refused(change: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(run()))
    with pytest.raises(UserError, match=rf"--set {change.partition('=')[0]}.*{what}"):
        load_run_config(tmp_path / "run.yaml", [change])


@pytest.mark.parametrize(
    ("field", "values", "what"),
    [("data.dataset_name", [["a", "b"], "c"], MIXTURES), ("data.mixture", [1], MIXTURES),
     ("data.chat_template", ["x"], CHAT)],
)  # fmt: skip
def test_a_space_is_refused(field: str, values: list[Any], what: str) -> None:
    with pytest.raises(UserError, match=rf"space: .*'{field}': .*{what}"):
        study_spec({"name": "s", "base": run(), "space": {field: values}}, "study.yaml")
    study_spec({"name": "s", "base": run(), "space": {"data.dataset_name": ["a", "b"]}}, "study.yaml")  # one at a time


def test_conversations_in_a_column_are_refused() -> None:
    data = DataConfig(**DATA, column_name="messages")
    with pytest.raises(UserError, match=rf"'data.column_name': column 'messages' of x.txt holds .*{CHAT}"):
        check_column(data, [{"role": "user", "content": "hello"}])
