"""Thresholds that are set once, at the end of a training: batch_topk's with `saes.threshold: held_out`.

The running threshold is a mean of the smallest activations that windows kept, of weights that still moved and of tokens
that were trained on; the code of other tokens then has some latents less than k. This one is the quantile itself.

Shape suffixes: N tokens, b a block of them, d width read, h dictionary width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from saeopt.activations.masks import side_by_side
from saeopt.activations.source import Samples, Source
from saeopt.config.run import DataConfig
from saeopt.console import log
from saeopt.evaluation.evaluate import CODE_BYTES, keep_rule
from saeopt.host.pulse import pulse
from saeopt.saes.batch_topk import BatchTopKSAE
from saeopt.training.pack import Member
from saeopt.training.ranks import Axis

_DIGIT = 16
"""Bits of a key that one pass over the samples finds."""


class Rank:
    """The value that exactly `int(k n)` of the positive activations of n tokens exceed, found digit by digit.

    The bits of a positive float order as it does. A pass counts, among the values that agree with the digits found so
    far, how many have each next digit; two passes find a float32, four a float64. Nothing is sorted or kept, and the
    order of the tokens, their batches and the processes they are on do not matter. 0 where not so many are positive;
    of equal values none is above itself, so that then fewer are.
    """

    def __init__(self, k: float, dtype: torch.dtype, device: torch.device) -> None:
        self.k, self.double = k, dtype == torch.float64
        self.shift = (64 if self.double else 32) - _DIGIT
        self.prefix, self.above, self.tokens = 0, 0, 0
        self.counts = torch.zeros(2**_DIGIT + 1, dtype=torch.int64, device=device)
        """How many values have each digit; last, the tokens."""

    @property
    def found(self) -> bool:
        """Whether no further pass is needed."""
        return self.shift < 0

    def count(self, acts_bh: Tensor) -> None:
        """Take the activations of some tokens in."""
        values = acts_bh[acts_bh > 0]
        bits = values.double().view(torch.int64) if self.double else values.float().view(torch.int32).to(torch.int64)
        bits = bits >> self.shift
        digits = bits[(bits >> _DIGIT) == self.prefix] & (2**_DIGIT - 1)
        self.counts[:-1] += torch.bincount(digits, minlength=2**_DIGIT)
        self.counts[-1] += len(acts_bh)

    def close_pass(self) -> None:
        """The next digit, from what all processes counted (a synchronisation)."""
        counts, self.tokens = self.counts[:-1].cpu(), int(self.counts[-1])
        wanted = int(self.k * self.tokens) + 1 - self.above  # the place of the first value that is not to be kept
        at_least = counts.flip(0).cumsum(0).flip(0)
        digit = int((at_least >= wanted).sum()) - 1  # at_least falls
        if digit >= 0:
            self.above += int(at_least[digit] - counts[digit])
        digit = max(digit, 0)
        self.prefix = (self.prefix << _DIGIT) | digit
        self.shift -= _DIGIT
        self.counts.zero_()

    @property
    def value(self) -> Tensor:
        """What was found."""
        bits = torch.tensor(self.prefix, dtype=torch.int64)
        return bits.view(torch.float64) if self.double else bits.to(torch.int32).view(torch.float32)


@torch.no_grad()
def set_thresholds(members: Sequence[Member], source: Source, samples: Samples, data: DataConfig, axis: Axis) -> None:
    """Set θ of the members that ask for it, and say so.

    Their activations are those of an evaluation, of the samples that `data.n_threshold_samples` holds out.
    """
    wanting = [(m, m.sae) for m in members if isinstance(m.sae, BatchTopKSAE) and m.sae.config.threshold == "held_out"]
    if not wanting:
        return
    ranks = [Rank(sae.config.k, sae.threshold.dtype, sae.threshold.device) for _, sae in wanting]
    while not ranks[0].found:  # weights of one run have one precision
        batches = islice(samples.threshold_batches(data.eval_batch_size), axis.rank, None, axis.size)
        for rank, acts_bh in _activations(wanting, ranks, source, batches, data):
            rank.count(acts_bh)
        axis.reduce([rank.counts for rank in ranks])
        for rank in ranks:
            rank.close_pass()
    for (member, sae), rank in zip(wanting, ranks, strict=True):
        log.info(
            "%s: %s: threshold %.4g from %d held-out tokens; the running one was %.4g",
            member.trial, member, rank.value, rank.tokens, sae.threshold,
        )  # fmt: skip
        if rank.tokens:
            sae.threshold.copy_(rank.value)


def _activations(
    wanting: Sequence[tuple[Member, BatchTopKSAE]],
    ranks: Sequence[Rank],
    source: Source,
    batches: Iterable[Tensor],
    data: DataConfig,
) -> Iterator[tuple[Rank, Tensor]]:
    """relu(π) of all kept tokens, block by block; the source is read once for all members."""
    hooks = sorted({hook for member, _ in wanting for hook in member.site.hooks})
    rules = [keep_rule(source, data, sae.norm_limit) for _, sae in wanting]
    for batch in batches:
        pulse()
        tokens_BT = batch.to(source.device)
        x = source.activations(tokens_BT, hooks)
        for (member, sae), rank, rule in zip(wanting, ranks, rules, strict=True):
            keep_BT = rule(tokens_BT, side_by_side(x, member.site.hooks))
            x_Nd = side_by_side(x, member.site.reads)[keep_BT]
            for x_bd in x_Nd.split(max(1, CODE_BYTES.get(x_Nd.device.type, 2**26) // (4 * sae.h))):
                yield rank, sae.activations(sae.normalised(x_bd.to(sae.W_enc.dtype)))
