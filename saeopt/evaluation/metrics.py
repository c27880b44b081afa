"""How good a reconstruction is: sums in float64 on the device, divided once at the end.

Shape suffixes: N tokens, d model width, h dictionary width. Masked tokens (keep 0) count nowhere. Everything but the
code is in raw activation units. With f the code, x̂ the reconstruction and n the number of kept tokens:

    l0                  Σ_n #{i : f_i ≠ 0} / n                    negative entries count
    l1                  Σ_n Σ_i |f_i| ‖W_dec,i‖ / scale / n       raw units (x_normalised = x · scale): rescaling a
                                                                  latent and its decoder row changes nothing
    mse                 Σ_n ‖x − x̂‖² / n                          summed over d
    fvu                 Σ_n ‖x − x̂‖² / Σ_n ‖x − mean(x)‖²         mean(x) over the whole set
    explained_variance  1 − fvu
    cosine              Σ_n cos(x, x̂) / n                         0 where one of them is 0
    norm_ratio          Σ_n ‖x̂‖ / Σ_n ‖x‖                         a ratio of sums, not a mean of ratios per token
    gamma               ‖mean(x)‖ / ‖std(x)‖                      of the activations alone (arXiv 2605.31518)
    fraction_dead       latents that fired on none of the n tokens; fraction_alive is the rest
    log10_density       histogram over the alive latents of log10(share of tokens on which the latent fired)

fvu is a ratio of sums: a mean of ratios per token diverges on tokens near the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

Reduce: TypeAlias = Callable[[Sequence[Tensor]], None]
"""Sums tensors over all ranks, in place."""

Metrics: TypeAlias = dict[str, Any]
"""Metrics of one SAE as plain Python values, ready for JSON: numbers, and the histogram (:func:`scalars` drops it)."""

_SCALARS = 7
"""Sums that are single numbers; Σx and firing counts come behind them."""
DENSITY_EDGES = [-7.0 + 0.25 * i for i in range(29)]
"""Edges of the log10 density histogram, 1e-7 to 1; rarer latents count in the first bin."""


def divide(numerator: float, denominator: float) -> float:
    """numerator / denominator; NaN where there is nothing to divide by."""
    return numerator / denominator if denominator != 0 else math.nan


def l1_N(
    f_Nh: Float[Tensor, "N h"], scale: Tensor | float = 1.0, norm_h: Float[Tensor, " h"] | None = None
) -> Float[Tensor, " N"]:
    """Σ |f| ‖W_dec‖ per token, in raw units; `norm_h` None: decoder rows of norm 1."""
    return (f_Nh.abs().sum(-1) if norm_h is None else f_Nh.abs() @ norm_h) / scale


def squared_error_N(x_Nd: Float[Tensor, "N d"], x_hat_Nd: Float[Tensor, "N d"]) -> Float[Tensor, " N"]:
    """‖x − x̂‖² per token."""
    return (x_Nd - x_hat_Nd).square().sum(-1)


def cosine_N(x_Nd: Float[Tensor, "N d"], x_hat_Nd: Float[Tensor, "N d"]) -> Float[Tensor, " N"]:
    """Cosine of the angle between x and x̂ per token; 0 where one of them is 0."""
    return torch.nn.functional.cosine_similarity(x_Nd, x_hat_Nd, dim=-1, eps=1e-30)


def explained_variance(x_Nd: Float[Tensor, "N d"], x_hat_Nd: Float[Tensor, "N d"]) -> float:
    """1 − Σ‖x − x̂‖² / Σ‖x − mean(x)‖² of one whole set."""
    x_Nd, x_hat_Nd = x_Nd.double(), x_hat_Nd.double()
    error = float(squared_error_N(x_Nd, x_hat_Nd).sum())
    return 1 - divide(error, float(squared_error_N(x_Nd, x_Nd.mean(0)).sum()))


def density_histogram(fired_h: Num[Tensor, " h"], n_tokens: float) -> dict[str, list[float]]:
    """`edges` (log10) and `counts` of the alive latents' densities."""
    alive = fired_h[fired_h > 0].double()
    exponents = torch.log10(alive / n_tokens).clamp(DENSITY_EDGES[0], DENSITY_EDGES[-1])
    counts = torch.histogram(exponents.cpu(), bins=torch.tensor(DENSITY_EDGES, dtype=torch.float64)).hist
    return {"edges": DENSITY_EDGES, "counts": counts.tolist()}


def scalars(metrics: Mapping[str, object]) -> dict[str, float]:
    """The plain numbers among the metrics, as floats (what loggers and studies take)."""
    return {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}


class Accumulator:
    """Sums over batches. :meth:`update` never synchronises; :meth:`result` does, once.

    `sums` adds up: over ranks, sum it in place before :meth:`result`.
    """

    def __init__(
        self,
        d: int,
        h: int,
        *,
        scale: Tensor | float = 1.0,
        norm_h: Float[Tensor, " h"] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.d, self.h, self.scale, self.norm_h = d, h, scale, norm_h
        # n, l1, squared error, Σ‖x‖², cosine, ‖x̂‖, ‖x‖; then Σx (d) and firing counts (h): one tensor, one reduction
        self.sums = torch.zeros(_SCALARS + d + h, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(
        self,
        x_Nd: Float[Tensor, "N d"],
        x_hat_Nd: Float[Tensor, "N d"],
        f_Nh: Float[Tensor, "N h"],
        keep_N: Bool[Tensor, " N"] | None = None,
    ) -> None:
        """Add a batch: raw activations, raw reconstruction, code, and which tokens count (None: all)."""
        keep_N = torch.ones(len(x_Nd), dtype=torch.bool, device=x_Nd.device) if keep_N is None else keep_N.bool()
        # where, not a product: NaN in a masked row must not reach the sums
        keep_N1 = keep_N.unsqueeze(-1)
        x_Nd = torch.where(keep_N1, x_Nd, 0.0).double()
        x_hat_Nd = torch.where(keep_N1, x_hat_Nd, 0.0).double()
        x_norm_N, x_hat_norm_N = x_Nd.norm(dim=-1), x_hat_Nd.norm(dim=-1)
        rows = [
            keep_N.sum(),
            torch.where(keep_N, l1_N(f_Nh, self.scale, self.norm_h).double(), 0.0).sum(),
            squared_error_N(x_Nd, x_hat_Nd).sum(),
            x_norm_N.square().sum(),
            cosine_N(x_Nd, x_hat_Nd).sum(),
            x_hat_norm_N.sum(),
            x_norm_N.sum(),
        ]
        self.sums[:_SCALARS] += torch.stack([row.double() for row in rows])
        self.sums[_SCALARS : _SCALARS + self.d] += x_Nd.sum(0)
        self.sums[_SCALARS + self.d :] += ((f_Nh != 0) & keep_N1).sum(0)

    @property
    def fired_h(self) -> Float[Tensor, " h"]:
        """On how many tokens each latent fired."""
        return self.sums[_SCALARS + self.d :]

    def result(self) -> Metrics:
        """The metrics of everything added so far; NaN where nothing was."""
        sums = self.sums.cpu()
        n, l1, error, square, cosine, x_hat_norm, x_norm = sums[:_SCALARS].tolist()
        mean_d, fired_h = sums[_SCALARS : _SCALARS + self.d] / n, sums[_SCALARS + self.d :]
        offset = n * float(mean_d.square().sum())
        fvu = divide(error, square - offset)
        alive = int((fired_h > 0).sum())
        return {
            "l0": divide(float(fired_h.sum()), n),
            "l1": divide(l1, n),
            "mse": divide(error, n),
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "cosine": divide(cosine, n),
            "norm_ratio": divide(x_hat_norm, x_norm),
            "fraction_dead": 1 - alive / self.h if n else math.nan,
            "fraction_alive": alive / self.h if n else math.nan,
            "gamma": math.sqrt(divide(offset, square - offset)) if square > offset else math.nan,
            "n_tokens": int(n),
            "log10_density": density_histogram(fired_h, n),
        }
