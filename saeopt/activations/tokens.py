"""Token sequences for training and evaluation: packed documents in an order that the data seed alone fixes.

A slot is one training sequence of `context_length` tokens; slots are numbered without end, over all passes.
Suffixes: b sequences of one rank, n sequences, T positions.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saeopt.activations.documents import DocumentTable, Tokeniser, check_column
from saeopt.activations.packing import Engine, Position, Reader, Separator, StreamEngine, TableEngine
from saeopt.activations.sources import ListTable, file_states, open_rows
from saeopt.console import log
from saeopt.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from saeopt.activations.language_model import LanguageModel
    from saeopt.config.run import DataConfig

_SAME_LENGTH_ROWS = 1000
"""Rows looked at to tell full blocks (all of one length) from documents."""


def notice(message: str, *values: object) -> None:
    """A line for the user, from the first process only."""
    log.log(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.DEBUG, message, *values)


class TokenBatch(NamedTuple):
    """One rank's part of a micro-batch, and the cursor of what lies behind the whole micro-batch."""

    tokens_bT: Tensor
    first_slot: int
    cursor: dict[str, Any]


class TokenData:
    """Training and held-out sequences of one data set. Build one with :meth:`load`."""

    def __init__(self, engine: Engine, data: DataConfig, bos: int | None):
        self.engine, self.data = engine, data
        self._bos = np.array([bos], dtype=np.int32) if data.prepend_bos else np.zeros(0, np.int32)
        self.tokens_per_slot = data.context_length
        self._fresh_tokens = data.context_length - len(self._bos)
        self._told = False
        self._check_sizes()

    @classmethod
    def load(cls, data: DataConfig, model: LanguageModel) -> TokenData:
        """The data set of a config, as token ids of `model`.

        Documents are shuffled by `data.seed`; whole documents are set aside for evaluation first. Token ids that lie
        in rows of one length are full blocks and are joined as they are; other documents get a separator.

        Raises:
            UserError: no such data set, split or column; a column of the wrong type; token ids outside the
                vocabulary; too few tokens.
        """
        separator, bos = separator_of(data, model)
        rows = open_rows(data)
        tokeniser = Tokeniser(data, model.tokenizer, model.vocab_size)
        seed, wanted = data.seed or 0, data.n_eval_samples * (data.context_length - data.prepend_bos)
        first = _first_rows(rows, data)
        if data.is_tokenized and len(first) > 1 and len({len(row) for row in first if row is not None}) == 1:
            separator = Separator()
        if isinstance(rows, ListTable) or hasattr(rows, "select"):
            table = _table(rows, tokeniser)
            return cls(TableEngine(table, separator, seed, data.shuffle_documents, wanted), data, bos)
        return cls(StreamEngine(rows, tokeniser, separator, seed, data.shuffle_documents, wanted), data, bos)

    def _check_sizes(self) -> None:
        data, engine = self.data, self.engine
        wanted, have = data.n_eval_samples * self._fresh_tokens, len(engine.held_out)
        if have < wanted:
            raise UserError(
                f"'data.n_eval_samples': {data.n_eval_samples} samples of {data.context_length} tokens are more than "
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
            notice(
                "%s holds %d training samples; %d are asked for: it is repeated, in a new order each time",
                data.dataset_name, available, asked,
            )  # fmt: skip
            self._told = True
        elif available is not None and asked is None and engine.tokens_per_pass is not None:
            rest = engine.tokens_per_pass - available * self._fresh_tokens
            if rest:
                notice("one pass is %d samples; %d tokens at its end do not fill another", available, rest)

    @property
    def n_train_available(self) -> int | None:
        """Training samples of one pass; None for a stream whose end has not been seen."""
        tokens = self.engine.tokens_per_pass
        return None if tokens is None else tokens // self._fresh_tokens

    def train(
        self, start: int, batch: int, rank: int = 0, world: int = 1, cursor: dict[str, Any] | None = None
    ) -> Iterator[TokenBatch]:
        """Micro-batches without end: batch i holds slots start + [i·world·batch, (i+1)·world·batch), ranks in order.

        Args:
            start: slots consumed before.
            batch: sequences per rank.
            cursor: what a batch carried that ended at `start`; spares a stream the reading of what was consumed.
        """
        reader = self._reader(start, cursor or {})
        slot = start
        while True:
            first = slot + rank * batch
            tokens = self._sequences(reader, world * batch)[rank * batch : (rank + 1) * batch]
            slot += world * batch
            self._tell_repeated(reader.position)
            yield TokenBatch(tokens, first, self._cursor(slot, reader.position))

    def calibration(self, n: int) -> Tensor:
        """tokens_nT: the first n training sequences. Moves no cursor."""
        return self._sequences(self._reader(0, {}), n)

    def eval_batches(self, batch: int) -> Iterator[Tensor]:
        """Exactly `n_eval_samples` held-out sequences, tokens_bT."""
        n = self.data.n_eval_samples
        tokens_nT = self._rows(self.engine.held_out[: n * self._fresh_tokens], n)
        yield from tokens_nT.split(batch) if n else ()

    def fingerprint(self) -> str:
        """Changes when documents or their order change: held-out tokens, first samples, token count, local files."""
        parts = [self.calibration(4).numpy(), self.engine.held_out, np.array(self.engine.tokens_per_pass or 0)]
        parts += [np.array(state) for state in file_states(self.data.dataset_name)]
        return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16]

    def _sequences(self, reader: Reader, n: int) -> Tensor:
        return self._rows(reader.read(n * self._fresh_tokens), n)

    def _rows(self, tokens: np.ndarray, n: int) -> Tensor:
        rows_nT = tokens.reshape(n, self._fresh_tokens).astype(np.int64)
        if len(self._bos):
            rows_nT = np.concatenate([np.broadcast_to(self._bos.astype(np.int64), (n, 1)), rows_nT], axis=1)
        return torch.from_numpy(rows_nT)

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

    def _cursor(self, slot: int, position: Position) -> dict[str, Any]:
        if self.engine.tokens_per_pass is not None:
            return {"slot": slot}
        where = {"pass": position.pass_, "unit": position.unit, "offset": position.offset, "state": position.state}
        return {"slot": slot, **where}

    def _tell_repeated(self, position: Position) -> None:
        if position.pass_ > 0 and not self._told:
            notice("%s has been read to its end: it is repeated, in a new order each time", self.data.dataset_name)
            self._told = True


def separator_of(data: DataConfig, model: LanguageModel) -> tuple[Separator, int | None]:
    """The separator that a config asks for, and BOS.

    Raises:
        UserError: the tokenizer and the model's config have no such token.
    """
    bos, eos = (_token(model, name) for name in ("bos_token_id", "eos_token_id"))
    if data.prepend_bos and bos is None:
        raise UserError("'data.prepend_bos': the tokenizer has no BOS token")
    choice = data.separator
    if choice == "auto":
        adds_bos = model.tokenizer is not None and bos is not None and model.tokenizer("a")["input_ids"][:1] == [bos]
        choice = "bos" if adds_bos or eos is None else "eos"
        if bos is None and eos is None:
            notice("the tokenizer has neither BOS nor EOS: documents are joined without a separator")
            return Separator(), None
    token = bos if choice == "bos" else eos
    if token is None:
        raise UserError(f"'data.separator': the tokenizer has no {choice.upper()} token")
    return Separator(token, before=choice == "bos"), bos


def _token(model: LanguageModel, name: str) -> int | None:
    source = model.config.get_text_config() if model.tokenizer is None else model.tokenizer
    value = getattr(source, name, None)
    return value[0] if isinstance(value, list) else value


def _first_rows(rows: ListTable | Dataset | IterableDataset, data: DataConfig) -> list[Any]:
    """Some rows of the column, once it is known to hold what the config says."""
    if isinstance(rows, ListTable):
        found, columns = rows.rows[:_SAME_LENGTH_ROWS], None
    else:
        head = list(rows.take(_SAME_LENGTH_ROWS if data.is_tokenized else 10))
        columns = rows.column_names or list(head[0] if head else {})
        check_names(data, columns)
        found = [row[data.column_name] for row in head]
    if not found:
        raise UserError(f"'data.dataset_name': {data.dataset_name} is empty")
    full = next((row for row in found if row), found[0])
    check_column(data, full)
    return found


def check_names(data: DataConfig, columns: list[str]) -> None:
    """Refuse a column that the data set lacks."""
    if columns and data.column_name not in columns:
        raise UserError(
            f"'data.column_name': {data.dataset_name} has no column '{data.column_name}' "
            f"(it has {', '.join(sorted(columns))})"
        )


def _table(rows: ListTable | Dataset, tokeniser: Tokeniser) -> DocumentTable:
    data = tokeniser.data
    if data.is_tokenized and not isinstance(rows, ListTable):
        return DocumentTable.from_column(rows, tokeniser)
    if len(rows) > 200_000:
        notice("tokenising %d documents of %s; data.streaming: true would start at once", len(rows), data.dataset_name)
    texts = rows.rows if isinstance(rows, ListTable) else rows[data.column_name]
    return DocumentTable.from_arrays(tokeniser(texts), tokeniser)
