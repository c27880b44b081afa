"""Token data: nothing lost or doubled, held-out documents apart, the same samples however they are read."""

from __future__ import annotations

import itertools
import json
import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_model import BOS, EOS, FakeModel, data_config

from saeopt.activations import local_files, packing, sources
from saeopt.activations.tokens import TokenData
from saeopt.config.run import DataConfig
from saeopt.errors import UserError

N_DOCUMENTS = 60


@pytest.fixture
def documents() -> list[list[int]]:
    """Documents of distinct tokens each, 0 to 40 long: every token names its document."""
    rng = random.Random(0)
    made, token = [], 3
    for i in range(N_DOCUMENTS):
        n = 0 if i == 7 else rng.randrange(1, 31)
        made.append([3 + (token + k) % 997 for k in range(n)])
        token += n
    return made


@pytest.fixture
def file(tmp_path: Path, documents: list[list[int]]) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": as_text(d), "ids": d}) for d in documents))
    return path


@pytest.fixture(params=["table", "stream"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Read as a table, and as a stream in small blocks."""
    monkeypatch.setattr(packing, "UNIT_DOCUMENTS", 16)
    monkeypatch.setattr(sources, "SMALL_FILES", 0)
    return request.param


def as_text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def load(file: object, way: str = "table", model: FakeModel | None = None, **changes: object) -> TokenData:
    return TokenData.load(data_config(file, streaming=way == "stream", **changes), model or FakeModel())


def flat(tokens: TokenData, n: int, start: int = 0, batch: int = 1, **where: int) -> list[list[int]]:
    """The sequences of the samples from `start` on, until n are there."""
    parts = itertools.islice(tokens.train(start, batch, **where), -(-n // batch))
    return [row for part in parts for row in part.tokens_bT.tolist()][:n]


def runs(stream: list[int], mark: int) -> list[tuple[int, ...]]:
    """What lies between separators."""
    found = [tuple(g) for is_mark, g in itertools.groupby(stream, lambda t: t == mark) if not is_mark]
    return found


def test_a_pass_holds_every_training_document_once_and_in_whole(file: Path, way: str, documents: list[list[int]]):
    tokens = load(file, way)
    held = [t for b in tokens.eval_batches(2) for t in b.flatten().tolist()]
    total = sum(len(d) + 1 for d in documents if d)
    in_held = runs(tokens.engine.held_out.tolist(), EOS)
    per_pass = total - len(tokens.engine.held_out)
    n = -(-3 * per_pass // 16)
    stream = [t for row in flat(tokens, n, batch=2) for t in row]
    passes = [stream[i * per_pass : (i + 1) * per_pass] for i in range(3)]
    for one in passes:
        assert Counter(runs(one, EOS)) + Counter(in_held) == Counter(tuple(d) for d in documents if d)
    assert len({tuple(p) for p in passes}) == 3  # a new order in each pass
    assert held == tokens.engine.held_out.tolist()[: 3 * 16]


def test_held_out_documents_are_never_trained_on(file: Path, way: str):
    tokens = load(file, way, n_eval_samples=20)
    held = set(runs(tokens.engine.held_out.tolist(), EOS))
    trained = set(runs([t for row in flat(tokens, 200) for t in row], EOS))
    assert held
    assert not held & trained
    assert [len(b) for b in tokens.eval_batches(8)] == [8, 8, 4]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 6, 42, 90])
def test_every_split_over_ranks_and_starts_gives_the_same_samples(file: Path, way: str, world: int, start: int):
    tokens = load(file, way)
    whole = flat(tokens, 140)
    readers = [tokens.train(start, 2, rank, world) for rank in range(world)]
    sample = start
    for _ in range(5):
        for reader in readers:
            part = next(reader)
            assert part.first_sample == sample
            assert part.tokens_bT.tolist() == whole[sample : sample + 2]
            sample += 2


def test_a_cursor_goes_on_where_a_stream_stopped_and_reads_nothing_twice(
    file: Path, monkeypatch: pytest.MonkeyPatch, way: str
):
    tokens = load(file, way)
    cursors = [json.loads(json.dumps(part.cursor)) for part in itertools.islice(tokens.train(0, 3), 40)]
    whole = flat(tokens, 130)
    for cursor in cursors:
        again = load(file, way)
        sample = cursor["slot"]
        read: list[int] = []
        if way == "stream":
            blocks = again.engine._blocks
            monkeypatch.setattr(
                again.engine, "_blocks", lambda state, b=blocks, r=read: (r.append(0) or x for x in b(state))
            )
        part = next(again.train(sample, 3, cursor=cursor))
        assert (part.first_sample, part.tokens_bT.tolist()) == (sample, whole[sample : sample + 3])
        assert len(read) <= 4  # three sequences of 16 tokens never span more blocks


def test_a_stream_without_a_cursor_still_finds_the_sample(file: Path):
    tokens = load(file, "stream")
    assert flat(tokens, 3, start=70) == flat(tokens, 73)[70:]


def test_order_depends_on_the_data_seed_alone(file: Path, way: str):
    assert flat(load(file, way), 50) == flat(load(file, way), 50)
    assert flat(load(file, way, seed=0), 50) == flat(load(file, way), 50)
    assert flat(load(file, way, seed=1), 50) != flat(load(file, way), 50)


def test_calibration_is_the_beginning_of_training_and_moves_nothing(file: Path, way: str):
    tokens = load(file, way)
    reader = tokens.train(0, 2)
    first = next(reader)
    calibration = tokens.calibration(7)
    assert calibration.dtype == torch.long
    assert calibration[:2].tolist() == first.tokens_bT.tolist()
    assert calibration.tolist() == flat(load(file, way), 7)
    assert next(reader).tokens_bT.tolist() == calibration[2:4].tolist()


def test_the_separator_is_bos_where_the_tokenizer_adds_one_else_eos(file: Path, documents: list[list[int]]):
    def joined(adds_bos: bool, **changes: object) -> list[int]:
        tokens = load(file, model=FakeModel(adds_bos), shuffle_documents=False, n_eval_samples=0, **changes)
        return flat(tokens, 1)[0]

    first, second = documents[0], documents[1]
    assert joined(True) == ([BOS, *first, BOS, *second, BOS, *documents[2]])[:16]
    assert joined(False) == ([*first, EOS, *second, EOS, *documents[2]])[:16]
    assert joined(True, separator="eos") == joined(False)
    assert joined(False, separator="bos") == joined(True)
    assert joined(False, prepend_bos=True) == [BOS, *joined(False)[:15]]


def test_prepend_bos_loses_no_token(file: Path):
    plain = [t for row in flat(load(file, n_eval_samples=0), 60) for t in row]
    begun = flat(load(file, n_eval_samples=0, prepend_bos=True), 60)
    assert all(row[0] == BOS and len(row) == 16 for row in begun)
    assert [t for row in begun for t in row[1:]] == plain[: 60 * 15]


def test_tokenised_and_text_columns_give_the_same(file: Path, way: str):
    ids = load(file, way, is_tokenized=True, column_name="ids")
    assert flat(ids, 80) == flat(load(file, way), 80)


def test_rows_of_one_length_are_full_blocks_and_get_no_separator(tmp_path: Path, way: str):
    blocks = [[3 + 24 * i + k for k in range(24)] for i in range(20)]
    path = tmp_path / "blocks.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": b}) for b in blocks))
    tokens = load(path, way, is_tokenized=True, column_name="input_ids", n_eval_samples=0)
    assert sorted(t for row in flat(tokens, 30) for t in row) == list(range(3, 3 + 24 * 20))


def test_documents_that_bring_their_separator_get_no_second_one(tmp_path: Path, way: str):
    path = tmp_path / "ended.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": [5] * n + [EOS]}) for n in range(1, 40)))
    tokens = load(path, way, is_tokenized=True, column_name="input_ids")
    stream = [t for row in flat(tokens, 60) for t in row]
    assert (EOS, EOS) not in set(itertools.pairwise(stream))


def test_every_format_reads_alike(tmp_path: Path, documents: list[list[int]]):
    from datasets import Dataset, DatasetDict

    texts = [as_text(d) for d in documents if d]
    table = Dataset.from_dict({"text": texts})
    table.to_parquet(tmp_path / "a.parquet")
    table.to_json(tmp_path / "a.jsonl")
    table.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": table, "test": table.select(range(3))}).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    table.to_parquet(tmp_path / "folder" / "train-00000-of-00001.parquet")
    (tmp_path / "list.json").write_text(json.dumps(texts))
    (tmp_path / "rows.json").write_text(json.dumps([{"text": t} for t in texts]))
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    (tmp_path / "blank.txt").write_text("\n\n".join(texts))
    (tmp_path / "texts").mkdir()
    for i in range(len(texts)):
        (tmp_path / "texts" / f"{i:03}.txt").write_text(texts[i])
    names = ["a.parquet", "a.jsonl", "saved", "splits", "folder", "list.json", "rows.json", "a.txt", "blank.txt"]
    wanted = flat(load(tmp_path / "a.parquet"), 40)
    for name in [*names, "*.jsonl", "texts"]:
        assert flat(load(tmp_path / name), 40) == wanted, name


def test_json_lists_of_token_ids_are_read(tmp_path: Path, documents: list[list[int]], file: Path):
    (tmp_path / "ids.json").write_text(json.dumps(documents))
    assert flat(load(tmp_path / "ids.json", is_tokenized=True), 40) == flat(load(file), 40)


@pytest.mark.parametrize("unit", ["auto", "blank_line", "endoftext", "file"])
def test_text_files_are_parted_as_asked(unit: str):
    text = "a\nb\n \nc\n\n\nd"
    parts = {"auto": ["a\nb", "c", "d"], "blank_line": ["a\nb", "c", "d"], "endoftext": [text], "file": [text]}
    assert local_files.split_text(text, unit) == parts[unit]
    assert local_files.split_text("a\n\nb<|endoftext|>c", "auto") == ["a\n\nb", "c"]


def test_a_range_of_rows_can_be_asked_for(file: Path, way: str, documents: list[list[int]]):
    tokens = load(file, way, split="train[10:30]", n_eval_samples=0)
    wanted = {tuple(d) for d in documents[10:30]}
    assert set(runs([t for row in flat(tokens, 60) for t in row], EOS)[1:-1]) <= wanted
    if way == "table":
        assert tokens.engine.tokens_per_pass == sum(len(d) + 1 for d in documents[10:30])
        assert load(file, split="train[50%:]").engine.tokens_in_all == sum(len(d) + 1 for d in documents[30:] if d)


def test_a_small_data_set_is_repeated_with_one_notice(
    file: Path, way: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("saeopt"), "propagate", True)  # first: caplog looks how records get to it
    caplog.set_level(logging.INFO, logger="saeopt")
    tokens = load(file, way, n_train_samples=500)
    flat(tokens, 200)
    flat(tokens, 200)
    assert len({id(r) for r in caplog.records if "repeated" in r.message}) == 1  # one record may be heard twice


def test_what_does_not_fill_a_sample_is_told(
    file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("saeopt"), "propagate", True)  # first: caplog looks how records get to it
    caplog.set_level(logging.INFO, logger="saeopt")
    tokens = load(file)
    rest = tokens.engine.tokens_per_pass - 16 * tokens.n_train_available
    assert 0 < rest < 16
    assert f"{rest} tokens at its end" in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"column_name": "txt"}, "no column 'txt'.*ids, large"),
        ({"is_tokenized": True}, "'data.is_tokenized'.*holds text"),
        ({"column_name": "ids"}, "'data.is_tokenized'.*holds token ids"),
        ({"column_name": "number"}, "'data.column_name'.*int values, not text"),
        ({"column_name": "nested", "is_tokenized": True}, "'data.column_name'.*lists of list values"),
        ({"column_name": "large", "is_tokenized": True}, "token id 1000.*vocabulary has 1000"),
        ({"column_name": "negative", "is_tokenized": True}, "token id -1"),
        ({"n_eval_samples": 10_000}, "'data.n_eval_samples': 10000"),
        ({"context_length": 60, "n_eval_samples": 1}, "less than one sample"),
        ({"split": "train["}, "'data.split'"),
    ],
)
def test_what_is_wrong_with_a_data_set_is_one_line(tmp_path: Path, way: str, changes: dict[str, object], words: str):
    row = {
        "text": as_text([5] * 20),
        "ids": [5] * 20,
        "number": 3,
        "nested": [[1]],
        "large": [3, 1000],
        "negative": [-1],
    }
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for _ in range(4)))
    if way == "stream" and "context_length" in changes:
        pytest.skip("a stream's length is not known beforehand")
    with pytest.raises(UserError, match=words) as error:
        flat(load(path, way, **changes), 1)
    assert "\n" not in str(error.value)


def test_what_is_wrong_with_later_rows_is_one_line_too(tmp_path: Path, way: str):
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = json.dumps({"text": as_text([5] * 20), "ids": [5] * 20}) + "\n"
    ids: dict[str, Any] = {"is_tokenized": True, "column_name": "ids"}
    cases: list[tuple[bytes, dict[str, Any], str]] = [
        ((good * 20).encode() + '{"text": "é"}\n'.encode("latin-1"), {}, "UTF-8|cannot be read"),
        ((good * 20 + '{"text": \n').encode(), {}, "cannot be read"),
        ((good * 20 + '{"text": "w5", "ids": "x"}\n').encode(), ids, "holds text|cannot be read"),
        ((good * 20 + '{"text": "w5", "ids": [1.5]}\n').encode(), ids, "float values|cannot be read|token id"),
    ]
    for content, changes, words in cases:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(content)
        with pytest.raises(UserError, match=words) as error:
            flat(load(path, way, **changes), 60)
        assert "\n" not in str(error.value)
    for mask, words in (
        (["x"] * 30, "'?attention_mask'?"),
        ([1] * 30, "attention_mask"),
        ([None] * 30, "attention_mask"),
    ):
        pq.write_table(pa.table({"ids": [[5] * 20] * 30, "attention_mask": mask}), tmp_path / "rows.parquet")
        if way == "stream" and mask[0] is None:
            continue  # no mask
        with pytest.raises(UserError, match=words):
            flat(load(tmp_path / "rows.parquet", way, **ids), 60)


def test_missing_data_sets_are_one_line(tmp_path: Path):
    from datasets import Dataset, DatasetDict

    DatasetDict({"test": Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "splits")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "bad.jsonl").write_text('{"text": \n')
    (tmp_path / "bad.json").write_text('["a", ')
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": 5}')
    for name, words in {
        "none.parquet": "no such file", "*.none": "no such file", "splits": "no split 'train'.*test",
        "nothing": "no data files", "empty.jsonl": "no rows", "saved": "cannot be read", "empty.json": "empty",
        "bad.jsonl": "cannot be read", "bad.json": "cannot be read", "binary.txt": "UTF-8",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=words) as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value), name
    with pytest.raises(UserError, match="nobody/nothing"):
        load("nobody/nothing")


def test_separators_that_the_tokenizer_lacks_are_refused(file: Path):
    model = FakeModel()
    model.tokenizer.bos_token = None
    for changes in ({"separator": "bos"}, {"prepend_bos": True}):
        with pytest.raises(UserError, match="no BOS"):
            load(file, model=model, **changes)


def test_sliced_and_filtered_tables_keep_their_rows(tmp_path: Path):
    from datasets import Dataset

    rows = Dataset.from_dict({"input_ids": [[i] * (i % 5 + 1) for i in range(3, 60)]})
    rows.filter(lambda r: r["input_ids"][0] % 2 == 0).save_to_disk(tmp_path / "even")
    tokens = load(tmp_path / "even", is_tokenized=True, column_name="input_ids", n_eval_samples=0)
    seen = Counter(t for row in flat(tokens, 6) for t in row)
    assert all(t % 2 == 0 or t == EOS for t in seen)
    table = tokens.engine._table
    assert [d.tolist() for d in table.get(np.arange(3))] == [[4] * 5, [6] * 2, [8] * 4]


def test_the_real_stories_are_read(tinystories: list[str], stories: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    model = FakeModel()
    model.tokenizer, model.vocab_size = AutoTokenizer.from_pretrained(stories), 512
    path = tmp_path / "stories.json"
    path.write_text(json.dumps(tinystories))
    data: DataConfig = data_config(path, context_length=128, n_eval_samples=10)
    tokens = TokenData.load(data, model)
    assert len(tokens.engine.held_out_documents) < 20
    text = model.tokenizer.decode(tokens.calibration(30).flatten().tolist())
    assert [s for s in text.split("<s>")[1:-1] if s.strip() and s.strip() not in {t.strip() for t in tinystories}] == []
