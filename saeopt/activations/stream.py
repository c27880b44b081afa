"""The stream of activations that a pack trains on.

Tokens are read ahead by a thread. Micro-batches are harvested in groups at fixed sample numbers, so that a run that
resumes inside a group harvests it again and sees the same bits. A group is as many micro-batches as one
pass of the language model takes, or, with `data.shuffle_buffer_tokens`, as many as the shuffle buffer holds; the last
shuffled group ends with the run, which would not train on all of its tokens otherwise.
On a GPU the next group is harvested on a side stream while the present one is trained on.

Suffixes: b sequences of a micro-batch, T positions, N = tokens, d width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saeopt.activations.harvest import Group, GroupTokens, Harvester
from saeopt.activations.masks import keep_norms, side_by_side
from saeopt.activations.prefetch import Prefetch
from saeopt.saes.noise import derived_seed

if TYPE_CHECKING:
    from saeopt.activations.cache import ActivationCache
    from saeopt.activations.source import Samples, Source
    from saeopt.config.run import RunConfig

TOKENS_PER_PASS = {"cpu": 4096, "cuda": 32768}
"""Tokens of one pass of the language model where `lm_batch_size` does not say."""


@dataclass
class Batch:
    """One micro-batch of one rank, on the device of the language model; valid until the next one is asked for.

    `keep_N` follows from the token ids alone; :meth:`keep` leaves out the norm outliers of a site too. With a
    shuffle buffer the rows are tokens of the whole buffer, and the samples number the rows and nothing else.
    """

    x: dict[str, Tensor]
    keep_N: Tensor
    first_sample: int
    n_samples: int
    tokens_per_sample: int
    _joined: dict[tuple[str, ...], Tensor] = field(default_factory=dict, repr=False)
    _kept: dict[tuple[tuple[str, ...], float], Tensor] = field(default_factory=dict, repr=False)

    def at(self, hooks: tuple[str, ...]) -> Tensor:
        """x_Nd of some hook points side by side; the same tensor whenever it is asked for."""
        if hooks not in self._joined:
            self._joined[hooks] = side_by_side(self.x, hooks)
        return self._joined[hooks]

    def keep(self, hooks: tuple[str, ...], norm_limit: float) -> Tensor:
        """keep_N (bool) at the hook points of a site, without tokens that have a larger norm there."""
        key = (hooks, norm_limit)
        if key not in self._kept:
            x_Nd = self.x[hooks[0]] if norm_limit == math.inf else self.at(hooks)
            self._kept[key] = keep_norms(x_Nd, self.keep_N, norm_limit)
        return self._kept[key]


@dataclass(frozen=True)
class Schedule:
    """How micro-batches fall into groups: group g starts at sample `origin + g · group · samples`."""

    samples: int
    """Samples of one micro-batch over all ranks."""
    group: int
    """Micro-batches of a group."""
    origin: int = 0
    end: int | None = None
    """Samples of the whole run; None: without end."""
    whole: bool = True
    """Whether the last group is a whole one, and reaches past the end."""

    @classmethod
    def of(cls, config: RunConfig, device: torch.device, world: int, start: int, end: int | None = None) -> Schedule:
        """The groups of a run."""
        data = config.data
        samples = data.train_batch_size * world
        if data.shuffle_buffer_tokens:
            group = -(-data.shuffle_buffer_tokens // (data.train_batch_size * data.context_length))
        elif device.type == "cuda" or config.lm_batch_size is not None:
            group = sequences_per_pass(config, device) // data.train_batch_size
        else:
            group = 1
        return cls(samples, max(1, group), start % samples, end, whole=not data.shuffle_buffer_tokens)

    def locate(self, sample: int) -> tuple[int, int]:
        """The group of a sample, and the number of its micro-batch in the group."""
        return divmod((sample - self.origin) // self.samples, self.group)

    def sample(self, group: int) -> int:
        """The first sample of a group."""
        return self.origin + group * self.group * self.samples

    def left(self, group: int) -> int | None:
        """Micro-batches from a group on; None: without end."""
        if self.end is None:
            return None
        left = max(0, -(-(self.end - self.sample(group)) // self.samples))
        return -(-left // self.group) * self.group if self.whole else left

    def size(self, group: int) -> int:
        """Micro-batches of a group; 0 behind the end of the run."""
        left = self.left(group)
        return self.group if left is None else min(self.group, left)


def sequences_per_pass(config: RunConfig, device: torch.device) -> int:
    """Sequences that the language model gets at once."""
    if config.lm_batch_size is not None:
        return config.lm_batch_size
    return max(1, TOKENS_PER_PASS.get(device.type, TOKENS_PER_PASS["cpu"]) // config.data.context_length)


def even_share(total: int, most: int) -> int:
    """Sequences per pass, at most `most`, such that the passes of a group are as equal as can be."""
    return -(-total // -(-total // most))


class ActivationStream:
    """Batches of activations from sample `start` on; iterate over it, and close it at the end.

    Args:
        hooks: hook points, resolved.
        rank, world: which part of each micro-batch is this process's.
        start: samples consumed before, over all ranks.
        end: samples of the whole run; None: no end.
        cursor: what :meth:`cursor` gave when `start` samples had been consumed.
    """

    def __init__(
        self,
        model: Source,
        tokens: Samples,
        hooks: Sequence[str],
        config: RunConfig,
        *,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
        end: int | None = None,
        cursor: Mapping[str, Any] | None = None,
    ):
        self.config, self.rank = config, rank
        self.schedule = Schedule.of(config, model.device, world, start, end)
        self._group, self._micro = self.schedule.locate(start)
        first = self.schedule.sample(self._group)
        self._cursor: dict[str, Any] = dict(cursor or {})
        sequences = even_share(
            self.schedule.group * config.data.train_batch_size, sequences_per_pass(config, model.device)
        )
        cache = self._open_cache(model, tokens, hooks, world, sequences)  # before a thread runs that nobody would stop
        batches = tokens.train(first, config.data.train_batch_size, rank, world, self._cursor)
        self._tokens = Prefetch(islice(batches, self.schedule.left(self._group)), depth=2 * self.schedule.group)
        self._harvester = Harvester(model, hooks, config, sequences, cache)
        self._groups = self._harvester.groups(self._read_group)
        self._next_group = self._group
        self._now: Group | None = None

    def _open_cache(
        self, model: Source, tokens: Samples, hooks: Sequence[str], world: int, sequences: int
    ) -> ActivationCache | None:
        from saeopt.activations.cache import ActivationCache, cache_folder

        folder = cache_folder(self.config)
        if folder is None:
            return None
        samples, end = self.schedule.group * self.schedule.samples, None if self.schedule.whole else self.schedule.end
        cache = ActivationCache(
            folder, self.config, model, tokens, hooks, world=world, group_samples=samples, sequences=sequences, end=end
        )
        cache.note(self._cursor)
        return cache

    def _read_group(self) -> GroupTokens | None:
        number, self._next_group = self._next_group, self._next_group + 1
        parts = [next(self._tokens) for _ in range(self.schedule.size(number))]
        if not parts:
            return None
        seed = None
        if self.config.data.shuffle_buffer_tokens:
            seed = derived_seed("activation shuffle", self.config.data_seed, number, self.rank)
        return GroupTokens(parts, self.schedule.sample(number), seed)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._now is None or self._micro == len(self._now.parts):
            if self._now is not None:
                self._group, self._micro = self._group + 1, 0
            self._now = next(self._groups)
        batch = self._batch(self._now, self._micro)
        self._micro += 1
        if self._micro == len(self._now.parts):
            self._cursor = self._now.parts[-1].cursor
        self._harvester.work_ahead(1 / len(self._now.parts))
        return batch

    def _batch(self, group: Group, micro: int) -> Batch:
        data, part = self.config.data, group.parts[micro]
        rows = len(part.tokens_bT) * data.context_length
        span = slice(micro * rows, (micro + 1) * rows)
        return Batch(
            x={hook: x_Nd[span] for hook, x_Nd in group.x.items()},
            keep_N=group.keep_N[span],
            first_sample=part.first_sample,
            n_samples=len(part.tokens_bT),
            tokens_per_sample=data.context_length,
        )

    def cursor(self) -> dict[str, Any]:
        """What was consumed, as plain values: give it back as `cursor`, with `start`. Inside a group: its beginning."""
        return self._cursor

    def keep_only(self, hooks: Sequence[str]) -> None:
        """Harvest only these hook points from the next group on (those of members that still train)."""
        self._harvester.hooks = [hook for hook in self._harvester.hooks if hook in hooks]

    def close(self) -> None:
        """Stop reading ahead."""
        self._tokens.close()
        self._harvester.close()
        self._now = None
