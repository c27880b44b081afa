"""The beginning of the stream, from which normalisation, bias, initial scale and norm outliers are measured once.

Every rank looks at the same samples, whatever the batch sizes. Suffixes: b sequences, B all of them, T positions,
N tokens, d width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from saeopt.activations.masks import keep_norms, keep_tokens, norm_limit, side_by_side

if TYPE_CHECKING:
    from saeopt.activations.source import Samples, Source
    from saeopt.config.run import RunConfig
    from saeopt.config.sites import Site

CALIBRATION_TOKENS = 8192


class Calibration(NamedTuple):
    """Unmasked activations (float32, CPU) at a site: what is read, what is to be given (x itself where both are one),
    and the norm, over all its hook points, above which a token is left out there."""

    x_Nd: Tensor
    y_Ne: Tensor
    norm_limit: float


def calibration(sites: Iterable[Site], model: Source, tokens: Samples, config: RunConfig) -> dict[Site, Calibration]:
    """The first samples of the stream at each site."""
    data, sites = config.data, list(dict.fromkeys(sites))
    hooks = sorted({hook for site in sites for hook in site.hooks})
    sample_BT = tokens.calibration(math.ceil(CALIBRATION_TOKENS / data.context_length))
    keep_N = keep_tokens(sample_BT, model.special_ids, data).flatten().cpu()
    parts: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    for part_bT in sample_BT.split(data.train_batch_size):
        x = model.activations(part_bT, hooks)
        for hook in hooks:
            parts[hook].append(x[hook].flatten(0, 1).float().cpu())
    x = {hook: torch.cat(pieces) for hook, pieces in parts.items()}
    found = {}
    for site in sites:
        all_Na = side_by_side(x, site.hooks)
        limit = norm_limit(all_Na, keep_N, data.mask_norm_outliers)
        kept_N = keep_norms(all_Na, keep_N, limit)
        x_Nd = side_by_side(x, site.reads)[kept_N]
        y_Ne = x_Nd if site.reads == site.writes else side_by_side(x, site.writes)[kept_N]
        found[site] = Calibration(x_Nd, y_Ne, limit)
    return found
