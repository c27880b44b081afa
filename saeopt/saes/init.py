"""How every architecture starts: decoder directions, decoder bias, and an encoder of the right size.

Random numbers come from a CPU generator in float32 and are worked on there, so that the start does not depend
on the device. Shape suffixes: N tokens, d width read, e width written, h dictionary width.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from saeopt.saes.base import SAE

_MATCH_ROWS = 2048  # tokens on which the encoder's size is matched; more change c by less than a percent
_MATCH_TOLERANCE = 1e-4
ACTIVE_SHARE = 0.99
"""Of the variance: what `init: active_subspace` leaves out are directions with 1 % in all."""


@torch.no_grad()
def initialise(
    sae: SAE, x_Nd: Float[Tensor, "N d"], generator: torch.Generator, y_Ne: Float[Tensor, "N e"] | None = None
) -> None:
    """Decoder rows of norm 1, W_enc = c · W_decᵀ with mean ‖x̂‖ = mean ‖x‖, biases 0, b_dec as `bias_init` says.

    c is found through the architecture's own evaluation form, so that gates and k are accounted for. With
    `encoder_start: transpose` it is 1, or less where x̂ would be longer than x. What writes something else than it
    reads has random directions of norm 1 in W_enc, W_dec at 0 where that can be, and b_dec at the mean of y.

    Raises:
        ValueError: there is no token to start from.
    """
    if len(x_Nd) == 0:
        raise ValueError("no calibration token is left: every one was masked")
    x_Nd = x_Nd.to(sae.W_dec)
    y_Ne, config = x_Nd if y_Ne is None else y_Ne.to(sae.W_dec), sae.config
    directions_hd = directions(sae, x_Nd, generator)
    for parameter in sae.parameters():
        parameter.zero_()
    if not sae.transcodes:
        sae.W_dec.copy_(directions_hd)
    elif sae.unit_rows or not sae.zero_decoder:
        sae.W_dec.copy_(directions(sae, y_Ne, generator))
    mean = sae.transcodes and config.bias_init == "geometric_median"
    sae.b_dec.copy_(initial_bias(y_Ne, "mean" if mean else config.bias_init))
    sae.start_encoder(directions_hd.T, x_Nd)
    if not sae.transcodes:
        match_norm(sae, x_Nd, largest=1.0 if sae.encoder_start == "transpose" else math.inf)


def directions(sae: SAE, x_Nd: Float[Tensor, "N d"], generator: torch.Generator) -> Float[Tensor, "h d"]:
    """Initial rows of norm 1 as the config asks for them, in the units of x."""
    orthogonal = sae.config.init_decoder_orthogonal
    if sae.config.init != "active_subspace":
        return initial_decoder(sae.h, x_Nd.shape[-1], orthogonal, generator).to(sae.W_dec)
    basis_rd = active_subspace(x_Nd)
    rows_hr = initial_decoder(sae.h, len(basis_rd), orthogonal, generator)
    return (rows_hr.to(basis_rd) @ basis_rd).to(sae.W_dec)


def active_subspace(x_Nd: Float[Tensor, "N d"]) -> Float[Tensor, "r d"]:
    """Orthonormal rows: the fewest leading principal components that hold `ACTIVE_SHARE` of the variance.

    The idea is that of arXiv 2508.16929, the rule for their number ours. Where nothing varies: all of space.
    """
    centred_Nd = x_Nd.double() - x_Nd.double().mean(0)
    values_d, vectors_dd = torch.linalg.eigh(centred_Nd.T @ centred_Nd)
    values_d, vectors_dd = values_d.flip(0).clamp_min(0), vectors_dd.flip(1)
    if values_d[0] == 0:
        return torch.eye(len(values_d)).to(centred_Nd)
    shares_d = values_d.cumsum(0) / values_d.sum()
    rank = int((shares_d < ACTIVE_SHARE).sum()) + 1
    largest = vectors_dd.abs().argmax(0, keepdim=True)
    return (vectors_dd * vectors_dd.gather(0, largest).sign())[:, :rank].T  # LAPACK fixes no signs


_drawn: OrderedDict[tuple[object, ...], tuple[Tensor, Tensor]] = OrderedDict()
_DRAWN = 2
"""Initial decoders that are kept, each with the state in which it left its generator: trials of one seed and shape
start from the same, and an orthogonal one takes seconds. What writes something else than it reads draws two."""


def initial_decoder(h: int, d: int, orthogonal: bool, generator: torch.Generator) -> Float[Tensor, "h d"]:
    """Random unit rows; or orthonormal rows, or for h > d orthonormal columns whose rows are scaled to norm 1.

    The last ones are remembered until :func:`forget_decoders`.
    """
    key = (h, d, orthogonal, generator.get_state().numpy().tobytes())
    if key in _drawn:
        W_hd, after = _drawn[key]
        generator.set_state(after)
    else:
        W_hd = _draw(h, d, orthogonal, generator)
        _drawn[key] = W_hd, generator.get_state()
        if len(_drawn) > _DRAWN:
            _drawn.popitem(last=False)
    return W_hd.clone()


def forget_decoders() -> None:
    """Give their memory back."""
    _drawn.clear()


def _draw(h: int, d: int, orthogonal: bool, generator: torch.Generator) -> Tensor:
    W_hd = torch.randn(h, d, generator=generator)
    if orthogonal:
        tall = W_hd if h >= d else W_hd.T
        q, r = torch.linalg.qr(tall)
        q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)  # LAPACK fixes no signs: this makes the choice unique
        W_hd = q if h >= d else q.T
    return W_hd / W_hd.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def point(encoder_dh: Tensor, dead_n: Tensor, alive_h: Tensor, along_nd: Tensor, share: float) -> Tensor:
    """Set columns of a matrix that reads x to directions, as long as `share` of the living ones; that length."""
    length = share * encoder_dh[:, alive_h].norm(dim=0).mean().nan_to_num(1.0)
    encoder_dh[:, dead_n] = (along_nd * length).T
    return length


def initial_bias(x_Nd: Float[Tensor, "N d"], kind: str) -> Float[Tensor, " d"]:
    """Geometric median, mean or zero."""
    if kind == "zero":
        return torch.zeros_like(x_Nd[0])
    return geometric_median(x_Nd) if kind == "geometric_median" else x_Nd.double().mean(0).to(x_Nd.dtype)


def geometric_median(
    x_Nd: Float[Tensor, "N d"], tolerance: float = 1e-8, max_iterations: int = 500
) -> Float[Tensor, " d"]:
    """The point of least mean distance, by Weiszfeld's iteration in float64.

    Where an iterate meets a data point, the modification of Vardi & Zhang (2000) leaves it or stays.
    Stops when a move is shorter than `tolerance` times the mean distance.
    """
    points_Nd = x_Nd.double()
    median_d = points_Nd.mean(0)
    for _ in range(max_iterations):
        offset_Nd = points_Nd - median_d
        distance_N = offset_Nd.norm(dim=-1)
        spread = distance_N.mean()
        met_N = distance_N <= 1e-12 * spread
        weight_N = torch.where(met_N, 0.0, 1 / distance_N.clamp_min(1e-300))
        pull_d = weight_N @ offset_Nd
        share = (met_N.sum() / pull_d.norm().clamp_min(1e-300)).clamp(max=1.0)
        move_d = (1 - share) * pull_d / weight_N.sum().clamp_min(1e-300)
        median_d = median_d + move_d
        if move_d.norm() <= tolerance * spread:
            break
    return median_d.to(x_Nd.dtype)


def match_norm(sae: SAE, x_Nd: Float[Tensor, "N d"], largest: float = math.inf) -> None:
    """Scale W_enc by the c for which mean ‖x̂‖ = mean ‖x‖ (regula falsi), or by `largest`, whichever is less.

    Where ‖b_dec‖ alone exceeds mean ‖x‖ the distances from b_dec are matched. Where no c does it, W_enc stays.
    """
    rows_Nd = x_Nd[:: math.ceil(len(x_Nd) / _MATCH_ROWS)]
    target = rows_Nd.double().norm(dim=-1).mean().item()
    origin_d = torch.zeros_like(sae.b_dec)
    floor = sae.b_dec.double().norm().item()
    if floor >= target:
        origin_d, floor = sae.b_dec.clone(), 0.0
        target = (rows_Nd - origin_d).double().norm(dim=-1).mean().item()
    directions_dh = sae.W_enc.clone()

    def excess(c: float) -> float:
        sae.W_enc.copy_(directions_dh * c)
        x_hat_Nd = sae.reconstruct(sae.code(rows_Nd))
        return (x_hat_Nd - origin_d).double().norm(dim=-1).mean().item() - target

    c = _root(excess, floor - target, min(1.0, 2 * sae.d / sae.h), _MATCH_TOLERANCE * target) if target > 0 else 1.0
    sae.W_enc.copy_(directions_dh * min(c, largest))


def _root(function: Callable[[float], float], at_zero: float, guess: float, tolerance: float) -> float:
    """A zero of a function that is negative at 0 and grows; 1 where none is found."""
    low, f_low, high, f_high = 0.0, at_zero, guess, function(guess)
    for _ in range(30):
        if f_high >= 0:
            break
        low, f_low, high = high, f_high, 2 * high
        f_high = function(high)
    else:
        return 1.0
    middle = high
    for _ in range(60):
        middle = (low * f_high - high * f_low) / (f_high - f_low)
        value = function(middle)
        if abs(value) <= tolerance:
            break
        if value < 0:
            low, f_low, f_high = middle, value, f_high / 2  # Illinois: an end that stays loses half its weight
        else:
            high, f_high, f_low = middle, value, f_low / 2
    return middle
