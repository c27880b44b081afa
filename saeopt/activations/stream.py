"""The stream of activations that a pack trains on.

Suffixes: b sequences, T positions, N = b·T tokens, d width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from saeopt.activations.masks import keep_norms, keep_tokens

if TYPE_CHECKING:
    from saeopt.activations.language_model import LanguageModel
    from saeopt.activations.tokens import TokenBatch, TokenData
    from saeopt.config.run import RunConfig


@dataclass
class Batch:
    """One micro-batch of one rank, on the device of the language model.

    `keep_N` and `n_keep` follow from the token ids alone, so that no synchronisation is needed to know them;
    :meth:`keep` adds the norm outliers of a hook point where the config asks for that.
    """

    x: dict[str, Tensor]
    keep_N: Tensor
    n_keep: int
    first_slot: int
    n_slots: int
    tokens_per_slot: int
    outlier_norm: float | None = None
    _kept: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def keep(self, hook: str) -> Tensor:
        """keep_N (bool) at one hook point."""
        if self.outlier_norm is None:
            return self.keep_N
        if hook not in self._kept:
            self._kept[hook] = keep_norms(self.x[hook], self.keep_N, self.outlier_norm)
        return self._kept[hook]


class ActivationStream:
    """Batches of activations without end, from sample `start` on; iterate over it, and close it at the end."""

    def __init__(
        self,
        model: LanguageModel,
        tokens: TokenData,
        hooks: Sequence[str],
        config: RunConfig,
        *,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        cursor: Mapping[str, Any] | None = None,
    ):
        self.model, self.hooks, self.config = model, list(hooks), config
        self._cursor: dict[str, Any] = dict(cursor or {})
        batch = config.data.train_batch_size
        self._tokens = tokens.train(start, batch, rank, world, self._cursor)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        part = next(self._tokens)
        batch = self._harvest(part)
        self._cursor = part.cursor
        return batch

    def _harvest(self, part: TokenBatch) -> Batch:
        data = self.config.data
        keep_bT = keep_tokens(part.tokens_bT, self.model.special_ids, data)
        x = {h: x_bTd.flatten(0, 1) for h, x_bTd in self.model.activations(part.tokens_bT, self.hooks).items()}
        return Batch(
            x=x,
            keep_N=keep_bT.flatten().to(self.model.device),
            n_keep=int(keep_bT.sum()),
            first_slot=part.first_slot,
            n_slots=len(part.tokens_bT),
            tokens_per_slot=data.context_length,
            outlier_norm=data.mask_norm_outliers,
        )

    def cursor(self) -> dict[str, Any]:
        """What was consumed: plain values, to be given back as `cursor` together with `start`."""
        return self._cursor

    def close(self) -> None:
        """Stop reading ahead."""
