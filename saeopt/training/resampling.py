"""New directions for dead latents, between two windows (Bricken et al. 2023, "Neuron resampling").

Shape suffixes: N tokens, d width read, e width written, h dictionary width, n dead latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saeopt.saes.base import SAE
from saeopt.saes.noise import derived_seed
from saeopt.training.ranks import Axis
from saeopt.training.step.contract import Example, Store

Seed = tuple[int | str, ...]
"""Names and numbers from which what is drawn follows."""
OPENS_AT = 0.5
"""A new latent fires where the input's part along its direction is above this share of its own input's."""
MOST_OPEN = 5
"""So many new latents may fire on a token at once. Each begins with a fifth of its own input (`SAE.restart_share`), so
that together they give no more than that. Without a limit thousands may look along the few directions of the largest
activations."""
MOST_TOKENS, _AT_ONCE = 8192, 64
"""Of a micro-batch, the first so many are looked at; and candidates that are judged together."""
LAST_SHARE = 0.8
"""Nothing is resampled behind this share of a run: it could not be learned any more."""


def is_due(every_tokens: int, before: int, after: int, total: int, tokens_per_sample: int) -> bool:
    """Whether a multiple of `every_tokens` was passed from sample `before` to `after`."""
    if every_tokens == 0 or after > LAST_SHARE * total:
        return False
    return after * tokens_per_sample // every_tokens > before * tokens_per_sample // every_tokens


@torch.no_grad()
def resample(
    sae: SAE, state: Store, example: Example, dead_after: int, seed: tuple[int | str, ...], ranks: Axis
) -> int:
    """Point dead latents at inputs that are badly reconstructed; how many of them (waits for the device).

    The inputs are kept tokens of the first rank's example, drawn one after the other with probability ∝ ‖ŷ − y‖⁴, but
    none that would open more than `MOST_OPEN` new latents on a token. Those that were silent for longest come first;
    who is left waits for the next time. A new decoder row is the token's direction from b_dec, of length 1; its
    encoder column is the same direction in x and its bias what :meth:`SAE.restart` makes of them; its Adam moments
    (`state` holds views) and its silence are 0.
    """
    dead_n = (sae.tokens_since_fired >= dead_after).nonzero().squeeze(-1)
    if len(dead_n) == 0:
        return 0
    x_nd, y_ne, count = _badly_reconstructed(sae, example, len(dead_n), seed)
    ranks.broadcast([x_nd, y_ne, count])
    n = int(count)
    longest_n = sae.tokens_since_fired[dead_n].argsort(descending=True, stable=True)
    dead_n, x_nd, y_ne = dead_n[longest_n[:n]], x_nd[:n], y_ne[:n]
    alive_h = torch.ones(sae.h, dtype=torch.bool, device=dead_n.device)
    alive_h[dead_n] = False
    for name in sae.latent_vectors:
        sae.get_parameter(name)[dead_n] = 0.0
    sae.W_dec[dead_n] = _unit(y_ne - sae.b_dec)
    centred_nd = sae.centred(x_nd)
    sae.restart(dead_n, alive_h, _unit(centred_nd), OPENS_AT * centred_nd.norm(dim=-1))
    for name, parameter in sae.named_parameters():
        for kind in ("m", "v"):
            moments = state[f"{kind}.{name}"]
            if name == "W_dec" or name in sae.latent_vectors:
                moments[dead_n] = 0.0
            elif any(parameter is encoder for encoder in sae.encoders()):
                moments[:, dead_n] = 0.0
    sae.tokens_since_fired[dead_n] = 0
    return len(dead_n)


def _badly_reconstructed(sae: SAE, example: Example, n: int, seed: Seed) -> tuple[Tensor, Tensor, Tensor]:
    """Up to n normalised inputs, what was to be given for them (n rows each, the rest of them 0), and how many."""
    dtype = sae.W_enc.dtype
    x_Nd = example.x_Nd[:MOST_TOKENS].to(dtype) * sae.read_scale
    y_Ne = x_Nd if example.y_Ne is example.x_Nd else example.y_Ne[:MOST_TOKENS].to(dtype) * sae.write_scale
    loss_N = (sae.reconstruct(sae.code(x_Nd)) - y_Ne).double().square().sum(-1)
    if example.keep_N is not None:
        loss_N = loss_N * example.keep_N[:MOST_TOKENS]
    odds_N = loss_N.square().cpu()
    if not bool(odds_N.isfinite().all()) or not bool(odds_N.any()):
        odds_N = torch.ones_like(odds_N)
    generator = torch.Generator().manual_seed(derived_seed("resampling", *seed))
    order_N = torch.multinomial(odds_N, int(odds_N.count_nonzero()), generator=generator).to(x_Nd.device)
    chosen_m = _apart(sae.centred(x_Nd)[order_N], n)
    found = (torch.zeros(n, v_Nd.shape[1], dtype=dtype, device=v_Nd.device) for v_Nd in (x_Nd, y_Ne))
    x_nd, y_ne = found
    x_nd[: len(chosen_m)], y_ne[: len(chosen_m)] = x_Nd[order_N[chosen_m]], y_Ne[order_N[chosen_m]]
    return x_nd, y_ne, torch.tensor(len(chosen_m), device=x_Nd.device)


def _apart(centred_Nd: Tensor, n: int) -> Tensor:
    """Places of the first n inputs, in their order, of whose latents no input opens more than `MOST_OPEN`.

    Among `_AT_ONCE` candidates also those count that are not taken.
    """
    taken_N = torch.zeros(len(centred_Nd), device=centred_Nd.device)
    length_N, directions_Nd = centred_Nd.norm(dim=-1), _unit(centred_Nd)
    chosen: list[Tensor] = []
    for first in range(0, len(centred_Nd), _AT_ONCE):
        block = slice(first, first + _AT_ONCE)
        open_Nb = (centred_Nd @ directions_Nd[block].T > OPENS_AT * length_N[block]).to(taken_N)
        most_b = ((taken_N.unsqueeze(-1) + open_Nb.cumsum(-1)) * open_Nb).amax(0)
        good_b = (most_b <= MOST_OPEN) & (length_N[block] > 0)
        taken_N += open_Nb @ good_b.to(taken_N)
        chosen.append(good_b.nonzero().squeeze(-1) + first)
        if sum(map(len, chosen)) >= n:
            break
    return torch.cat(chosen)[:n]


def _unit(rows_nd: Tensor) -> Tensor:
    return rows_nd / rows_nd.norm(dim=-1, keepdim=True).clamp_min(1e-12)
