"""Activations for benchmarks: noise, a generator whose latents fire as those of language models do, or a file.

Speed depends on them: a step that sorts or sums by latent has more to do where a few latents fire very often.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from saeopt.errors import UserError

KINDS = ("noise", "skewed")
_TOKENS = 2**17
_FREQUENT, _RARE = 256, 2**15
_ACTIVE = 24
_CHUNK = 8192


@dataclass(frozen=True)
class Activations:
    """Rows for every case; `d` is None where any width will do."""

    name: str
    rows_Nd: Tensor | None = None

    @classmethod
    def of(cls, name: str) -> Activations:
        """From `--data`: noise, skewed, or a safetensors file with `x` [N, d]."""
        if name in KINDS:
            return cls(name)
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(name).expanduser()
        try:
            x_Nd = load_file(path).get("x")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"--data {name}: must be noise, skewed or a safetensors file of activations: {error}"
            ) from None
        if x_Nd is None or x_Nd.ndim != 2 or not x_Nd.is_floating_point() or not len(x_Nd):
            raise UserError(f"--data {name}: the file must hold a tensor `x` of floating-point numbers [N, d]")
        if not torch.isfinite(x_Nd).all():
            raise UserError(f"--data {name}: `x` holds NaN or Inf")
        return cls(path.name, x_Nd)

    @property
    def d(self) -> int | None:
        """The width, where it is fixed."""
        return None if self.rows_Nd is None else self.rows_Nd.shape[1]

    def batches(self, d: int, batch: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """Batches [batch, d] in the order of the rows, at least three, with mean norm √d; they go round at the end."""
        n = max(3 * batch, min(_TOKENS, 32 * batch))
        if self.rows_Nd is not None:
            at = torch.arange(max(3, len(self.rows_Nd) // batch) * batch) % len(self.rows_Nd)
            x_Nd = self.rows_Nd[at].to(device, torch.float32)
        elif self.name == "noise":
            x_Nd = torch.randn(n, d, generator=torch.Generator(device).manual_seed(0), device=device)
        else:
            x_Nd = skewed(n, d, device)
        x_Nd *= d**0.5 / x_Nd.norm(dim=-1).mean()
        return list(x_Nd.to(dtype).split(batch))


def skewed(n: int, d: int, device: torch.device, seed: int = 0) -> Tensor:
    """A sparse mixture of directions whose rates fall as a power of their rank, around a mean, with some noise.

    Frequent directions (the first on every second token, the tenth on every seventh) are switched on one by one; of the
    others each token has a fixed number, drawn with Zipf weights. A topk SAE (k 64) that has trained on them for 800
    steps has latents that fire as unevenly as on real activations or more: the most frequent hundredth with 16 % of all
    firings at d 576, h 18432 and 41 % at d 768, h 24576 (SmolLM2-135M, layer 9, wikitext, d 576: 16 %).
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def directions(count: int) -> Tensor:
        rows = normal(count, d)
        return rows / rows.norm(dim=-1, keepdim=True)

    frequent_Fd, rare_Rd, mean_d = directions(_FREQUENT), directions(_RARE), directions(1)[0]
    rank_F = torch.arange(1, _FREQUENT + 1, device=device)
    rate_F = 0.5 / rank_F**0.55
    weight_R = 1 / torch.arange(1, _RARE + 1, device=device, dtype=torch.float32) ** 0.8
    parts = []
    for start in range(0, n, _CHUNK):
        rows = min(_CHUNK, n - start)
        on_NF = torch.rand(rows, _FREQUENT, generator=generator, device=device) < rate_F
        code_NF = on_NF * (0.5 + torch.empty_like(on_NF, dtype=torch.float32).exponential_(generator=generator))
        index = torch.multinomial(weight_R, rows * _ACTIVE, replacement=True, generator=generator).view(rows, _ACTIVE)
        value = 1.5 * (0.5 + torch.empty(rows, _ACTIVE, device=device).exponential_(generator=generator))
        x_Nd = code_NF @ frequent_Fd + torch.bmm(value.unsqueeze(1), rare_Rd[index]).squeeze(1)
        parts.append(x_Nd + 4 * mean_d + 0.5 / d**0.5 * normal(rows, d))
    return torch.cat(parts)
