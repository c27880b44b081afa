"""Padding of token ids: what an `attention_mask` column leaves out, and rows that look padded without one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saeopt.console import log
from saeopt.errors import UserError

if TYPE_CHECKING:
    from saeopt.config.run import DataConfig

MASK = "attention_mask"
"""The column beside token ids in which 0 marks padding, as tokenizers make it."""
_SHORTEST = 8
"""Tokens of a row from which repetition tells something."""
_FEW = 0.1
"""Share of padded rows up to which rows of one length are full blocks (the last of which is padded, say)."""


Spans = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Where rows start and stop in an array of values."""


def without_padding(row: Mapping[str, Any], data: DataConfig) -> Any:
    """A row's tokens that its mask keeps.

    Raises:
        UserError: the mask is of another length.
    """
    ids, mask = row.get(data.column_name), row.get(MASK) if data.is_tokenized else None
    if ids is None or mask is None:
        return ids
    if len(ids) != (n_mask := len(mask) if isinstance(mask, list | np.ndarray) else 1):
        raise _other_length(data, len(ids), n_mask)
    return ids if all(mask) else [token for token, kept in zip(ids, mask, strict=True) if kept]


def kept_spans(
    values: NDArray[Any], spans: Spans, mask: NDArray[Any], mask_spans: Spans, data: DataConfig
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
    """The values, starts and stops of some rows without padding; the values stay where they are if that is possible."""
    (starts, stops), (first, last) = spans, mask_spans
    differing = np.flatnonzero(stops - starts != last - first)
    if len(differing):
        row = differing[0]
        raise _other_length(data, int(stops[row] - starts[row]), int(last[row] - first[row]))
    before = np.concatenate([[0], np.cumsum(mask != 0)])  # kept positions of the mask before each
    n = before[last] - before[first]
    begin = np.searchsorted(before, before[first], side="right") - 1  # the first kept position of each row
    end = np.searchsorted(before, before[last], side="left")  # behind the last one
    if (end - begin == n)[n > 0].all():
        return values, np.where(n > 0, starts + begin - first, starts), np.where(n > 0, starts + end - first, starts)
    parts = [values[a:b][mask[c:d] != 0] for a, b, c, d in zip(starts, stops, first, last, strict=True)]
    behind = np.cumsum(n)
    return np.concatenate(parts), behind - n, behind


def full_blocks(lengths: Sequence[int], kept: Sequence[int]) -> bool:
    """Whether rows are pieces of a stream, to be joined as they are: all of one length, and hardly any padded."""
    padded = sum(k < n for k, n in zip(kept, lengths, strict=True))
    return len(lengths) > 1 and len(set(lengths)) == 1 and padded <= max(1, _FEW * len(lengths))


def tell_padding(rows: Sequence[Any], data: DataConfig, masked: bool, left_out: Collection[int]) -> None:
    """Say that an `attention_mask` is followed, or that one seems to be missing.

    `left_out`: special tokens that count nowhere in any case.
    """
    if masked:
        log.info("%s: positions with %s 0 are left out", data.dataset_name, MASK)
        return
    repeated = [token for row in rows if (token := mostly_one_token(row)) is not None and token not in left_out]
    if len(repeated) > _FEW * len(rows):
        log.warning(
            "%s: %d of %d rows are mostly token %d, repeated: if that is padding, it is trained on and counted; an"
            " '%s' column beside '%s' leaves it out",
            data.dataset_name, len(repeated), len(rows), max(set(repeated), key=repeated.count), MASK,
            data.column_name,
        )  # fmt: skip


def mostly_one_token(row: Any) -> int | None:
    """The token that fills more than half of a row from its beginning or to its end; None without one."""
    ids = np.asarray([] if row is None else row)
    if len(ids) < _SHORTEST:
        return None
    half = len(ids) // 2 + 1
    for end, piece in ((ids[-1], ids[-half:]), (ids[0], ids[:half])):
        if (piece == end).all():
            return int(end)
    return None


def _other_length(data: DataConfig, n_ids: int, n_mask: int) -> UserError:
    return UserError(
        f"'data.dataset_name': {data.dataset_name} has a row of {n_ids} tokens in '{data.column_name}' and {n_mask}"
        f" entries in '{MASK}'"
    )
