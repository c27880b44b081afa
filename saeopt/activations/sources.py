"""Where documents come from: the hub, folders and files, as a table of rows or as a stream of rows."""

from __future__ import annotations

import glob
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeopt.activations.pretrained import one_line
from saeopt.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from saeopt.config.run import DataConfig

BUILDERS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".arrow": "arrow",
}
SMALL_FILES = 64 * 2**20
"""Local files up to so many bytes are read as a table even if `data.streaming` is true; a stream gains nothing."""

END_OF_TEXT = "<|endoftext|>"
_SLICE = re.compile(r"(?P<split>[^\[\]]+)(\[(?P<start>-?\d*)(?P<p1>%?):(?P<stop>-?\d*)(?P<p2>%?)\])?")


@dataclass(frozen=True)
class Split:
    """`train`, `train[:900]`, `train[10%:]`: a split's name and a range of its rows."""

    name: str
    start: int | None = None
    stop: int | None = None
    percent: bool = False

    @classmethod
    def parse(cls, text: str) -> Split:
        """The parts of a split expression.

        Raises:
            UserError: it is none.
        """
        match = _SLICE.fullmatch(text.strip())
        if match is None or (match["p1"] and match["p2"] != match["p1"] and match["stop"]):
            raise UserError(f"'data.split': '{text}' is no split (train, train[:900] and train[10%:90%] are)")
        start, stop = (int(match[k]) if match[k] else None for k in ("start", "stop"))
        return cls(match["split"], start, stop, bool(match["p1"] or match["p2"]))

    def rows(self, n: int) -> range:
        """The rows meant out of n."""
        start, stop = self.start, self.stop
        if self.percent:
            start = None if start is None else round(start * n / 100)
            stop = None if stop is None else round(stop * n / 100)
        return range(n)[slice(start, stop)]

    @property
    def whole(self) -> bool:
        """No range was given."""
        return self.start is None and self.stop is None


class ListTable:
    """Rows that are already in memory."""

    def __init__(self, rows: list[Any]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)


def open_rows(data: DataConfig) -> ListTable | Dataset | IterableDataset:
    """The rows of a data set, in their own order.

    Raises:
        UserError: no such data set, file, split or configuration; a file that cannot be read.
    """
    split = Split.parse(data.split)
    name = data.dataset_name
    files = local_files(name)
    if files and all(f.suffix in (".txt", ".text") for f in files):
        if data.is_tokenized:
            raise UserError(f"'data.is_tokenized': {name} holds text, not token ids: set it to false")
        return _sliced(ListTable(_read_texts(files, data.text_unit)), split)
    if files and len(files) == 1 and files[0].suffix == ".json" and (listed := _json_list(files[0])) is not None:
        return _sliced(ListTable(listed), split)
    rows = _saved_to_disk(Path(name), split) if Path(name).is_dir() else None
    return _sliced(_load(data, split, files) if rows is None else rows, split)


def local_files(name: str) -> list[Path]:
    """Data files that a name means: a file, a pattern, or a folder with nothing but text files."""
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = sorted(f for f in path.iterdir() if f.is_file() and not f.name.startswith((".", "_")))
        return inside if inside and all(f.suffix in (".txt", ".text") for f in inside) else []
    found = sorted(Path(f) for f in glob.glob(name, recursive=True)) if any(c in name for c in "*?[") else []
    looks_local = path.suffix in (*BUILDERS, ".txt", ".text", ".gz", ".zst") or path.is_absolute() or name[:1] in ".~"
    if not found and (looks_local or any(c in name for c in "*?[")):
        raise UserError(f"'data.dataset_name': {name}: no such file or folder")
    return found


def file_states(name: str) -> list[tuple[int, int]]:
    """Size and time of change (ns) of the local files that a name means; none where it means a hub's data set."""
    folder = Path(name)
    files = sorted(f for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else local_files(name)
    return [(state.st_size, state.st_mtime_ns) for state in (file.stat() for file in files)]


def _read_texts(files: list[Path], unit: str) -> list[str]:
    documents: list[str] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"'data.dataset_name': {file}: cannot be read as UTF-8 text: {one_line(error)}") from None
        documents += split_text(text, unit)
    return documents


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


def _json_list(file: Path) -> list[Any] | None:
    """Rows of a JSON file that is one list of strings or of lists of token ids; None for any other JSON."""
    try:
        with file.open(encoding="utf-8") as opened:
            if opened.read(1024).lstrip()[:1] != "[":
                return None
        listed = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"'data.dataset_name': {file}: cannot be read as JSON: {one_line(error)}") from None
    plain = all(isinstance(row, str | list) for row in listed)
    return listed if plain else None


def _saved_to_disk(folder: Path, split: Split) -> Any:
    """What `save_to_disk` wrote to a folder; None for a folder of data files."""
    import datasets

    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        try:
            loaded = datasets.load_from_disk(str(folder))
        except (OSError, ValueError) as error:
            raise UserError(f"'data.dataset_name': {folder}: cannot be read: {one_line(error)}") from None
        if isinstance(loaded, datasets.DatasetDict):
            if split.name not in loaded:
                raise UserError(
                    f"'data.split': {folder} has no split '{split.name}' (it has {', '.join(map(str, loaded))})"
                )
            return loaded[split.name]
        return loaded
    if not any(f.suffix in BUILDERS for f in folder.rglob("*")):
        raise UserError(f"'data.dataset_name': {folder}: holds no data files ({', '.join(BUILDERS)} or .txt)")
    return None


def _load(data: DataConfig, split: Split, files: list[Path]) -> Any:
    import datasets

    datasets.disable_progress_bars()
    name: str = data.dataset_name
    arguments: dict[str, Any] = {"split": split.name, "streaming": data.streaming}
    if files:
        kinds = {BUILDERS.get(f.with_suffix("").suffix if f.suffix in (".gz", ".zst") else f.suffix) for f in files}
        kind = kinds.pop()
        if kinds or kind is None:
            raise UserError(f"'data.dataset_name': {name}: files must be of one kind: {', '.join(BUILDERS)} or .txt")
        name, arguments["data_files"] = kind, {split.name: [str(f) for f in files]}
    else:
        arguments["name"] = data.subset
    local = files or ([f for f in Path(name).rglob("*") if f.is_file()] if Path(name).is_dir() else [])
    if local and sum(f.stat().st_size for f in local) <= SMALL_FILES:
        arguments["streaming"] = False
    try:
        return datasets.load_dataset(name, **arguments)
    except Exception as error:
        raise _explain(data, error) from None


def _explain(data: DataConfig, error: Exception) -> UserError:
    name, text = data.dataset_name, f"{type(error).__name__}: {one_line(error.__cause__ or error)}"
    if "split" in str(error).lower():
        return UserError(f"'data.split': {name}: {one_line(error)}")
    if "BuilderConfig" in str(error) or "Config name" in str(error):
        return UserError(f"'data.subset': {name}: {one_line(error)}")
    if Path(name).exists() or any(c in name for c in "*?["):
        return UserError(f"'data.dataset_name': {name}: cannot be read: {text}")
    if "gated" in str(error).lower():
        return UserError(f"'data.dataset_name': {name} is gated: accept its terms on the hub and set HF_ACCESS_TOKEN")
    return UserError(f"'data.dataset_name': {name}: no such file, folder or data set in reach: {text}")


def _sliced(rows: Any, split: Split) -> Any:
    if split.whole:
        return rows
    if isinstance(rows, ListTable):
        chosen = split.rows(len(rows))
        return ListTable(rows.rows[chosen.start : chosen.stop])
    if hasattr(rows, "select"):
        return rows.select(split.rows(len(rows)))
    if split.percent or (split.start or 0) < 0 or (split.stop or 0) < 0:
        raise UserError("'data.split': a stream's length is not known: give row numbers, or set data.streaming: false")
    rows = rows.skip(split.start) if split.start else rows
    return rows if split.stop is None else rows.take(split.stop - (split.start or 0))
