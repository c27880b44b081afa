"""Gate noise without a running state: a function of member seed, sample sample, token and latent."""

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
    seed: int, first_sample: int, n_samples: int, tokens_per_sample: int, h: int, device: torch.device | str = "cpu"
) -> Tensor:
    """u_Nh in [1e-6, 1 − 1e-6], float32, for N = n_samples · tokens_per_sample tokens.

    The generator is reseeded per sample, so that batch sizes and ranks do not matter. Values differ between
    the CPU and a GPU, where they are :func:`hashed_uniform`.
    """
    if torch.device(device).type == "cuda":
        # filled on the device: a copy from the host would synchronise
        seeds = torch.full((1,), seed, dtype=torch.int64, device=device)
        first = torch.full((), first_sample, dtype=torch.int64, device=device)
        return hashed_uniform(row_keys(seeds, first, n_samples, tokens_per_sample), h)[0]
    u_Nh = torch.empty(n_samples * tokens_per_sample, h, device=device)
    generator = torch.Generator(device=u_Nh.device)
    for sample in range(n_samples):
        generator.manual_seed(derived_seed("noise", seed, first_sample + sample))
        rows = u_Nh[sample * tokens_per_sample : (sample + 1) * tokens_per_sample]
        rows.uniform_(generator=generator)
    return u_Nh.clamp_(TINY, 1 - TINY)


# ---- counter-based noise: elementwise, so that it can be computed inside a kernel and inside a CUDA graph
def _mix64(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014); int64 products wrap."""
    z = (z ^ ((z >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & (2**33 - 1))


def _mix32(z: Tensor) -> Tensor:
    """The finaliser of murmur3; int32 products wrap."""
    z = (z ^ ((z >> 16) & 0xFFFF)) * -0x7A143595
    z = (z ^ ((z >> 13) & 0x7FFFF)) * -0x3D4D51CB
    return z ^ ((z >> 16) & 0xFFFF)


def row_keys(seed_M: Tensor, first_sample: Tensor, n_samples: int, tokens_per_sample: int) -> Tensor:
    """Two 32-bit keys per member and token, (2, M, N), from int64 seeds and the global number of the first sample."""
    rows_N = torch.arange(n_samples * tokens_per_sample, device=seed_M.device)
    sample_N = first_sample.to(torch.int64) + torch.div(rows_N, tokens_per_sample, rounding_mode="floor")
    token_N = rows_N % tokens_per_sample
    by_sample_MN = _mix64(_mix64(seed_M.to(torch.int64)).unsqueeze(1) + sample_N * -0x61C8864680B583EB)
    key_MN = _mix64(by_sample_MN + token_N * -0x61C8864680B583EB)
    return torch.stack([key_MN.to(torch.int32), (key_MN >> 32).to(torch.int32)])


def hashed_uniform(keys_2MN: Tensor, h: int) -> Tensor:
    """u_MNh of the latents 0 … h − 1, float32 in [1e-6, 1 − 1e-6]: two rounds of a 32-bit hash."""
    latent_h = torch.arange(h, device=keys_2MN.device, dtype=torch.int32)
    # xor, not a product with the latent's number: torch.compile folds that into an index beyond 32 bits
    mixed_MNh = _mix32(latent_h ^ keys_2MN[0].unsqueeze(-1))
    bits_MNh = (_mix32(mixed_MNh ^ keys_2MN[1].unsqueeze(-1)) >> 8) & 0xFFFFFF
    return ((bits_MNh.to(torch.float32) + 0.5) * 2.0**-24).clamp(TINY, 1 - TINY)
