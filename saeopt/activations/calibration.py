"""The beginning of the stream, from which normalisation, bias, initial scale and norm outliers are measured once.

Every rank looks at the same samples, whatever the batch sizes. Suffixes: b sequences, B all of them, T positions,
N tokens, d width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from saeopt.activations.masks import keep_norms, keep_tokens, norm_limit

if TYPE_CHECKING:
    from saeopt.activations.language_model import LanguageModel
    from saeopt.activations.tokens import TokenData
    from saeopt.config.run import RunConfig

CALIBRATION_TOKENS = 8192


class Calibration(NamedTuple):
    """Unmasked activations (float32, CPU) of a hook point, and the norm above which a token is left out there."""

    x_Nd: Tensor
    norm_limit: float


def calibration(
    hooks: Sequence[str], model: LanguageModel, tokens: TokenData, config: RunConfig
) -> dict[str, Calibration]:
    """The first samples of the stream at each hook point."""
    data = config.data
    sample_BT = tokens.calibration(math.ceil(CALIBRATION_TOKENS / data.context_length))
    keep_N = keep_tokens(sample_BT, model.special_ids, data).flatten().cpu()
    parts: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    for part_bT in sample_BT.split(data.train_batch_size):
        x = model.activations(part_bT, list(hooks))
        for hook in hooks:
            parts[hook].append(x[hook].flatten(0, 1).float().cpu())
    found = {}
    for hook, pieces in parts.items():
        x_Nd = torch.cat(pieces)
        limit = norm_limit(x_Nd, keep_N, data.mask_norm_outliers)
        found[hook] = Calibration(x_Nd[keep_norms(x_Nd, keep_N, limit)], limit)
    return found
