"""Data files on this host: which files a name means, what kind each is, and the text in them."""

from __future__ import annotations

import bz2
import glob
import gzip
import importlib.util
import lzma
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeopt.activations.pretrained import one_line
from saeopt.console import log
from saeopt.errors import UserError
from saeopt.files import parse_json

if TYPE_CHECKING:
    from saeopt.config.run import DataConfig

BUILDERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrow": "arrow",
}
TEXT, TOKENS = "text", "tokens"
_KINDS = {**BUILDERS, ".txt": TEXT, ".text": TEXT, ".npy": TOKENS, ".bin": TOKENS}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_MAY_BE_COMPRESSED = {TEXT, "json", "csv"}
READABLE = f"{', '.join(_KINDS)}, text, JSON and CSV also as {', '.join(_COMPRESSED)}"
_ABOUT = {"readme", "license", "licence", "copying", "notice", "citation", "changelog", "dataset_infos", "dataset_info"}
"""Files that speak about the data beside them."""

END_OF_TEXT = "<|endoftext|>"
_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "validation",
           "valid": "validation", "validation": "validation", "val": "validation", "dev": "validation"}  # fmt: skip
"""Folders that hold the texts of one split."""


def suffix_of(file: Path) -> str:
    """The suffix that says what a file holds, in small letters: `.txt` of `A.TXT` and `a.txt.gz`."""
    return (file.with_suffix("") if file.suffix.lower() in _COMPRESSED else file).suffix.lower()


def kind_of(file: Path) -> str | None:
    """A builder of `datasets`, `text` or `tokens`; None for a file that is not read."""
    kind = _KINDS.get(suffix_of(file))
    return kind if kind in _MAY_BE_COMPRESSED or file.suffix.lower() not in _COMPRESSED else None


def local_files(name: str, split: str | None = None, tell: bool = False) -> list[Path]:
    """Data files that a name means: a file, a pattern, or a folder; none where the name is a hub's.

    None either for a folder that `datasets` itself saved or describes in its card, or of whose files it knows the
    splits. Texts and token files in folders named as splits, or with their names, belong to these. `tell`: give a
    notice of files that are not read.

    Raises:
        UserError: no such file, one that is not read, or several kinds of them.
    """
    path = Path(name)
    try:
        if path.is_dir():
            return _in_folder(path, split, tell)
        found = [path] if path.is_file() else []
    except OSError as error:
        raise UserError(f"'data.dataset_name': {name}: cannot be read: {error.strerror}") from None
    pattern = any(c in name for c in "*?[")
    if not found and pattern:
        found = sorted(p for f in glob.glob(name, recursive=True) if (p := Path(f)).is_file())
    looks_local = suffix_of(path) in _KINDS or path.suffix.lower() in _COMPRESSED or path.is_absolute()
    if not found and (looks_local or pattern or name[:1] in ".~"):
        raise UserError(f"'data.dataset_name': {name}: no such file or folder")
    _one_kind(name, found)
    return found


@contextmanager
def of_held_out_data() -> Iterator[None]:
    """Errors name the fields of held-out data of their own."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"'data\.(dataset_name|column_name|split)'", r"'data.eval_\1'", str(error))) from None


def check_kind(data: DataConfig, files: Sequence[Path]) -> str | None:
    """The kind of files, whose names say what they hold.

    Raises:
        UserError: `data.is_tokenized` says otherwise.
    """
    kind = kind_of(files[0]) if files else None
    if kind == TEXT and data.is_tokenized:
        raise UserError(f"'data.is_tokenized': {data.dataset_name} holds text, not token ids: set it to false")
    if kind == TOKENS and not data.is_tokenized:
        raise UserError(f"'data.is_tokenized': {data.dataset_name} holds token ids, not text: set it to true")
    return kind


def check_sources(data: DataConfig, splits: bool = True) -> None:
    """Refuse files that are not there, and splits that they do not have, before anything is loaded.

    Without `splits` for what was stored: older versions took files for any split.

    Raises:
        UserError: naming the field.
    """
    if data.activations is not None:
        return
    check_kind(data, local_files(data.dataset_name))
    if data.eval_dataset_name is not None:
        with of_held_out_data():
            local_files(data.eval_dataset_name)
    if splits:
        _check_split("data.split", data.dataset_name, data.split)
    if splits and (data.eval_dataset_name or data.eval_split):
        _check_split("data.eval_split", data.eval_dataset_name or data.dataset_name, data.eval_split or data.split)
    if splits:
        _check_unread(data)


def _check_unread(data: DataConfig) -> None:
    """Refuse options that say nothing of these data."""
    names = [data.dataset_name, *([data.eval_dataset_name] if data.eval_dataset_name else [])]
    files = [local_files(name) for name in names]
    told, kinds = " and ".join(names), {kind_of(found[0]) if found else None for found in files}
    if data.subset is not None and files[0]:
        raise UserError(f"'data.subset': {names[0]} is read as it is and has no configurations: leave it out")
    if data.token_dtype is not None and TOKENS not in kinds:
        raise UserError(f"'data.token_dtype' is for .bin and .npy files, and {told} holds none: leave it out")
    if data.text_unit != "auto" and TEXT not in kinds:
        raise UserError(f"'data.text_unit' is for .txt files, and {told} holds none: leave it out")
    if data.eval_column_name is not None and data.eval_data is None:
        raise UserError("'data.eval_column_name' needs 'data.eval_dataset_name' or 'data.eval_split'")


def _check_split(field: str, name: str, text: str) -> None:
    split = text.partition("[")[0].strip()
    files, wanted = local_files(name, split), _SPLITS.get(split.lower(), split)
    of = {_split_of(f.relative_to(name) if Path(name).is_dir() else Path(f.name)) for f in files}
    if files and wanted != "train" and wanted not in of:
        raise UserError(
            f"'{field}': {name} is read as it is and has no '{split}': only ranges (train[:900], train[10%:90%])"
            " choose among its rows"
        )


def _one_kind(name: str, files: Sequence[Path]) -> None:
    """Refuse files that are not read, or not without a package that is missing, and several kinds together."""
    suffixes = Counter(f.suffix.lower() if kind_of(f) is None else suffix_of(f) for f in files)
    kinds = {kind_of(f) for f in files}
    if None in kinds:
        unread = next(f for f in files if kind_of(f) is None)
        raise UserError(f"'data.dataset_name': {unread}: files of this kind are not read ({READABLE} are)")
    packed = next((f for f in files if f.suffix.lower() == ".zst"), None)
    if packed is not None and importlib.util.find_spec("zstandard") is None:
        raise UserError(f"'data.dataset_name': {packed}: needs the package zstandard (pip install zstandard)")
    if len(kinds) > 1 or len({s for s in suffixes if s in (".csv", ".tsv")}) > 1:
        told = ", ".join(f"{n} {suffix}" for suffix, n in suffixes.most_common())
        raise UserError(
            f"'data.dataset_name': {name}: holds files of several kinds ({told}): name those that are meant, as in"
            f" {name if Path(name).is_dir() else Path(name).parent}/**/*{suffixes.most_common(1)[0][0]}"
        )


def _in_folder(folder: Path, split: str | None, tell: bool) -> list[Path]:
    if is_saved(folder):
        return []
    inside = [f.relative_to(folder) for f in files_below(folder)]
    shown = [f for f in inside if not any(part.startswith((".", "_")) for part in f.parts)]
    files = [folder / f for f in shown if kind_of(f) is not None and f.name.split(".")[0].lower() not in _ABOUT]
    if not files:
        others = ", ".join(sorted({f.suffix for f in shown if f.suffix})[:5])
        raise UserError(
            f"'data.dataset_name': {folder}: holds no data files{f' but {others}' if others else ''} ({READABLE})"
        )
    card = folder / "README.md"
    if card.is_file() and re.match(r"---\n.*?^configs:.*?^---", card.read_text("utf-8", "replace"), re.DOTALL | re.M):
        return []
    tables = [f for f in files if suffix_of(f) in BUILDERS]
    if tables and len({suffix_of(f) for f in files}) > 1 and any(f.suffix in BUILDERS for f in tables):
        if tell:
            told = Counter(suffix_of(f) for f in files).most_common()
            log.info("%s holds %s: one kind is read", folder, ", ".join(f"{n} {suffix}" for suffix, n in told))
        return []
    _one_kind(str(folder), files)
    if not tables:
        return _of_split(folder, files, split)
    known = all(f.suffix in BUILDERS or (f.suffix == ".gz" and f.stem.endswith(tuple(BUILDERS))) for f in tables)
    return [] if known and suffix_of(tables[0]) != ".tsv" else _of_split(folder, tables, split)


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and its subfolders, linked ones too, in order of their names.

    Raises:
        UserError: a subfolder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"'data.dataset_name': {error.filename}: cannot be read: {error.strerror}")

    found: list[Path] = []
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(here))
        folders[:] = [f for f in folders if os.path.realpath(os.path.join(here, f)) not in seen]  # links in a circle
        found += [path for name in names if (path := Path(here, name)).is_file()]
    return sorted(found)


def _of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """Those of the files that belong to a split, where folders or files are named after several."""
    of = {f: _split_of(f.relative_to(folder)) for f in files}
    known = sorted({s for s in of.values() if s})
    wanted = None if split is None else _SPLITS.get(split.lower(), split)
    if wanted is None or (wanted not in known and len(known) < 2):
        return files
    if wanted not in known:
        raise UserError(f"'data.split': {folder} has no split '{split}' (it has {', '.join(known)})")
    return [f for f, its in of.items() if its == wanted]


def _split_of(file: Path) -> str | None:
    """The split that a file's folder or its own name (`val.bin`, `fineweb_val_000000.bin`) says."""
    stem = file.name.split(".")[0].lower()
    words = [file.parts[0].lower(), stem, *(re.split(r"[_-]", stem) if kind_of(file) == TOKENS else [])]
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` made a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def file_states(name: str) -> list[tuple[int, int]]:
    """Size and time of change (ns) of the local files that a name means; none where it means a hub's data set."""
    folder = Path(name)
    files = files_below(folder) if folder.is_dir() else local_files(name)
    return [(state.st_size, state.st_mtime_ns) for state in (file.stat() for file in files)]


def read_text(file: Path) -> str:
    """A text file, unpacked where it is compressed.

    Raises:
        UserError: it cannot be read, or is no UTF-8 text.
    """
    try:
        return _unpacked(file).decode("utf-8-sig")
    except (OSError, ValueError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"'data.dataset_name': {file}: cannot be read as UTF-8 text: {one_line(error)}") from None


def _unpacked(file: Path) -> bytes:
    suffix = file.suffix.lower()
    content = file.read_bytes()
    if suffix == ".zst":
        return _unpacked_zst(content)
    packers: dict[str, Any] = {".gz": gzip, ".bz2": bz2, ".xz": lzma}
    return bytes(packers[suffix].decompress(content)) if suffix in packers else content


def _unpacked_zst(content: bytes) -> bytes:
    """All frames, also those that do not say how long they are."""
    zstandard = importlib.import_module("zstandard")
    parts: list[bytes] = []
    while content:
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            parts.append(frame.decompress(content))
        except zstandard.ZstdError as error:
            raise ValueError(str(error)) from None
        if not frame.eof:
            raise EOFError("compressed data ended before the end of a frame")
        content = frame.unused_data
    return b"".join(parts)


def read_texts(files: Sequence[Path], unit: str) -> list[str]:
    """The documents of text files."""
    return [part for file in files for part in split_text(read_text(file), unit)]


def split_text(text: str, unit: str) -> list[str]:
    """Documents of a text: the whole, or parted at `<|endoftext|>` or blank lines (auto: the first that occurs)."""
    if unit == "auto":
        unit = "endoftext" if END_OF_TEXT in text else "blank_line"
    if unit == "file":
        parts = [text]
    elif unit == "endoftext":
        parts = text.split(END_OF_TEXT)
    else:
        parts = re.split(r"\n[ \t\r]*\n\s*", text)
    return [p.strip() if unit != "file" else p for p in parts if p.strip()]


def json_list(file: Path) -> list[Any] | None:
    """Rows of a JSON file that is one list of strings or of lists of token ids; None for any other JSON."""
    with file.open("rb") as opened:
        begin = opened.read(1024).lstrip(b" \t\r\n\xef\xbb\xbf")[:1]
    if begin != b"[" and file.suffix.lower() not in _COMPRESSED:
        return None
    text = read_text(file)
    if text[:1024].lstrip()[:1] != "[":
        return None
    try:
        listed = parse_json(text)
    except ValueError as error:
        raise UserError(f"'data.dataset_name': {file}: cannot be read as JSON: {one_line(error)}") from None
    return listed if all(isinstance(row, str | list) for row in listed) else None
