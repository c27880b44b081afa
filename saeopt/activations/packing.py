"""The endless token stream: documents in a seeded order, joined by a separator, pass after pass.

Both engines deal in units: some documents, joined. Unit u of pass p is the same whoever reads it, so that any position
(p, u, offset) can be gone back to. What is left of one pass goes on into the next: no token is lost or doubled.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from saeopt.activations.documents import DocumentTable, Ids, Tokeniser, reading
from saeopt.activations.padding import without_padding
from saeopt.activations.separators import Separator
from saeopt.errors import UserError
from saeopt.saes.noise import derived_seed

if TYPE_CHECKING:
    from datasets import IterableDataset

LONG = 0.1
"""Share of all tokens that whole documents may hold beyond what is asked to be held out; beyond it the last is cut."""
UNIT_DOCUMENTS = 2048
"""Documents of a unit; a stream is shuffled within units."""


def order(seed: int, n: int, *names: int | str, shuffle: bool = True) -> NDArray[np.int64]:
    """A permutation of n numbers fixed by the seed and the names alone."""
    if not shuffle:
        return np.arange(n)
    return np.random.Generator(np.random.PCG64(derived_seed("documents", seed, *names))).permutation(n)


@dataclass(frozen=True)
class Unit:
    """Some joined documents of one pass, and what a stream needs to come back to their beginning."""

    number: int
    pass_: int
    tokens: Ids
    state: dict[str, Any] | None = None


@dataclass(frozen=True)
class Position:
    """A place in the endless stream. `state` is what a streamed data set needs to read the unit again."""

    pass_: int = 0
    unit: int = 0
    offset: int = 0
    state: dict[str, Any] | None = None


class Engine(Protocol):
    """A source of units."""

    held_out: Ids

    @property
    def tokens_per_pass(self) -> int | None:
        """Tokens of one pass over the training documents; None where the end has not been seen."""

    @property
    def tokens_in_all(self) -> int:
        """Tokens of the data set, as far as it was read."""

    def seek(self, token: int) -> Position | None:
        """Where a token of the endless stream lies; None if only reading on can tell."""

    def units(self, start: Position) -> Iterator[Unit]:
        """Units from a position on, for ever."""


class TableEngine:
    """Documents that can be read by number: any position is found without reading."""

    def __init__(self, table: DocumentTable, separator: Separator, seed: int, shuffle: bool, held_out_tokens: int):
        self._table, self._separator, self._seed, self._shuffle = table, separator, seed, shuffle
        documents = order(seed, len(table), "all", shuffle=shuffle)
        documents = documents[table.lengths[documents] > 0]
        total = np.cumsum(self._joined_lengths()[documents])
        self.tokens_in_all: int = int(total[-1]) if len(total) else 0
        n_held = int(np.searchsorted(total, held_out_tokens)) + 1 if held_out_tokens else 0
        if 0 < n_held <= len(total):
            last, beyond = documents[n_held - 1], int(total[n_held - 1]) - held_out_tokens
            if LONG * self.tokens_in_all < beyond < table.lengths[last]:
                table.cut(last, int(table.lengths[last]) - beyond)
                documents = np.append(documents, len(table) - 1)
        self.held_out_documents, self._documents = documents[:n_held], documents[n_held:]
        self.held_out = separator.join(table.get(self.held_out_documents))
        self._joined = self._joined_lengths()
        self.tokens_per_pass: int = int(self._joined[self._documents].sum())
        self._order = lru_cache(maxsize=2)(self._order_of_pass)

    def _joined_lengths(self) -> NDArray[np.int64]:
        return self._separator.lengths(self._table.lengths, self._table.ends(self._separator.before))

    def _order_of_pass(self, pass_: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        shuffled = self._documents[order(self._seed, len(self._documents), "pass", pass_, shuffle=self._shuffle)]
        starts = np.concatenate([[0], np.cumsum(self._joined[shuffled])])[::UNIT_DOCUMENTS]
        return shuffled, starts

    def seek(self, token: int) -> Position:
        """Where a token lies."""
        pass_, within = divmod(token, self.tokens_per_pass)
        _, starts = self._order(pass_)
        unit = int(np.searchsorted(starts, within, side="right")) - 1
        return Position(pass_, unit, within - int(starts[unit]))

    def units(self, start: Position) -> Iterator[Unit]:
        """Units from a position on, for ever."""
        pass_, first = start.pass_, start.unit
        while True:
            shuffled, _ = self._order(pass_)
            for unit in range(first, -(-len(shuffled) // UNIT_DOCUMENTS)):
                documents = shuffled[unit * UNIT_DOCUMENTS : (unit + 1) * UNIT_DOCUMENTS]
                yield Unit(unit, pass_, self._separator.join(self._table.get(documents)))
            pass_, first = pass_ + 1, 0


class StreamEngine:
    """Documents that come one after another. Units are blocks of the stream, without the held-out documents."""

    def __init__(
        self, rows: IterableDataset, tokeniser: Tokeniser, separator: Separator, seed: int, shuffle: bool,
        held_out_tokens: int,
    ):  # fmt: skip
        # Readers in several threads each need rows of their own; copying a data set that is being read is not safe.
        self._rows, self._tokeniser, self._separator = pickle.dumps(rows), tokeniser, separator
        self._seed, self._shuffle = seed, shuffle
        self.tokens_per_pass: int | None = None
        self._first_blocks: list[list[Ids]] = []
        self._held: list[set[int]] = []
        self.held_out = self._set_aside(held_out_tokens)

    def _set_aside(self, wanted: int) -> Ids:
        """Hold out documents of the first blocks, and keep those blocks: training begins with them."""
        held: list[Ids] = []
        have = 0
        blocks = self._blocks(None)
        while have < wanted or not self._first_blocks:
            block, state = next(blocks, (None, None))
            if block is None:
                break
            chosen: set[int] = set()
            for i in order(self._seed, len(block), "all", len(self._first_blocks), shuffle=self._shuffle):
                if have >= wanted:
                    break
                chosen.add(int(i))
                joined = self._separator.join([block[i]])
                if (beyond := have + len(joined) - wanted) > LONG * sum(map(len, block)) and beyond < len(block[i]):
                    block.append(block[i][len(block[i]) - beyond :])
                    joined = self._separator.join([block[i][: len(block[i]) - beyond]])
                held.append(joined)
                have += len(held[-1])
            self._first_blocks.append(block)
            self._held.append(chosen)
            self._after_first = state
        self.tokens_in_all = have
        return np.concatenate(held) if held else np.zeros(0, np.int32)

    def _blocks(self, state: dict[str, Any] | None) -> Iterator[tuple[list[Ids], dict[str, Any]]]:
        """Blocks of tokenised documents and the state after each, in the order of the data set."""
        rows: IterableDataset = pickle.loads(self._rows)
        if state is not None:
            rows.load_state_dict(copy.deepcopy(state))
        pending: list[Any] = []
        for row in self._read(rows):
            pending.append(without_padding(row, self._tokeniser.data))
            if len(pending) == UNIT_DOCUMENTS:
                yield self._tokeniser(pending), copy.deepcopy(rows.state_dict())
                pending = []
        if pending:
            yield self._tokeniser(pending), copy.deepcopy(rows.state_dict())

    def _read(self, rows: IterableDataset) -> Iterator[dict[str, Any]]:
        coming = iter(rows)
        while True:
            with reading(self._tokeniser.data):
                row = next(coming, None)
            if row is None:
                return
            yield row

    def seek(self, token: int) -> Position | None:
        """Only reading on can tell, but for the beginning."""
        return Position() if token == 0 else None

    def _pass(self, pass_: int, start: Position) -> Iterator[Unit]:
        number = start.unit
        for block in self._first_blocks[number:]:
            yield self._unit(pass_, number, block, None)
            number += 1
        state = start.state if start.state is not None else self._after_first
        for block, after in self._blocks(state):
            yield self._unit(pass_, number, block, state)
            number, state = number + 1, after

    def _unit(self, pass_: int, number: int, block: list[Ids], state: dict[str, Any] | None) -> Unit:
        held = self._held[number] if number < len(self._held) else set()
        shuffled = order(self._seed, len(block), "pass", pass_, number, shuffle=self._shuffle)
        return Unit(number, pass_, self._separator.join([block[i] for i in shuffled if int(i) not in held]), state)

    def units(self, start: Position) -> Iterator[Unit]:
        """Units from a position on, for ever."""
        pass_ = start.pass_
        while True:
            anything = start.offset > 0
            for unit in self._pass(pass_, start):
                anything = anything or len(unit.tokens) > 0
                yield unit
            if not anything:
                raise UserError(f"'data.dataset_name': {self._tokeniser.data.dataset_name}: no tokens to train on")
            pass_, start = pass_ + 1, Position()


class Reader:
    """Reads the endless stream from a position on; `position` is where the next token lies."""

    def __init__(self, engine: Engine, start: Position):
        self._units = engine.units(start)
        self._unit = next(self._units)
        self._offset = start.offset

    @property
    def position(self) -> Position:
        """Where the next token lies."""
        return Position(self._unit.pass_, self._unit.number, self._offset, self._unit.state)

    def read(self, n: int) -> Ids:
        """The next n tokens."""
        parts: list[Ids] = []
        while n > 0:
            part = self._unit.tokens[self._offset : self._offset + n]
            parts.append(part)
            n -= len(part)
            self._offset += len(part)
            if n > 0:
                self._unit, self._offset = next(self._units), 0
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)
