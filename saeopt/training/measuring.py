"""Held-out metrics of a pack's trials while they train: one language-model pass for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from saeopt.activations.source import Samples, Source
from saeopt.evaluation.evaluate import evaluate
from saeopt.training.plan import Metrics
from saeopt.training.runtime import Runtime
from saeopt.training.trial import Trial, saes_of


def measure(
    trials: Sequence[Trial], model: Source, tokens: Samples, runtime: Runtime, at_most: int | None = None
) -> dict[str, Metrics]:
    """Trial → hook point → metric → value, over all ranks; `at_most`: of so many samples, rounded up to a batch."""
    if not trials:
        return {}
    config, axis = trials[0].plan.config, runtime.ranks.data
    size = config.data.eval_batch_size
    last = None if at_most is None else -(-at_most // size)
    rows = evaluate(
        saes_of(trials), model, islice(tokens.eval_batches(size), axis.rank, last, axis.size), data=config.data,
        cross_entropy=model.predicts, ce_ablation=config.ce_ablation, device=runtime.device,
        reduce=axis.reduce if axis.size > 1 else None,
    )  # fmt: skip
    found: dict[str, Metrics] = {}
    for (name, hook), row in rows.items():
        found.setdefault(name, {})[hook] = row
    return found
