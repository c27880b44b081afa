"""Token sequences for training and evaluation: packed documents in an order that the data seed alone fixes.

A sample is one sequence of `context_length` tokens; samples are numbered without end, over all passes.
Suffixes: b sequences of one rank, n sequences, T positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saeopt.activations.documents import DocumentTable, Ids, Tokeniser, check_column, reading
from saeopt.activations.local_files import TEXT, TOKENS, file_states, kind_of, local_files, of_held_out_data
from saeopt.activations.packing import Engine, Position, Reader, StreamEngine, TableEngine
from saeopt.activations.padding import full_blocks, tell_padding, without_padding
from saeopt.activations.separators import Separator, separator_of, special_tokens
from saeopt.activations.sources import ArrayRows, ListTable, open_rows
from saeopt.activations.token_files import find_separator
from saeopt.console import log
from saeopt.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from saeopt.activations.language_model import LanguageModel
    from saeopt.config.run import DataConfig

_BLOCK_SAMPLES = 16
"""Samples of a block of a token file that has no separators."""
_SAME_LENGTH_ROWS = 1000
"""Rows looked at to tell full blocks (all of one length) from documents."""


class TokenBatch(NamedTuple):
    """One rank's part of a micro-batch, and the cursor of what lies behind the whole micro-batch."""

    tokens_bT: Tensor
    first_sample: int
    cursor: dict[str, Any]


class TokenData:
    """Training and held-out sequences of a config. Build one with :meth:`load`."""

    def __init__(self, engine: Engine, data: DataConfig, bos: int | None, held_out: Ids | None = None):
        self.engine, self.data = engine, data
        self.held_out = engine.held_out if held_out is None else held_out
        self._samples = _Samples(data, bos)
        self.tokens_per_sample = data.context_length
        self._fresh_tokens = self._samples.fresh_tokens
        self._told = False
        self._check_sizes()

    @classmethod
    def load(cls, data: DataConfig, model: LanguageModel) -> TokenData:
        """The data of a config, as token ids of `model`.

        Documents are shuffled by `data.seed`; whole documents are set aside for evaluation first, unless the held-out
        samples have data of their own. Token ids that lie in rows of one length are full blocks and are joined as they
        are; other documents get a separator.

        Raises:
            UserError: no such data set, split or column; a column of the wrong type; token ids outside the
                vocabulary; too few tokens.
        """
        wanted = data.n_held_out * (data.context_length - data.prepend_bos)
        if data.eval_data is None or data.n_held_out == 0:
            return cls(*open_engine(data, model, wanted))
        held_out = HeldOut.load(data, model)
        engine, data, bos = open_engine(data, model, 0)
        return cls(engine, data, bos, held_out.tokens)

    def _check_sizes(self) -> None:
        data, engine = self.data, self.engine
        wanted, have = data.n_held_out * self._fresh_tokens, len(self.held_out)
        if have < wanted:
            field = "n_threshold_samples" if have >= data.n_eval_samples * self._fresh_tokens else "n_eval_samples"
            raise UserError(
                f"'data.{field}': {data.n_held_out} held-out samples of {data.context_length} tokens are more than "
                f"{data.dataset_name} holds ({engine.tokens_in_all} tokens)"
            )
        if self.n_train_available == 0:
            left = engine.tokens_per_pass or 0
            raise UserError(
                f"'data.dataset_name': {data.dataset_name}: {left} tokens are left to train on, less than one sample "
                f"of {data.context_length} (held out: {have}; see data.n_eval_samples)"
            )
        available, asked = self.n_train_available, data.n_train_samples
        if available is not None and asked is not None and asked > available:
            log.info(
                "%s holds %d training samples; %d are asked for: it is repeated, in a new order each time",
                data.dataset_name, available, asked,
            )  # fmt: skip
            self._told = True
        elif available is not None and asked is None and engine.tokens_per_pass is not None:
            rest = engine.tokens_per_pass - available * self._fresh_tokens
            if rest:
                log.info("one pass is %d samples; %d tokens at its end do not fill another", available, rest)

    @property
    def n_train_available(self) -> int | None:
        """Training samples of one pass; None for a stream whose end has not been seen."""
        tokens = self.engine.tokens_per_pass
        return None if tokens is None else tokens // self._fresh_tokens

    def train(
        self, start: int, batch: int, rank: int = 0, world: int = 1, cursor: dict[str, Any] | None = None
    ) -> Iterator[TokenBatch]:
        """Micro-batches without end: batch i holds samples start + [i·world·batch, (i+1)·world·batch), ranks in order.

        Args:
            start: samples consumed before.
            batch: sequences per rank.
            cursor: what a batch carried that ended at `start`; spares a stream the reading of what was consumed.
        """
        reader = self._reader(start, cursor or {})
        sample = start
        while True:
            first = sample + rank * batch
            tokens = self._sequences(reader, world * batch)[rank * batch : (rank + 1) * batch]
            sample += world * batch
            self._tell_repeated(reader.position)
            yield TokenBatch(tokens, first, self._cursor(sample, reader.position))

    def calibration(self, n: int) -> Tensor:
        """tokens_nT: the first n training sequences. Moves no cursor."""
        return self._sequences(self._reader(0, {}), n)

    def eval_batches(self, batch: int) -> Iterator[Tensor]:
        """Exactly `n_eval_samples` held-out sequences, tokens_bT."""
        yield from self._held_out(0, self.data.n_eval_samples, batch)

    def threshold_batches(self, batch: int) -> Iterator[Tensor]:
        """The `n_threshold_samples` held-out sequences behind these, tokens_bT."""
        yield from self._held_out(self.data.n_eval_samples, self.data.n_threshold_samples or 0, batch)

    def _held_out(self, first: int, n: int, batch: int) -> tuple[Tensor, ...]:
        tokens = self.held_out[first * self._fresh_tokens : (first + n) * self._fresh_tokens]
        return self._samples.rows(tokens, n).split(batch) if n else ()

    def fingerprint(self) -> str:
        """Changes when documents or their order change, and with every change of local files."""
        return _hash(self.identity().encode(), np.array(file_states(self.data.dataset_name)))

    def identity(self) -> str:
        """The same for the same tokens wherever they lie: held-out tokens, first samples, token count."""
        return _hash(self.calibration(4).numpy(), self.held_out, np.array(self.engine.tokens_per_pass or 0))

    def _sequences(self, reader: Reader, n: int) -> Tensor:
        return self._samples.rows(reader.read(n * self._fresh_tokens), n)

    def _reader(self, start: int, cursor: dict[str, Any]) -> Reader:
        position = self.engine.seek(start * self._fresh_tokens)
        behind = 0
        if position is None:
            position = Position()
            if cursor and cursor["slot"] <= start:
                position = Position(cursor["pass"], cursor["unit"], cursor["offset"], cursor["state"])
                behind = cursor["slot"]
        else:
            behind = start
        reader = Reader(self.engine, position)
        for _ in range(start - behind):
            reader.read(self._fresh_tokens)
        return reader

    def _cursor(self, sample: int, position: Position) -> dict[str, Any]:
        if self.engine.tokens_per_pass is not None:
            return {"slot": sample}
        where = {"pass": position.pass_, "unit": position.unit, "offset": position.offset, "state": position.state}
        return {"slot": sample, **where}

    def _tell_repeated(self, position: Position) -> None:
        if position.pass_ > 0 and not self._told:
            log.info("%s has been read to its end: it is repeated, in a new order each time", self.data.dataset_name)
            self._told = True


def _hash(*parts: NDArray[Any] | bytes) -> str:
    return hashlib.sha256(b"".join(p if isinstance(p, bytes) else p.tobytes() for p in parts)).hexdigest()[:16]


class _Samples:
    """Token streams cut into sequences, each begun by BOS where the config says so."""

    def __init__(self, data: DataConfig, bos: int | None):
        self._bos = np.array([bos], dtype=np.int64) if data.prepend_bos else np.zeros(0, np.int64)
        self.fresh_tokens = data.context_length - len(self._bos)

    def rows(self, tokens: Ids, n: int) -> Tensor:
        """tokens_nT."""
        rows_nT = tokens.reshape(n, self.fresh_tokens).astype(np.int64)
        if len(self._bos):
            rows_nT = np.concatenate([np.broadcast_to(self._bos, (n, 1)), rows_nT], axis=1)
        return torch.from_numpy(rows_nT)


class HeldOut:
    """Held-out sequences that have data of their own: the first of its documents, or all of them."""

    def __init__(self, tokens: Ids, data: DataConfig, bos: int | None):
        self._samples = _Samples(data, bos)
        self.n = len(tokens) // self._samples.fresh_tokens
        self.fresh_tokens = self._samples.fresh_tokens
        self.tokens = tokens[: self.n * self.fresh_tokens]

    @classmethod
    def load(cls, data: DataConfig, model: LanguageModel, whole: bool = False) -> HeldOut:
        """`data.n_held_out` samples of `data.eval_data`, or `whole`: as many as it holds.

        Raises:
            UserError: as :meth:`TokenData.load`, naming the fields of the held-out data.
        """
        own = data.eval_data
        assert own is not None
        wanted = 0 if whole else data.n_held_out * (data.context_length - data.prepend_bos)
        with of_held_out_data():
            own = own.model_copy(update={"streaming": own.streaming and not whole, **_as_stored(own)})
            engine, own, bos = open_engine(own, model, wanted)
            found = cls(_all_tokens(engine) if whole else engine.held_out[:wanted], own, bos)
        if whole and (rest := engine.tokens_in_all % (found.n * found.fresh_tokens or 1)):
            log.info("%s: %d tokens at its end do not fill another sample", own.dataset_name, rest)
        if found.n < (1 if whole else data.n_held_out):
            raise UserError(
                f"'data.eval_dataset_name': {own.dataset_name} holds {engine.tokens_in_all} tokens, less than"
                f" {max(1, data.n_held_out)} samples of {data.context_length}"
            )
        return found

    def batches(self, batch: int) -> Iterator[Tensor]:
        """All sequences, tokens_bT."""
        yield from self._samples.rows(self.tokens, self.n).split(batch)


def _as_stored(data: DataConfig) -> dict[str, Any]:
    """Text files hold text and token files ids, whatever the training data are."""
    files = local_files(data.dataset_name)
    kind = kind_of(files[0]) if files else None
    return {"is_tokenized": kind == TOKENS} if kind in (TEXT, TOKENS) else {}


def _all_tokens(engine: Engine) -> Ids:
    return Reader(engine, Position()).read(engine.tokens_per_pass) if engine.tokens_per_pass else engine.held_out


def open_engine(data: DataConfig, model: LanguageModel, held_out: int) -> tuple[Engine, DataConfig, int | None]:
    """The documents of a data set, so many of whose tokens are set aside; the section itself; and BOS."""
    separator, bos = separator_of(data, model)
    rows = open_rows(data)
    if not data.is_tokenized and model.tokenizer is None:
        raise UserError(f"'data.tokenizer_name': {data.dataset_name} holds text, and there is no tokenizer in reach")
    tokeniser = Tokeniser(data, model.tokenizer, model.vocab_size)
    seed = data.seed or 0
    left_out = model.special_ids if data.mask_special_tokens else ()
    if isinstance(rows, ArrayRows):
        blocks = [row for array in rows.arrays if array.ndim > 1 for row in array[:_SAME_LENGTH_ROWS]]
        tell_padding(blocks, data, False, left_out)
        table, separator = _array_table(rows, separator, tokeniser, model)
        return TableEngine(table, separator, seed, data.shuffle_documents, held_out), data, bos
    first = _first_rows(rows, data)
    if data.is_tokenized and _joined_as_they_are(first, data, left_out):
        separator = replace(separator, token=None)
    if isinstance(rows, ListTable) or hasattr(rows, "select"):
        return TableEngine(_table(rows, tokeniser), separator, seed, data.shuffle_documents, held_out), data, bos
    return StreamEngine(rows, tokeniser, separator, seed, data.shuffle_documents, held_out), data, bos


def _array_table(
    rows: ArrayRows, separator: Separator, tokeniser: Tokeniser, model: LanguageModel
) -> tuple[DocumentTable, Separator]:
    """Documents of token files: between the separators that occur in them, else blocks that are joined as they are."""
    data = tokeniser.data
    others = special_tokens(model) if data.separator == "auto" else []
    mark = find_separator(rows.arrays, [t for t in (separator.token, *others) if t is not None])
    before = separator.before and mark == separator.token
    if not sum(map(len, rows.arrays)):
        raise UserError(f"'data.dataset_name': {data.dataset_name} is empty")
    block = _BLOCK_SAMPLES * (data.context_length - data.prepend_bos)
    table = DocumentTable.from_files(rows.arrays, mark, before, block, tokeniser)
    return table, replace(separator, token=mark, before=before)


def _first_rows(rows: ListTable | Dataset | IterableDataset, data: DataConfig) -> list[dict[str, Any]]:
    """Some rows, once it is known that their column holds what the config says."""
    if isinstance(rows, ListTable):
        found = [{data.column_name: row} for row in rows.rows[:_SAME_LENGTH_ROWS]]
    else:
        with reading(data):
            head = list(rows.take(_SAME_LENGTH_ROWS if data.is_tokenized else 10))
        columns = rows.column_names or list(head[0] if head else {})
        check_names(data, columns)
        found = head
    if not found:
        raise UserError(f"'data.dataset_name': {data.dataset_name} is empty")
    stored = [row.get(data.column_name) for row in found]
    for row in [row for row in stored if row is not None and row not in ([], "")] or stored[:1]:
        check_column(data, row)
    return found


def _joined_as_they_are(rows: list[dict[str, Any]], data: DataConfig, left_out: Collection[int]) -> bool:
    """Whether the first rows are full blocks; says what is done about padding."""
    rows = [row for row in rows if row[data.column_name] is not None]
    stored = [row[data.column_name] for row in rows]
    kept = [len(without_padding(row, data)) for row in rows]
    lengths = list(map(len, stored))
    tell_padding(stored, data, kept != lengths, left_out)
    return full_blocks(lengths, kept)


def check_names(data: DataConfig, columns: list[str]) -> None:
    """Refuse a column that the data set lacks."""
    if columns and data.column_name not in columns:
        known = ", ".join(name if len(name) < 40 else f"{name[:36]} …" for name in sorted(columns)[:20])
        raise UserError(f"'data.column_name': {data.dataset_name} has no column '{data.column_name}' (it has {known})")


def _table(rows: ListTable | Dataset, tokeniser: Tokeniser) -> DocumentTable:
    data = tokeniser.data
    if data.is_tokenized and not isinstance(rows, ListTable):
        return DocumentTable.from_column(rows, tokeniser)
    if len(rows) > 200_000:
        log.info(
            "tokenising %d documents of %s; data.streaming: true would start at once", len(rows), data.dataset_name
        )
    texts = rows.rows if isinstance(rows, ListTable) else rows[data.column_name]
    return DocumentTable.from_arrays(tokeniser(texts), tokeniser)
