"""Where activations come from: a language model that reads tokens, or files that were written before.

Training and evaluation ask for nothing but what stands here. Suffixes: b, n sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from saeopt.activations.language_model import LanguageModel
from saeopt.activations.plain_lm import Splice
from saeopt.activations.stored import StoredActivations, StoredRows
from saeopt.activations.tokens import TokenBatch, TokenData

if TYPE_CHECKING:
    from saeopt.config.run import DataConfig, RunConfig
    from saeopt.config.saes import SAEConfig
    from saeopt.config.sites import Site


class Source(Protocol):
    """Gives activations for samples: a language model for sequences of tokens, files for row numbers."""

    device: torch.device
    dtype: torch.dtype
    special_ids: set[int]

    @property
    def identity(self) -> str:
        """The same for the same values."""

    @property
    def n_parameters(self) -> int:
        """Numbers in the language model; 0 without one."""

    @property
    def predicts(self) -> bool:
        """Whether there are logits, and so cross-entropies."""

    def resolve(self, patterns: Sequence[str] | str) -> list[str]:
        """The hook points that names and patterns mean."""

    def sites(self, saes: SAEConfig) -> list[Site]:
        """The sites at which a config's SAEs are trained."""

    def width(self, hook: str) -> int:
        """The width at a hook point."""

    def activations(self, tokens_BT: Tensor, hooks: Sequence[str], compiled: bool = False) -> dict[str, Tensor]:
        """x_BTd at each hook point."""

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Next-token logits_BTV."""

    def spliced_logits(self, tokens_BT: Tensor, splices: Mapping[str, Splice]) -> Tensor:
        """The same with the values at some hook points replaced."""

    def fingerprint(self) -> str:
        """Changes when the source changes."""

    def identities(self) -> dict[str, str]:
        """What a run that goes on must find again: the language model's weights, or each hook point's rows."""


class Samples(Protocol):
    """Training and held-out samples in the order that the data seed fixes."""

    @property
    def n_train_available(self) -> int | None:
        """Samples of one pass; None where that is not known."""

    def train(
        self, start: int, batch: int, rank: int = 0, world: int = 1, cursor: dict[str, Any] | None = None
    ) -> Iterator[TokenBatch]:
        """Micro-batches without end."""

    def calibration(self, n: int) -> Tensor:
        """The first n training samples."""

    def eval_batches(self, batch: int) -> Iterator[Tensor]:
        """The held-out samples that an evaluation reports on."""

    def threshold_batches(self, batch: int) -> Iterator[Tensor]:
        """The held-out samples that thresholds are set on."""

    def identity(self) -> str:
        """The same for the same samples."""

    def fingerprint(self) -> str:
        """Changes with the samples or their order."""


def open_source(config: RunConfig, device: torch.device | str = "cpu") -> Source:
    """A run's language model, or the files that stand in for it.

    Raises:
        UserError: as :meth:`LanguageModel.load` and :meth:`StoredActivations.load`.
    """
    if config.data.activations is None:
        return LanguageModel.load(config, device)
    return StoredActivations.load(config, device)


def open_samples(data: DataConfig, source: Source) -> Samples:
    """A run's samples, as its source understands them."""
    if isinstance(source, StoredActivations):
        return StoredRows(data, source)
    assert isinstance(source, LanguageModel)
    return TokenData.load(data, source)
