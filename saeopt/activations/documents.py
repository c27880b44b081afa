"""Documents as token ids: checks of a column, tokenising in batches, and tables that are read by number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saeopt.activations.padding import MASK, kept_spans
from saeopt.activations.pretrained import one_line
from saeopt.activations.token_files import spans
from saeopt.config.names import CHAT
from saeopt.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from saeopt.config.run import DataConfig

Ids = NDArray[np.int32]
TOKENISE_ROWS = 1000
"""Texts that a fast tokenizer gets at once."""


@contextmanager
def reading(data: DataConfig) -> Iterator[None]:
    """Around reads of rows: what is wrong behind the first ones is found out when they come.

    Raises:
        UserError: instead of what a library says about a file that it cannot read.
    """
    try:
        yield
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"'data.dataset_name': {data.dataset_name}: cannot be read: {one_line(error)}") from error


def check_column(data: DataConfig, row: object) -> None:
    """Refuse a column that does not hold what `data.is_tokenized` says, by one of its rows.

    Raises:
        UserError: naming the column and what it holds.
    """
    where = f"column '{data.column_name}' of {data.dataset_name}"
    listed = isinstance(row, list | np.ndarray) and all(isinstance(t, int | np.integer) for t in row)
    if data.is_tokenized and isinstance(row, str):
        raise UserError(f"'data.is_tokenized': {where} holds text, not token ids: set it to false")
    if not data.is_tokenized and listed:
        raise UserError(f"'data.is_tokenized': {where} holds token ids, not text: set it to true")
    if not (listed if data.is_tokenized else isinstance(row, str)):
        wanted = "lists of token ids" if data.is_tokenized else "text"
        chat = f": {CHAT}" if isinstance(row, list | dict) and "role" in str(row) else ""
        raise UserError(f"'data.column_name': {where} holds {_describe(row)}, not {wanted}{chat}")


def _describe(row: object) -> str:
    if isinstance(row, list) and row:
        return f"lists of {type(row[0]).__name__} values"
    return f"{type(row).__name__} values"


@dataclass
class Tokeniser:
    """Rows of a data set to token ids. Special tokens are never added here."""

    data: DataConfig
    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int

    def __call__(self, rows: Sequence[Any]) -> list[Ids]:
        """Token ids of some rows; empty arrays for empty ones."""
        if self.data.is_tokenized:
            documents = [self._ids(row) for row in rows]
        else:
            documents = [d for part in self._batches(rows) for d in part]
        for document in documents:
            self.check(document)
        return [d.astype(np.int32) for d in documents]

    def _ids(self, row: Any) -> NDArray[np.int64]:
        """A row's ids; one that holds anything else is refused by what it holds."""
        if row is None or (isinstance(row, list) and not row):
            return np.zeros(0, np.int64)
        try:
            ids = np.asarray(row)
            if ids.ndim != 1 or ids.dtype.kind not in "iu":
                check_column(self.data, row)
            return ids.astype(np.int64)
        except (ValueError, TypeError, OverflowError):  # lists of several lengths, numbers of thousands of digits
            check_column(self.data, row)
            raise UserError(f"'data.column_name': {self.data.dataset_name} holds numbers that are no ids") from None

    def _batches(self, rows: Sequence[Any]) -> Iterator[list[NDArray[np.int64]]]:
        assert self.tokenizer is not None
        for start in range(0, len(rows), TOKENISE_ROWS):
            with reading(self.data):
                texts = ["" if row is None else row for row in rows[start : start + TOKENISE_ROWS]]
            for text in texts:
                if not isinstance(text, str):
                    check_column(self.data, text)
            found = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            yield [np.asarray(ids, dtype=np.int64) for ids in found["input_ids"]]

    def check(self, ids: NDArray[Any]) -> None:
        """Refuse ids that the model has no embedding for.

        Raises:
            UserError: naming the id and the size of the vocabulary.
        """
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size):
            worst = int(ids.max()) if int(ids.max()) >= self.vocab_size else int(ids.min())
            whose = "" if self.data.is_tokenized else " (is it the model's own tokenizer?)"
            raise UserError(
                f"'data.dataset_name': {self.data.dataset_name} holds token id {worst}, "
                f"but the model's vocabulary has {self.vocab_size} entries{whose}"
            )


@dataclass
class _Chunk:
    values: NDArray[Any]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]


def _lists(column: pa.Array, data: DataConfig, name: str) -> _Chunk:
    """A column of lists; missing ones are empty."""
    import pyarrow as pa

    if pa.types.is_null(column.type):
        column = column.cast(pa.list_(pa.int64()))
    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.list_(column.type.value_type))
    if not hasattr(column, "offsets"):
        raise UserError(f"'data.dataset_name': {data.dataset_name}: column '{name}' holds {column.type}, not lists")
    offsets = column.offsets.to_numpy().astype(np.int64)
    starts, stops = offsets[:-1].copy(), offsets[1:].copy()
    if column.null_count:
        missing = column.is_null().to_numpy(zero_copy_only=False)
        stops[missing] = starts[missing]
    return _Chunk(column.values.to_numpy(zero_copy_only=False), starts, stops)


class DocumentTable:
    """Documents read by number. Tokenised data sets stay memory-mapped; text is tokenised once."""

    def __init__(self, chunks: list[_Chunk], tokeniser: Tokeniser):
        self._chunks = [c for c in chunks if len(c.starts)]
        self._first = np.cumsum([0] + [len(c.starts) for c in self._chunks])
        self._tokeniser = tokeniser

    @classmethod
    def from_arrays(cls, documents: Sequence[Ids], tokeniser: Tokeniser) -> DocumentTable:
        """A table of documents in memory."""
        stops = np.cumsum([len(d) for d in documents], dtype=np.int64)
        values = np.concatenate(documents) if len(documents) else np.zeros(0, np.int32)
        return cls([_Chunk(values, np.concatenate([[0], stops[:-1]]).astype(np.int64), stops)], tokeniser)

    @classmethod
    def from_column(cls, rows: Dataset, tokeniser: Tokeniser) -> DocumentTable:
        """A table over a tokenised column, without copying it where its storage allows."""
        import pyarrow as pa

        rows = rows.flatten_indices() if rows._indices is not None else rows
        masks = rows.data.column(MASK) if MASK in rows.column_names else None
        chunks, at = [], 0
        for chunk in rows.data.column(tokeniser.data.column_name).chunks:
            found = _lists(chunk, tokeniser.data, tokeniser.data.column_name)
            if masks is not None:
                mask = _lists(pa.concat_arrays(masks.slice(at, len(chunk)).chunks), tokeniser.data, MASK)
                spans = (found.starts, found.stops), mask.values, (mask.starts, mask.stops)
                found = _Chunk(*kept_spans(found.values, *spans, tokeniser.data))
            chunks.append(found)
            at += len(chunk)
        return cls(chunks, tokeniser)

    @classmethod
    def from_files(
        cls, arrays: Sequence[NDArray[Any]], separator: int | None, before: bool, block: int, tokeniser: Tokeniser
    ) -> DocumentTable:
        """A table over arrays on disk; what lies between separators, or a block where there are none, is a document."""
        parts = [(array.reshape(-1), *spans(array, separator, before, block)) for array in arrays]
        return cls([_Chunk(*part) for part in parts], tokeniser)

    def cut(self, number: int, n: int) -> None:
        """Shorten a document to its first n tokens; the rest becomes the last document of the table."""
        c = int(np.searchsorted(self._first, number, side="right")) - 1
        chunk, i = self._chunks[c], int(number - self._first[c])
        rest = _Chunk(chunk.values, chunk.starts[i : i + 1] + n, chunk.stops[i : i + 1].copy())
        chunk.stops[i] = chunk.starts[i] + n
        self._chunks.append(rest)
        self._first = np.append(self._first, self._first[-1] + 1)
        self.__dict__.pop("lengths", None)

    def __len__(self) -> int:
        return int(self._first[-1])

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every document."""
        return np.concatenate([c.stops - c.starts for c in self._chunks]) if self._chunks else np.zeros(0, np.int64)

    def ends(self, first: bool) -> NDArray[np.int64]:
        """The first or the last token of every document; −1 for empty ones."""
        found = np.full(len(self), -1, dtype=np.int64)
        for chunk, at in zip(self._chunks, self._first, strict=False):
            full = chunk.stops > chunk.starts
            index = chunk.starts[full] if first else chunk.stops[full] - 1
            found[at : at + len(full)][full] = chunk.values[index]
        return found

    def get(self, numbers: NDArray[np.int64]) -> list[Ids]:
        """Documents by their numbers, in the order asked for."""
        found = []
        for number in numbers:
            c = int(np.searchsorted(self._first, number, side="right")) - 1
            chunk, i = self._chunks[c], number - self._first[c]
            document = chunk.values[chunk.starts[i] : chunk.stops[i]]
            self._tokeniser.check(document)
            found.append(np.asarray(document, dtype=np.int32))
        return found
