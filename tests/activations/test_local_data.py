"""Text and token ids as people have them on disk: whatever is there is read, or named."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import os
import sys
import types
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import BOS, EOS
from test_tokens import as_text, documents, flat, load, runs

from saeopt.activations import local_files, sources
from saeopt.errors import UserError

__all__ = ["documents"]
TOKENS = {"is_tokenized": True, "column_name": "tokens"}


@pytest.fixture
def wanted(tmp_path: Path, documents: list[list[int]]) -> list[list[int]]:
    """The sequences of the same documents in a plain file."""
    path = tmp_path / "plain.jsonl"
    path.write_text("\n".join(json.dumps({"text": as_text(d)}) for d in documents if d))
    return flat(load(path), 40)


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
@pytest.mark.parametrize("rows", ["table", "stream"])
def test_rows_saved_in_a_format_for_tensors_are_read_as_they_are_stored(
    tmp_path: Path, kind: str, rows: str, monkeypatch: pytest.MonkeyPatch
):
    from datasets import Dataset

    blocks = [[3 + 24 * i + k for k in range(24)] for i in range(20)]
    made = Dataset.from_dict({"tokens": blocks, "length": [24] * 20})
    streamed = made.to_iterable_dataset()
    made.set_format(kind, columns=["tokens"])
    made.save_to_disk(tmp_path / "saved")
    if rows == "stream":
        monkeypatch.setattr(sources, "_saved_to_disk", lambda *_: streamed.with_format(kind))
    tokens = load(tmp_path / "saved", n_eval_samples=0, **TOKENS)
    assert sorted(t for row in flat(tokens, 30) for t in row) == list(range(3, 3 + 24 * 20))


def in_folders(folder: Path, texts: list[str]) -> None:
    for i, text in enumerate(texts):
        write(folder / f"part{i % 3}" / "deep" / f"{i:03}.txt", text)


def beside_a_readme(folder: Path, texts: list[str]) -> None:
    write(folder / "README.md", "# Stories")
    write(folder / "LICENSE.txt", "all rights")
    write(folder / ".hidden.txt", "w3 w4")
    for i, text in enumerate(texts):
        write(folder / f"{i:03}.txt", text)


def packed(name: str, pack: Callable[[bytes], bytes]) -> Callable[[Path, list[str]], None]:
    def make(folder: Path, texts: list[str]) -> None:
        lines = ["text\tn", *(f"{t}\t1" for t in texts)] if ".tsv" in name else [json.dumps({"text": t}) for t in texts]
        content = "\n\n".join(texts) if ".txt" in name.lower() else "\n".join(lines)
        write(folder / name, pack(content.encode()))

    return make


LAYOUTS = {"in folders": in_folders, "beside a readme": beside_a_readme} | {
    name: packed(name, pack)
    for name, pack in {
        "a.jsonl.gz": gzip.compress, "a.jsonl.bz2": bz2.compress, "a.jsonl.xz": lzma.compress, "A.JSONL": bytes,
        "a.txt.gz": gzip.compress, "a.txt.xz": lzma.compress, "A.TXT": bytes, "a.tsv": bytes, "a.tsv.gz": gzip.compress,
        "bom.txt": lambda content: b"\xef\xbb\xbf" + content,
    }.items()
}  # fmt: skip


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_local_text_is_read_wherever_it_lies_and_however_it_is_packed(
    tmp_path: Path, layout: str, documents: list[list[int]], wanted: list[list[int]]
):
    LAYOUTS[layout](tmp_path / "data", [as_text(d) for d in documents if d])
    names = [tmp_path / "data", *([tmp_path / "data" / layout] if "." in layout else [])]
    for name in names:
        if layout == "in folders":  # other names, another order
            assert load(name).engine.tokens_in_all == sum(len(d) + 1 for d in documents if d)
        else:
            assert flat(load(name), 40) == wanted


def test_folders_and_files_named_as_splits_hold_them(tmp_path: Path):
    for split, token in (("train", "w3"), ("test", "w4")):
        write(tmp_path / "folders" / split / "a.txt", f"{token} " * 200)
        write(tmp_path / "files" / f"{split}.txt", f"{token} " * 200)
        write(
            tmp_path / "packed" / f"{split}.jsonl.bz2", bz2.compress(json.dumps({"text": f"{token} " * 200}).encode())
        )
        write(tmp_path / "bins" / f"x_{split}_0.bin", np.full(200, int(token[1:]), np.uint16).tobytes())
    for name, changes in {
        "folders": {},
        "files": {},
        "packed": {},
        "bins": {**TOKENS, "token_dtype": "uint16"},
    }.items():
        for split, token in (("train", 3), ("test", 4)):
            tokens = load(tmp_path / name, split=split, **changes)
            assert {t for row in flat(tokens, 5) for t in row} - {EOS} == {token}
        with pytest.raises(UserError, match=r"no split 'validation' \(it has test, train\)"):
            load(tmp_path / name, split="validation", **changes)


def test_what_is_not_read_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, documents: list[list[int]]
):
    monkeypatch.setattr(logging.getLogger("saeopt"), "propagate", True)
    caplog.set_level(logging.INFO, logger="saeopt")
    write(tmp_path / "mixed" / "a.txt", "w3 w4")
    write(tmp_path / "mixed" / "b.bin", b"1234")
    write(tmp_path / "papers" / "a.pdf", b"%PDF")
    write(tmp_path / "a.zip", b"PK")
    write(tmp_path / "broken.txt.gz", b"\x1f\x8bnothing")
    write(tmp_path / "broken.txt.bz2", bz2.compress(b"text")[:-4])
    write(tmp_path / "no.jsonl", b"")
    for name, words in {
        "mixed": r"several kinds \(1 \.txt, 1 \.bin\)", "papers": r"no data files but \.pdf \(\.parquet",
        "a.zip": "not read.*gz", "none.TXT": "no such file", "broken.txt.gz": "cannot be read",
        "broken.txt.bz2": "cannot be read", "no.jsonl": "holds no rows",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=words) as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value)
    write(tmp_path / "both" / "a.jsonl", "\n".join(json.dumps({"text": as_text(d)}) for d in documents if d))
    write(tmp_path / "both" / "notes.txt", "w3 w4")
    load(tmp_path / "both")
    assert "both holds 1 .jsonl, 1 .txt: one kind is read" in caplog.text


def llm_c(ids: list[int]) -> bytes:
    head = np.zeros(256, np.int32)
    head[:3] = 20240520, 1, len(ids)
    return head.tobytes() + np.array(ids, np.uint16).tobytes()


class Frames:
    """A package `zstandard` that unpacks what zlib packs: frames whose length is not said, one behind another."""

    ZstdError = zlib.error
    ZstdDecompressor = staticmethod(lambda: types.SimpleNamespace(decompressobj=zlib.decompressobj))


def test_every_frame_of_a_zst_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = zlib.compress(b"one\n\n") + zlib.compress(b"two")
    file = tmp_path / "a.txt.zst"
    monkeypatch.setitem(sys.modules, "zstandard", Frames)
    write(file, whole)
    assert local_files.read_texts([file], "auto") == ["one", "two"]
    for broken in (whole[:-4], b"no frame at all"):
        write(file, broken)
        with pytest.raises(UserError, match=r"a\.txt\.zst: cannot be read"):
            local_files.read_texts([file], "auto")


def test_zst_files_name_the_package_that_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("a.txt.zst", "b.jsonl.zst", "c.csv.zst"):
        write(tmp_path / name, b"x")
        with pytest.raises(UserError, match=f"{name}: needs the package zstandard"):
            local_files.local_files(str(tmp_path / name))


def test_token_files_give_the_sequences_of_the_documents_in_them(
    tmp_path: Path, documents: list[list[int]], wanted: list[list[int]]
):
    after = [t for d in documents if d for t in [*d, EOS]]
    np.save(tmp_path / "a.npy", np.array(after, np.uint32))
    write(tmp_path / "a.bin", np.array(after, np.uint16).tobytes())
    write(tmp_path / "llmc.bin", llm_c(after))
    for name, changes in {"a.npy": {}, "a.bin": {"token_dtype": "uint16"}, "llmc.bin": {}}.items():
        assert flat(load(tmp_path / name, **TOKENS, **changes), 40) == wanted, name
    before = [t for d in documents if d for t in [BOS, *d]]
    np.save(tmp_path / "b.npy", np.array(before, np.int64))
    begun = load(tmp_path / "b.npy", **TOKENS)  # the tokenizer would part by EOS, and the file does by BOS
    plain = runs([t for row in flat(begun, 40) for t in row], BOS)
    assert set(plain[1:-1]) <= {tuple(d) for d in documents}


def test_token_files_without_separators_or_with_rows_are_cut_into_blocks(tmp_path: Path):
    ids = np.arange(3, 903)
    np.save(tmp_path / "flat.npy", ids.astype(np.uint16))
    np.save(tmp_path / "rows.npy", ids.reshape(-1, 30))
    for name in ("flat", "rows"):
        tokens = load(tmp_path / f"{name}.npy", n_eval_samples=0, **TOKENS)
        stream = [t for row in flat(tokens, 56) for t in row]
        assert set(stream) <= set(ids.tolist())
        assert len(set(stream)) == len(stream)  # nothing is read twice


def test_what_is_wrong_with_a_token_file_is_one_line(tmp_path: Path):
    write(tmp_path / "a.bin", bytes(100))
    write(tmp_path / "odd.bin", bytes(101))
    write(tmp_path / "cut.bin", llm_c([3] * 2000)[:-2])
    np.save(tmp_path / "float.npy", np.ones((3, 3)))
    np.save(tmp_path / "a.npy", np.full(300, 1000, np.uint16))
    np.save(tmp_path / "none.npy", np.zeros(0, np.uint16))
    write(tmp_path / "broken.npy", b"\x93NUMPY")
    write(tmp_path / "nothing.npy", b"")
    uint16 = {"token_dtype": "uint16"}
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("a.bin", {}, "'data.token_dtype'.*give uint16"), ("odd.bin", uint16, "101 bytes"),
        ("cut.bin", {}, "header says 2000 tokens"), ("cut.bin", {"token_dtype": "uint32"}, "says in its header"),
        ("float.npy", {}, "float64 of 2 dimensions"), ("a.npy", {"token_dtype": "uint32"}, "holds uint16"),
        ("a.npy", {}, "token id 1000"), ("none.npy", {}, "is empty"), ("broken.npy", {}, "cannot be read"),
        ("nothing.npy", {}, "cannot be read"),
        ("a.npy", {"is_tokenized": False}, "'data.is_tokenized'.*set it to true"),
        ("a.npy", {"split": "train[:9]"}, "'data.split'"),
    ]  # fmt: skip
    for name, changes, words in cases:
        with pytest.raises(UserError, match=words) as error:
            load(tmp_path / name, **{**TOKENS, **changes})
        assert "\n" not in str(error.value)


def test_linked_folders_are_read_and_closed_ones_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "elsewhere" / "a.txt", "w3 w4 " * 100)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")  # a circle
    assert load(tmp_path / "data").engine.tokens_in_all == 201
    closed = tmp_path / "data" / "closed"
    closed.mkdir(mode=0)
    listed = os.scandir

    def scan(path: Any) -> Any:  # root may read what is closed to others
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(UserError, match="closed: cannot be read: Permission denied"):
        load(tmp_path / "data")


def test_a_cache_of_data_sets_that_cannot_be_written_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    sources._cache_folder.cache_clear()
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": "w3 w4 w5"}) for _ in range(50)))
    try:
        assert load(path).engine.tokens_in_all == 200
    finally:
        sources._cache_folder.cache_clear()
