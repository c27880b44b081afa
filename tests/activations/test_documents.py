"""Documents: what separates them, which are held out, and how samples are cut from them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from fake_model import BOS, EOS, FakeModel, data_config
from test_tokens import as_text, documents, flat, load

from saeopt.activations import local_files, sources
from saeopt.activations.language_model import LanguageModel
from saeopt.activations.masks import keep_tokens
from saeopt.activations.separators import separator_of
from saeopt.activations.tokens import HeldOut, TokenData
from saeopt.config.io import validate_run
from saeopt.errors import UserError

__all__ = ["documents"]


@pytest.mark.parametrize("rows", ["table", "stream"])
def test_a_very_long_document_is_cut_for_the_held_out_part(tmp_path: Path, rows: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "SMALL_FILES", 0)
    path = tmp_path / "book.jsonl"
    path.write_text(json.dumps({"text": as_text(list(range(3, 903)))}))
    tokens = load(path, rows)
    held = [t for b in tokens.eval_batches(2) for t in b.flatten().tolist()]
    trained = {t for row in flat(tokens, 107) for t in row}
    assert len(held) == 3 * 16
    assert trained | set(held) == {*range(3, 903), EOS}
    assert not (trained & set(held)) - {EOS}


def test_any_token_or_none_can_separate_documents(tmp_path: Path, documents: list[list[int]]):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": as_text(d)}) for d in documents))

    def first(separator: object) -> list[int]:
        changes = {"separator": separator, "shuffle_documents": False, "n_eval_samples": 0}
        return flat(load(path, **changes), 1)[0]

    one, two = documents[0], documents[1]
    assert first("w999") == [*one, 999, *two, 999, *documents[2]][:16]
    assert first("<s>") == first("bos")
    assert first("</s>") == first("eos")
    assert first("none") == first(None) == first(False) == [*one, *two, *documents[2]][:16]
    with pytest.raises(UserError, match=r"'data.separator'.*\(got 'nothing'\)"):
        first("nothing")


@pytest.mark.parametrize("rows", ["table", "stream"])
@pytest.mark.parametrize("prepend_bos", [False, True])
def test_documents_need_not_share_samples(
    tmp_path: Path, rows: str, prepend_bos: bool, documents: list[list[int]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sources, "SMALL_FILES", 0)
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": as_text(d)}) for d in documents))
    tokens = load(path, rows, join_documents=False, prepend_bos=prepend_bos, n_eval_samples=2)
    fresh = 16 - prepend_bos
    pieces = {tuple(d[i : i + fresh]) for d in documents for i in range(0, len(d), fresh)}
    held = [r for b in tokens.eval_batches(1) for r in b.tolist()]
    for row in [*flat(tokens, 60), *held]:
        assert len(row) == 16
        assert tuple(t for t in row if t not in (BOS, EOS)) in pieces | {()}
        assert not prepend_bos or row[0] == BOS
    one = keep_tokens(tokens.calibration(1), FakeModel().special_ids, tokens.data)
    assert one.sum() == sum(t not in (BOS, EOS) for t in tokens.calibration(1)[0].tolist())


def test_the_first_positions_can_be_left_out(tmp_path: Path, documents: list[list[int]]):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": as_text(d)}) for d in documents))
    tokens = load(path, skip_first_positions=4, separator="none")
    keep_bT = keep_tokens(tokens.calibration(3), FakeModel().special_ids, tokens.data)
    assert keep_bT.sum(1).tolist() == [12, 12, 12]
    assert not keep_bT[:, :4].any()


def test_settings_that_leave_nothing_or_count_padding_are_refused():
    raw = {
        "tlens_model_name": "m", "lr_schedule": "constant", "saes": {"sae_type": "relu", "sae_positions": "hook_embed"}
    }  # fmt: skip
    for changes, words in (
        ({"skip_first_positions": 8, "context_length": 8}, "'skip_first_positions' leaves nothing"),
        ({"join_documents": False, "mask_special_tokens": False}, "'join_documents: false' pads samples"),
    ):
        with pytest.raises(UserError, match=words):
            validate_run({**raw, "data": {"dataset_name": "x", **changes}}, "test")


def test_held_out_samples_can_have_data_of_their_own(tmp_path: Path, documents: list[list[int]]):
    path, other = tmp_path / "a.jsonl", tmp_path / "b.csv"
    path.write_text("\n".join(json.dumps({"text": as_text(d)}) for d in documents))
    other.write_text("story\n" + "\n".join(["w5 w6 w7"] * 30))
    np.save(tmp_path / "ids.npy", np.full((9, 16), 8))
    own = {"eval_dataset_name": str(other), "eval_column_name": "story"}
    tokens = load(path, **own)
    assert {t for b in tokens.eval_batches(2) for t in b.flatten().tolist()} == {5, 6, 7, EOS}
    assert tokens.engine.tokens_per_pass == sum(len(d) + 1 for d in documents if d)  # nothing was set aside
    ids = load(path, eval_dataset_name=str(tmp_path / "ids.npy"))
    assert {t for b in ids.eval_batches(2) for t in b.flatten().tolist()} == {8}
    whole = HeldOut.load(data_config(path, **own), FakeModel(), whole=True)
    assert (whole.n, sum(len(b) for b in whole.batches(2))) == (30 * 4 // 16, 7)
    for changes, words in (
        ({"eval_dataset_name": str(tmp_path / "none.csv")}, r"'data.eval_dataset_name': .*none.csv: no such file"),
        ({"eval_dataset_name": str(other)}, r"'data.eval_column_name': .*no column 'text'"),
        ({**own, "n_eval_samples": 8}, "'data.eval_dataset_name': .*holds 120 tokens, less than 8 samples"),
        ({**own, "eval_split": "test["}, "'data.eval_split'"),
    ):
        with pytest.raises(UserError, match=words):
            load(path, **changes)
    with pytest.raises(UserError, match=r"'data.eval_dataset_name': .*none.csv: no such file"):  # before anything else
        local_files.check_sources(data_config(path, eval_dataset_name=str(tmp_path / "none.csv")))


def test_another_split_of_the_same_data_can_be_held_out(tmp_path: Path):
    from datasets import Dataset, DatasetDict

    parts = {"train": ["w3 w4"] * 90, "test": ["w5"] * 90}
    DatasetDict({k: Dataset.from_dict({"text": v}) for k, v in parts.items()}).save_to_disk(tmp_path / "d")
    tokens: TokenData = load(tmp_path / "d", eval_split="test")
    assert {t for b in tokens.eval_batches(2) for t in b.flatten().tolist()} == {5, EOS}


def test_a_separator_that_was_named_counts_as_special(tiny_model_dir: Path, tiny_text: Path):
    raw = {
        "tlens_model_path": str(tiny_model_dir), "lr_schedule": "constant",
        "data": {"dataset_name": str(tiny_text), "separator": "w7", "context_length": 16, "is_tokenized": False},
        "saes": {"sae_type": "relu", "sae_positions": "blocks.1.hook_resid_pre"},
    }  # fmt: skip
    model = LanguageModel.load(validate_run(raw, "test"))
    assert model.tokenizer is not None
    assert model.special_ids == {0, 1, model.tokenizer.convert_tokens_to_ids("w7")}


def test_a_chat_mark_as_separator_is_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logging.getLogger("saeopt"), "propagate", True)
    caplog.set_level(logging.INFO, logger="saeopt")
    model = FakeModel()
    model.tokenizer.add_tokens(["<|im_end|>", "<|endoftext|>"], special_tokens=True)
    separator_of(data_config("x"), model)
    assert "chat" not in caplog.text
    model.tokenizer.eos_token = "<|im_end|>"
    assert separator_of(data_config("x"), model)[0].token == model.tokenizer.eos_token_id
    assert "data.separator: '<|endoftext|>'" in caplog.text
    named, _ = separator_of(data_config("x", separator="<|endoftext|>"), model)
    assert named.token == model.tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_options_that_say_nothing_of_the_data_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n')
    other = tmp_path / "a.txt"
    other.write_text("one\n")
    for changes, message in (
        ({"subset": "en"}, r"'data.subset': .*a.jsonl .*no configurations"),
        ({"token_dtype": "uint16"}, r"'data.token_dtype' is for .bin and .npy"),
        ({"text_unit": "file"}, r"'data.text_unit' is for .txt"),
        ({"eval_column_name": "text"}, r"'data.eval_column_name' needs"),
    ):
        with pytest.raises(UserError, match=message):
            local_files.check_sources(data_config(path, **changes))
        local_files.check_sources(data_config(path, **changes), splits=False)  # what was stored goes on
    local_files.check_sources(data_config(path, eval_dataset_name=str(other), text_unit="file"))
    local_files.check_sources(data_config(path).model_copy(update={"dataset_name": "someone/stories", "subset": "en"}))
