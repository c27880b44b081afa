"""Which tokens count. One rule for normalisation, bias, loss and metrics, in training and in evaluation.

Suffixes: b sequences, T positions, N = b·T tokens, d width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from saeopt.config.run import DataConfig


def keep_tokens(tokens_bT: Tensor, special_ids: Iterable[int], data: DataConfig | None = None) -> Tensor:
    """keep_bT from token ids alone: False on special tokens (unless `data.mask_special_tokens` is false)."""
    special = sorted(special_ids) if data is None or data.mask_special_tokens else []
    return ~torch.isin(tokens_bT, torch.tensor(special, dtype=tokens_bT.dtype, device=tokens_bT.device))


def keep_norms(x_Nd: Tensor, keep_N: Tensor, limit: float) -> Tensor:
    """keep_N without attention sinks: tokens whose norm exceeds `limit` medians of the kept tokens' norms.

    The median is that of the tokens given (one micro-batch of one process); nothing is synchronised.
    """
    norm_N = x_Nd.float().norm(dim=-1)
    median = norm_N.where(keep_N, torch.nan).nanmedian()
    return keep_N & ~(norm_N > limit * median)


def keep_mask(
    tokens_bT: Tensor, special_ids: Iterable[int], data: DataConfig | None = None, x_Nd: Tensor | None = None
) -> Tensor:
    """keep_N (bool): the tokens that count, on the device of `x_Nd`, or of the tokens if there is none.

    Args:
        tokens_bT: token ids.
        special_ids: BOS, EOS and padding.
        data: the config's section; None: special tokens are left out and norms are not looked at.
        x_Nd: raw activations, needed for `data.mask_norm_outliers`.
    """
    keep_N = keep_tokens(tokens_bT, special_ids, data).flatten()
    if x_Nd is None:
        return keep_N
    keep_N = keep_N.to(x_Nd.device)
    limit = None if data is None else data.mask_norm_outliers
    return keep_N if limit is None else keep_norms(x_Nd, keep_N, limit)
