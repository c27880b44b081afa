"""Which tokens count. One rule for normalisation, bias, loss and metrics, in training and in evaluation.

Suffixes: b sequences, T positions, N = b·T tokens, d width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from saeopt.config.run import DataConfig


def keep_tokens(tokens_bT: Tensor, special_ids: Iterable[int], data: DataConfig | None = None) -> Tensor:
    """keep_bT from token ids and places alone.

    False on special tokens (unless `data.mask_special_tokens` is false) and on `data.skip_first_positions`.
    """
    special = sorted(special_ids) if data is None or data.mask_special_tokens else []
    keep_bT = ~torch.isin(tokens_bT, torch.tensor(special, dtype=tokens_bT.dtype, device=tokens_bT.device))
    if data is not None and data.skip_first_positions:
        keep_bT[:, : data.skip_first_positions] = False
    return keep_bT


def side_by_side(x: Mapping[str, Tensor], hooks: Sequence[str]) -> Tensor:
    """The activations of some hook points, joined along their last axis."""
    return x[hooks[0]] if len(hooks) == 1 else torch.cat([x[hook] for hook in hooks], dim=-1)


def norm_limit(x_Nd: Tensor, keep_N: Tensor, medians: float | None) -> float:
    """The norm above which a token counts as an attention sink: so many medians of the kept tokens' norms.

    inf where `medians` is None, or no token is kept. Measured once, on the beginning of the stream, and stored: a
    median of each micro-batch would make results depend on batch sizes and on the number of processes.
    """
    if medians is None or not keep_N.any():
        return math.inf
    return medians * x_Nd[keep_N].float().norm(dim=-1).median().item()


def keep_norms(x_Nd: Tensor, keep_N: Tensor, limit: float) -> Tensor:
    """keep_N without tokens whose norm exceeds `limit`; nothing is synchronised."""
    return keep_N if limit == math.inf else keep_N & ~(x_Nd.float().norm(dim=-1) > limit)


def keep_mask(
    tokens_bT: Tensor,
    special_ids: Iterable[int],
    data: DataConfig | None = None,
    x_Nd: Tensor | None = None,
    limit: float = math.inf,
) -> Tensor:
    """keep_N (bool): the tokens that count, on the device of `x_Nd`, or of the tokens if there is none.

    Args:
        tokens_bT: token ids.
        special_ids: BOS, EOS and padding.
        data: the config's section; None: special tokens are left out and norms are not looked at.
        x_Nd: raw activations, needed for `data.mask_norm_outliers`.
        limit: the hook point's :func:`norm_limit`.
    """
    keep_N = keep_tokens(tokens_bT, special_ids, data).flatten()
    if x_Nd is None:
        return keep_N
    outliers = data is not None and data.mask_norm_outliers is not None
    return keep_norms(x_Nd, keep_N.to(x_Nd.device), limit if outliers else math.inf)
