"""Padded rows of token ids train and count as the same documents without padding."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from fake_model import BOS, EOS, FakeModel, data_config

from saeopt.activations import packing, sources
from saeopt.activations.padding import mostly_one_token
from saeopt.activations.tokens import HeldOut, TokenData
from saeopt.errors import UserError

PAD, LONGEST = 5, 12
DOCUMENTS = [[10 + (7 * i + k) % 900 for k in range(3 + i % (LONGEST - 2))] for i in range(60)]


def padded(side: str) -> list[dict[str, list[int]]]:
    rows = []
    for document in DOCUMENTS:
        fill, ones = [PAD] * (LONGEST - len(document)), [1] * len(document)
        zeros = [0] * len(fill)
        if side == "middle":  # 0 within a row: what is left out need not lie at an end
            ids, mask = [*document[:2], *fill, *document[2:]], [1, 1, *zeros, *ones[2:]]
        else:
            ids, mask = (fill + document, zeros + ones) if side == "left" else (document + fill, ones + zeros)
        rows.append({"input_ids": ids, "attention_mask": mask})
    return rows


def write(rows: list[dict[str, list[int]]], path: Path) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def load(file: object, way: str = "table", **changes: object) -> TokenData:
    shape = {"is_tokenized": True, "column_name": "input_ids", "streaming": way == "stream", **changes}
    return TokenData.load(data_config(file, **shape), FakeModel())


def everything(tokens: TokenData) -> list[list[int]]:
    batches = tokens.train(0, 4)
    train = [row for _ in range(20) for row in next(batches).tokens_bT.tolist()]
    return train + [row for batch in tokens.eval_batches(3) for row in batch.tolist()]


@pytest.mark.parametrize("way", ["table", "stream"])
@pytest.mark.parametrize("side", ["right", "left", "middle"])
def test_padded_rows_are_the_documents_without_padding(
    side: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packing, "UNIT_DOCUMENTS", 16)
    monkeypatch.setattr(sources, "SMALL_FILES", 0)
    caplog.set_level(logging.INFO, "saeopt")
    plain = write([{"input_ids": document} for document in DOCUMENTS], tmp_path / "plain.jsonl")
    file = write(padded(side), tmp_path / "padded.jsonl")
    assert everything(load(file, way)) == everything(load(plain, way))
    assert caplog.text.count("positions with attention_mask 0 are left out") == 1


@pytest.mark.parametrize("kind", ["lists", "fixed", "numpy", "selected"])
def test_a_saved_data_set_is_read_without_padding_in_any_layout(kind: str, tmp_path: Path) -> None:
    rows = padded("right")
    table = Dataset.from_list(rows if kind != "selected" else rows[::-1])
    if kind == "fixed":
        from datasets import Features, List, Value

        both = {
            name: List(Value(t), length=LONGEST) for name, t in (("input_ids", "int32"), ("attention_mask", "bool"))
        }
        table = table.cast(Features(both))
    if kind == "numpy":
        table = table.with_format("numpy")
    if kind == "selected":
        table = table.select(range(len(rows) - 1, -1, -1))
    table.save_to_disk(tmp_path / "saved")
    plain = write([{"input_ids": document} for document in DOCUMENTS], tmp_path / "plain.jsonl")
    assert everything(load(tmp_path / "saved")) == everything(load(plain))


def test_full_blocks_stay_joined_as_they_are_though_the_last_is_padded(tmp_path: Path) -> None:
    blocks = [{"input_ids": list(range(10 + i, 10 + i + LONGEST)), "attention_mask": [1] * LONGEST} for i in range(40)]
    blocks[-1]["attention_mask"] = [1] * 4 + [0] * (LONGEST - 4)
    file = write(blocks, tmp_path / "blocks.jsonl")
    assert not any(EOS in row for row in everything(load(file)))
    assert any(EOS in row for row in everything(load(write(padded("right"), tmp_path / "documents.jsonl"))))


def test_held_out_data_of_their_own_have_a_mask_of_their_own(tmp_path: Path) -> None:
    train = write([{"input_ids": list(range(10, 40))}] * 9, tmp_path / "train.jsonl")
    file = write(padded("left"), tmp_path / "eval.jsonl")
    config = data_config(train, is_tokenized=True, column_name="input_ids", eval_dataset_name=str(file))
    assert PAD not in HeldOut.load(config, FakeModel(), whole=True).tokens


@pytest.mark.parametrize("way", ["table", "stream"])
def test_a_mask_of_another_length_is_one_line(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SMALL_FILES", 0)
    rows = padded("right")
    rows[-1]["attention_mask"].append(1)
    with pytest.raises(UserError, match="a row of 12 tokens in 'input_ids' and 13 entries in 'attention_mask'"):
        load(write(rows, tmp_path / "padded.jsonl"), way)


def test_rows_that_look_padded_without_a_mask_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    short = [{"input_ids": (d[:4] + [PAD] * LONGEST)[:LONGEST]} for d in DOCUMENTS]
    load(write(short, tmp_path / "short.jsonl"))
    assert "60 of 60 rows are mostly token 5, repeated" in caplog.text
    assert "'attention_mask' column" in caplog.text
    caplog.clear()
    np.save(tmp_path / "short.npy", np.array([row["input_ids"] for row in short], dtype=np.uint16))
    load(tmp_path / "short.npy")
    assert "60 of 60 rows are mostly token 5, repeated" in caplog.text
    caplog.clear()
    load(write([{"input_ids": d} for d in DOCUMENTS], tmp_path / "plain.jsonl"))
    special = [{"input_ids": (d[:4] + [BOS] * LONGEST)[:LONGEST]} for d in DOCUMENTS]
    load(write(special, tmp_path / "special.jsonl"))  # counts nowhere in any case
    assert "repeated" not in caplog.text


def test_which_rows_are_mostly_one_token() -> None:
    a = list(range(6))
    assert mostly_one_token(a + [0] * 7) == mostly_one_token([0] * 7 + a) == 0
    assert mostly_one_token([0] * 4 + a) is None
    assert mostly_one_token([1, 2] * 8) is None
    assert mostly_one_token([3] * 7) is None
    assert mostly_one_token(None) is None
    assert mostly_one_token(np.full(20, 4)) == 4
