"""Where documents come from: the hub, folders and files, as a table of rows or as a stream of rows."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from saeopt.activations.local_files import (
    BUILDERS,
    TEXT,
    TOKENS,
    check_kind,
    files_below,
    is_saved,
    json_list,
    local_files,
    read_texts,
    suffix_of,
)
from saeopt.activations.pretrained import one_line
from saeopt.activations.token_files import open_token_files
from saeopt.console import log
from saeopt.errors import UserError

if TYPE_CHECKING:
    from saeopt.config.run import DataConfig

SMALL_FILES = 64 * 2**20
"""Local files up to so many bytes are read as a table even if `data.streaming` is true; a stream gains nothing."""

_SLICE = re.compile(r"(?P<split>[^\[\]]+)(\[(?P<start>(-?\d{1,15})?)(?P<p1>%?):(?P<stop>(-?\d{1,15})?)(?P<p2>%?)\])?")


@dataclass(frozen=True)
class Split:
    """`train`, `train[:900]`, `train[10%:]`: a split's name and a range of its rows."""

    name: str
    start: int | None = None
    stop: int | None = None
    percent: bool = False
    text: str = ""

    @classmethod
    def parse(cls, text: str) -> Split:
        """The parts of a split expression.

        Raises:
            UserError: it is none.
        """
        match = _SLICE.fullmatch(text.strip())
        if match is None or (match["p1"] and match["p2"] != match["p1"] and match["stop"]):
            raise UserError(f"'data.split': '{text[:80]}' is no split (train, train[:900] and train[10%:90%] are)")
        start, stop = (int(match[k]) if match[k] else None for k in ("start", "stop"))
        return cls(match["split"], start, stop, bool(match["p1"] or match["p2"]), text)

    def rows(self, n: int) -> range:
        """The rows meant out of n."""
        start, stop = self.start, self.stop
        if self.percent:
            start = None if start is None else round(start * n / 100)
            stop = None if stop is None else round(stop * n / 100)
        found = range(n)[slice(start, stop)]
        if not found:
            raise UserError(f"'data.split': {self.text} chooses none of the {n} rows")
        return found

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


class ArrayRows:
    """Token ids in arrays on disk; an array of two dimensions holds a full block per row."""

    def __init__(self, arrays: list[NDArray[Any]]):
        self.arrays = arrays


Rows = ListTable | ArrayRows | Any
"""Rows of a data set; Any stands for `datasets.Dataset` and, as a stream, `datasets.IterableDataset`."""


def open_rows(data: DataConfig) -> Rows:
    """The rows of a data set, in their own order and as they are stored (in no format that was set for tensors).

    Raises:
        UserError: no such data set, file, split or configuration; a file that cannot be read.
    """
    try:
        return _open_rows(data)
    except OSError as error:
        where = error.filename or data.dataset_name
        raise UserError(f"'data.dataset_name': {where}: cannot be read: {error.strerror or one_line(error)}") from None


def _open_rows(data: DataConfig) -> Rows:
    split = Split.parse(data.split)
    name = data.dataset_name
    files = local_files(name, split.name, tell=True)
    kind = check_kind(data, files)
    if kind == TOKENS:
        return _sliced(ArrayRows(open_token_files(files, data)), split)
    if kind == TEXT:
        return _sliced(ListTable(read_texts(files, data.text_unit)), split)
    if len(files) == 1 and suffix_of(files[0]) == ".json" and (listed := json_list(files[0])) is not None:
        return _sliced(ListTable(listed), split)
    rows = _saved_to_disk(Path(name), split) if Path(name).is_dir() and is_saved(Path(name)) else None
    return _sliced((_load(data, split, files) if rows is None else rows).with_format(None), split)


def _saved_to_disk(folder: Path, split: Split) -> Any:
    """What `save_to_disk` wrote to a folder."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # its own files may hold anything
        raise UserError(f"'data.dataset_name': {folder}: cannot be read: {one_line(error)}") from None
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split.name not in loaded:
        raise UserError(f"'data.split': {folder} has no split '{split.name}' (it has {', '.join(map(str, loaded))})")
    return loaded[split.name]


def _load(data: DataConfig, split: Split, files: list[Path]) -> Any:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it cannot read is told in our own line
    name: str = data.dataset_name
    arguments: dict[str, Any] = {"split": split.name, "streaming": data.streaming}
    if files:
        name, arguments["data_files"] = BUILDERS[suffix_of(files[0])], {split.name: [str(f) for f in files]}
        if suffix_of(files[0]) == ".tsv":
            arguments["sep"] = "\t"
    else:
        arguments["name"] = data.subset
    local = files or (files_below(Path(name)) if Path(name).is_dir() else [])
    if local and sum(f.stat().st_size for f in local) <= SMALL_FILES:
        arguments["streaming"] = False
    try:
        return datasets.load_dataset(name, cache_dir=_cache_folder(), **arguments)
    except Exception as error:
        raise _explain(data, error) from None


@cache
def _cache_folder() -> str | None:
    """Where `datasets` prepares tables: null for its own choice, or a folder for this process if that is closed."""
    import datasets

    usual = datasets.config.HF_DATASETS_CACHE
    try:
        os.makedirs(usual, exist_ok=True)
        if os.access(usual, os.W_OK | os.X_OK):
            return None
    except OSError:
        pass
    made = tempfile.mkdtemp(prefix="saeopt-datasets-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    log.info("%s cannot be written: data are prepared anew in %s each time (see HF_HOME)", usual, made)
    return made


def _explain(data: DataConfig, error: Exception) -> UserError:
    name = data.dataset_name
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
        return UserError(f"'data.dataset_name': {name}: holds no rows")
    text = f"{type(error).__name__}: {one_line(error.__cause__ or error)}"
    if "split" in str(error).lower():
        return UserError(f"'data.split': {name}: {one_line(error)}")
    if "BuilderConfig" in str(error) or "Config name" in str(error):
        return UserError(f"'data.subset': {name}: {one_line(error)}")
    if Path(name).exists() or any(c in name for c in "*?["):
        return UserError(f"'data.dataset_name': {name}: cannot be read: {text}")
    if "gated" in str(error).lower():
        return UserError(f"'data.dataset_name': {name} is gated: accept its terms on the hub and set HF_TOKEN")
    return UserError(f"'data.dataset_name': {name}: no such file, folder or data set in reach: {text}")


def _sliced(rows: Rows, split: Split) -> Rows:
    if split.whole:
        return rows
    if isinstance(rows, ArrayRows):
        raise UserError("'data.split': token files are read as a whole; data.n_train_samples takes their beginning")
    if isinstance(rows, ListTable):
        chosen = split.rows(len(rows))
        return ListTable(rows.rows[chosen.start : chosen.stop])
    if hasattr(rows, "select"):
        return rows.select(split.rows(len(rows)))
    if split.percent or (split.start or 0) < 0 or (split.stop or 0) < 0:
        raise UserError("'data.split': a stream's length is not known: give row numbers, or set data.streaming: false")
    rows = rows.skip(split.start) if split.start else rows
    return rows if split.stop is None else rows.take(split.stop - (split.start or 0))
