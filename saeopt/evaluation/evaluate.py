"""Evaluate any number of SAEs on held-out tokens: the language model runs once per batch for all of them.

Shape suffixes: B samples, T positions, N = B·T tokens, d width read, e width written, h dictionary width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saeopt.activations.masks import keep_mask, side_by_side
from saeopt.config.run import Ablation, DataConfig
from saeopt.config.sites import Site
from saeopt.evaluation.agreement import MOST_MATCHED, agreement
from saeopt.evaluation.cross_entropy import CrossEntropy, pass_sums, samples_at_once, splicer
from saeopt.evaluation.decoder import Projections, some_positions
from saeopt.evaluation.metrics import Accumulator, Metrics, Reduce, scalars
from saeopt.runs.names import SEEDS
from saeopt.saes.base import SAE
from saeopt.spread import over_seeds

CODE_BYTES = {"cpu": 2**26, "cuda": 2**30}
"""Memory for the code of one block of tokens."""

Key = TypeVar("Key")
Keep = Callable[[Tensor, Tensor], Tensor]
"""(tokens_BT, x_BTd of a site's hook points) → which positions count, bool (B, T)."""


class SplicingModel(Protocol):
    """What evaluation needs of a language model."""

    special_ids: set[int]

    def activations(self, tokens_BT: Tensor, hooks: Sequence[str]) -> Mapping[str, Tensor]:
        """x_BTd of each hook point."""

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V)."""

    def spliced_logits(self, tokens_BT: Tensor, splices: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
        """Logits with the activations of some hook points, all at once, replaced by a function of them each."""


@dataclass
class _Member:
    site: Site
    sae: SAE
    sums: Accumulator
    projections: Projections
    cross_entropy: CrossEntropy

    @property
    def place(self) -> tuple[Site, float]:
        """What says which tokens count: the site and its limit for outliers."""
        return self.site, self.sae.norm_limit

    @property
    def all_sums(self) -> tuple[Tensor, ...]:
        """What ranks add up."""
        return self.sums.sums, self.projections.sums, self.cross_entropy.sums


@torch.no_grad()
def reconstruct(
    sae: SAE,
    x_Nd: Float[Tensor, "N d"],
    keep_N: Bool[Tensor, " N"] | None = None,
    sums: Accumulator | None = None,
    y_Ne: Float[Tensor, "N e"] | None = None,
) -> Float[Tensor, "N e"]:
    """ŷ from raw activations in raw units, block by block; adds to `sums` on the way. `y_Ne` None: y is x."""
    out = []
    block = max(1, CODE_BYTES.get(x_Nd.device.type, 2**26) // (4 * sae.h))
    for start in range(0, len(x_Nd), block):
        x_bd = x_Nd[start : start + block].to(sae.W_enc.dtype)
        f_bh = sae.encode(x_bd)
        x_hat_bd = sae.decode(f_bh)
        out.append(x_hat_bd)
        if sums is not None:
            y_be = x_bd if y_Ne is None else y_Ne[start : start + block].to(x_bd.dtype)
            sums.update(y_be, x_hat_bd, f_bh, None if keep_N is None else keep_N[start : start + block])
    return torch.cat(out)


def keep_rule(lm: SplicingModel, data: DataConfig | None, norm_limit: float) -> Keep:
    """Which positions count in a run: the rule of training, special tokens and norm outliers left out."""

    def keep(tokens_BT: Tensor, x_BTd: Tensor) -> Tensor:
        keep_N = keep_mask(tokens_BT, lm.special_ids, data, x_BTd.flatten(0, 1), norm_limit)
        return keep_N.view(tokens_BT.shape)

    return keep


@torch.no_grad()
def evaluate(
    saes: Mapping[Key, SAE | tuple[str | Site, SAE | Mapping[int, SAE]]],
    lm: SplicingModel,
    tokens: Iterable[Int[Tensor, "B T"]],
    *,
    data: DataConfig | None = None,
    keep: Keep | None = None,
    cross_entropy: bool = True,
    ce_ablation: Ablation = "unmasked",
    device: torch.device | str | None = None,
    reduce: Reduce | None = None,
    progress: Callable[[int], None] | None = None,
    most_matched: int | None = MOST_MATCHED,
) -> dict[Key, Metrics]:
    """Metrics of every SAE over all batches, as plain Python numbers.

    `saes` maps a hook point to its SAE, or any key to (site or hook point, SAE); several may share one. In place of an
    SAE may stand several seeds of one, {seed: SAE}: their row is made by :func:`over_seeds`, says how far they agree
    (:func:`agreement`, which gets `most_matched`), and holds theirs in `seeds`. Everything is measured against what
    the site is to give, its cross-entropies with all that it writes replaced, or zeroed, at once.
    Which positions count follows from `data`, or is said by `keep`. With several ranks each gives its own tokens, and
    `reduce` sums tensors over them in place; all ranks name the SAEs in one order. `progress` counts their samples.
    """
    if not saes:
        return {}
    seeds = {key: _members(key, value) for key, value in saes.items()}
    members = [member for of_key in seeds.values() for member in of_key.values()]
    device = torch.device(device or members[0].sae.W_enc.device)
    hooks = list(dict.fromkeys(hook for member in members for hook in member.site.hooks))
    places = list(dict.fromkeys(member.place for member in members))
    rules = {place: keep or keep_rule(lm, data, place[1]) for place in places}
    rows = 1  # samples whose logits are held at once; more from when the size of the vocabulary is known
    for batch in tokens:
        tokens_BT = batch.to(device)
        x = lm.activations(tokens_BT, hooks)
        kept = {place: rules[place](tokens_BT, side_by_side(x, place[0].hooks)) for place in places}
        rows = rows if cross_entropy else max(1, len(batch))
        start = 0
        while start < len(batch):
            part = slice(start, start + rows)
            start += rows
            clean_BTV = lm.logits(tokens_BT[part]) if cross_entropy else None
            for place in places:
                here = [member for member in members if member.place == place]
                x_here = {hook: x[hook][part] for hook in place[0].hooks}
                _evaluate_site(here, lm, tokens_BT[part], x_here, kept[place][part], clean_BTV, ce_ablation)
            if clean_BTV is not None:
                rows = samples_at_once(tokens_BT.shape[1], clean_BTV.shape[-1], device)
        if progress is not None:
            progress(len(batch))
    if reduce is not None:
        reduce([sums for member in members for sums in member.all_sums])
    return {key: _row(of_key, cross_entropy, most_matched) for key, of_key in seeds.items()}


def _members(key: object, value: SAE | tuple[str | Site, SAE | Mapping[int, SAE]]) -> dict[int, _Member]:
    site, given = value if isinstance(value, tuple) else (str(key), value)
    return {seed: _member(site, sae) for seed, sae in ({0: given} if isinstance(given, SAE) else given).items()}


def _member(site: str | Site, sae: SAE) -> _Member:
    device, W_dec, scale = sae.W_enc.device, sae.W_dec.detach(), sae.scale
    if sae.widths is not None or sae.whitens:
        W_dec, scale = sae.raw_rows(W_dec), sae.ones()
    sums = Accumulator(sae.e, sae.h, scale=scale, norm_h=W_dec.norm(dim=-1), device=device)
    site = Site.of(site) if isinstance(site, str) else site
    return _Member(site, sae, sums, Projections(sae), CrossEntropy(device))


def _evaluate_site(
    members: list[_Member],
    lm: SplicingModel,
    tokens_BT: Tensor,
    x: Mapping[str, Tensor],
    keep_BT: Tensor,
    clean_BTV: Tensor | None,
    ce_ablation: Ablation,
) -> None:
    site, keep_N = members[0].site, keep_BT.flatten()
    x_Nd = side_by_side(x, site.reads).flatten(0, 1)
    y_Ne = None if site.reads == site.writes else side_by_side(x, site.writes).flatten(0, 1)
    if clean_BTV is not None:
        clean = pass_sums(clean_BTV, clean_BTV, tokens_BT, keep_BT, with_kl=False)
        zeroed_BT = keep_BT if ce_ablation == "unmasked" else torch.ones_like(keep_BT)
        zeroed_BTV = lm.spliced_logits(tokens_BT, dict.fromkeys(site.writes, splicer(None, zeroed_BT)))
        zero = pass_sums(clean_BTV, zeroed_BTV, tokens_BT, keep_BT, with_kl=False)
        del zeroed_BTV
    projected_N = keep_N & some_positions(keep_BT.shape, keep_N.device).flatten()
    some_Me = (x_Nd if y_Ne is None else y_Ne)[projected_N]
    for member in members:
        member.projections.update(some_Me)
        y_hat_BTe = reconstruct(member.sae, x_Nd, keep_N, member.sums, y_Ne).unflatten(0, keep_BT.shape)
        if clean_BTV is not None:
            parts = y_hat_BTe.split([x[hook].shape[-1] for hook in site.writes], dim=-1)
            splices = {hook: splicer(part, keep_BT) for hook, part in zip(site.writes, parts, strict=True)}
            spliced_BTV = lm.spliced_logits(tokens_BT, splices)
            sums = pass_sums(clean_BTV, spliced_BTV, tokens_BT, keep_BT, with_kl=True)
            member.cross_entropy.update(clean, zero, sums, keep_BT)


def _row(seeds: Mapping[int, _Member], cross_entropy: bool, most_matched: int | None) -> Metrics:
    rows = {seed: _result(member, cross_entropy) for seed, member in seeds.items()}
    found, members = over_seeds(list(rows.values())), list(seeds.values())
    if len(members) == 1:
        return found
    decoders, fired = [m.projections.rows_he for m in members], [m.sums.fired_h for m in members]
    signed = getattr(members[0].sae.config, "magnitude_activation", "relu") != "identity"  # else codes may be negative
    alike = agreement(decoders, fired, signed=signed, most=most_matched)
    return {**found, **alike, SEEDS: {str(seed): scalars(row) for seed, row in rows.items()}}


def _result(member: _Member, cross_entropy: bool) -> Metrics:
    metrics = {**member.sums.result(), **member.projections.result()}
    return {**metrics, **member.cross_entropy.result()} if cross_entropy else metrics
