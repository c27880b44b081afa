"""Gate noise without a running state: a function of member seed, sample slot, token and latent."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

TINY = 1e-6


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from names and numbers; separate streams never share a generator."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def uniform(
    seed: int, first_slot: int, n_slots: int, tokens_per_slot: int, h: int, device: torch.device | str = "cpu"
) -> Tensor:
    """u_Nh in [1e-6, 1 − 1e-6], float32, for N = n_slots · tokens_per_slot tokens.

    The generator is reseeded per slot, so that batch sizes and ranks do not matter. Values differ between
    the CPU and a GPU.
    """
    u_Nh = torch.empty(n_slots * tokens_per_slot, h, device=device)
    generator = torch.Generator(device=u_Nh.device)
    for slot in range(n_slots):
        generator.manual_seed(derived_seed("noise", seed, first_slot + slot))
        rows = u_Nh[slot * tokens_per_slot : (slot + 1) * tokens_per_slot]
        rows.uniform_(generator=generator)
    return u_Nh.clamp_(TINY, 1 - TINY)
