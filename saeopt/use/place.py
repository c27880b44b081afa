"""One SAE at its site in a running model.

Shape suffixes: B samples, T positions, d width read, e width written, h latents.

    f     = encode(x)                    the code, then changed by interventions
    ŷ     = decode(f)
    out   = ŷ                            without the error term
    out   = y + (ŷ − ŷ₀) + (ε − ε₀)      with it, ε₀ = y − ŷ₀ and ŷ₀ from the code before anything was changed

The second form is ŷ + ε, written so that out is y bit for bit where nothing was changed. Gradients flow through ŷ, and
through ε only where a user's hook at `hook_sae_error` brings them in: ε is a constant, as in sae-lens (and in Marks et
al. 2024, arXiv 2403.19647). Positions that are left out keep y.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from saeopt.activations.masks import keep_mask, side_by_side
from saeopt.activations.separators import separator_token
from saeopt.config.run import DataConfig
from saeopt.config.sites import Site
from saeopt.errors import UserError
from saeopt.saes.base import SAE
from saeopt.use.hooked import Hooked
from saeopt.use.interventions import Intervention, Positions, chosen

POINTS = (
    "hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons", "hook_sae_error", "hook_sae_output",
)  # fmt: skip
"""sae-lens' names, behind that of the hook point that is written: `blocks.2.hook_resid_pre.hook_sae_acts_post`."""


@dataclass(frozen=True)
class Settings:
    """What a splice was asked for."""

    use_error_term: bool
    positions: Positions
    exclude_special_tokens: bool | Sequence[int]


class Place:
    """An SAE that reads and writes hook points of a model."""

    def __init__(self, site: Site, sae: SAE, hooked: Hooked, settings: Settings, codes: MutableMapping[str, Tensor]):
        """`codes` gets the code of each forward pass under the site's key."""
        self.site, self.sae, self.hooked, self.settings, self.codes = site, sae, hooked, settings, codes
        self.interventions: list[Intervention] = []
        self.replaced_BT = torch.zeros(0, 0, dtype=torch.bool)
        """Where the last forward pass was changed."""
        (self.written,) = site.writes
        self.points = {name: HookPoint() for name in POINTS}
        for name, point in self.points.items():
            point.name = f"{self.written}.{name}"
        self._read: dict[str, Tensor] = {}
        config = None if sae.origin is None else sae.origin.config
        self._data = None if config is None else config.data
        self._special = self._special_ids()

    def _special_ids(self) -> set[int]:
        """Tokens at which nothing is replaced."""
        asked = self.settings.exclude_special_tokens
        if not isinstance(asked, bool):
            return {int(token) for token in asked}
        if not asked:
            return set()
        known = self.hooked.special_ids
        if known is None:
            raise UserError(
                "splice: the model has no tokenizer that says which tokens are special: give their numbers,"
                " exclude_special_tokens=[…], or exclude_special_tokens=False"
            )
        named = set() if self._data is None else separator_token(self._data.separator, self.hooked.tokenizer)
        return known | named

    # ---- hooks
    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """The SAE in place, and its hook points among the model's."""
        listed = {f"{hook}.{name}": p for hook in self.hooked.names(self.written) for name, p in self.points.items()}
        with self.hooked.listed(listed), self.hooked.hooked(self.written, self._replace):
            yield
        self._read.clear()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """What other hook points give is kept until it is needed."""

        with contextlib.ExitStack() as stack:
            for hook in self.site.reads:
                if hook != self.written:
                    stack.enter_context(self.hooked.hooked(hook, partial(self._keep, hook)))
            yield

    def _keep(self, name: str, x: Tensor, hook: HookPoint) -> None:
        self._read[name] = x.flatten(2)

    def _replace(self, y: Tensor, hook: HookPoint) -> Tensor:
        if y.ndim < 3:
            raise UserError(f"splice: '{self.written}' does not give one vector per token")
        y_BTe = y.flatten(2)
        x_BTd = self._inputs(y_BTe)
        out_BTe = self._output(x_BTd, y_BTe)
        out_BTe = torch.where(self.replaced_BT.unsqueeze(-1), out_BTe.to(y.dtype), y_BTe)
        found: Tensor = self.points["hook_sae_output"](out_BTe.reshape(y.shape))
        return found

    def _inputs(self, y_BTe: Tensor) -> Tensor:
        read = {**self._read, self.written: y_BTe}
        self._read.clear()
        if late := [hook for hook in self.site.reads if hook not in read]:
            raise UserError(
                f"splice: '{self.site.key}' reads '{late[0]}', and the model comes to '{self.written}', which it"
                " writes, before"
            )
        x_BTd = side_by_side(read, self.site.reads)
        for given, width, verb in ((x_BTd, self.sae.d, "reads"), (y_BTe, self.sae.e, "writes")):
            if given.shape[-1] != width:
                raise UserError(
                    f"splice: the SAE at '{self.site.key}' {verb} {width} numbers per token, and this model gives"
                    f" {given.shape[-1]}: it is not the model that the SAE was trained on"
                )
        if x_BTd.device != self.sae.W_dec.device:
            raise UserError(
                f"splice: the SAE at '{self.site.key}' is on {self.sae.W_dec.device}, the model on {x_BTd.device}:"
                f" saeopt.load(…, device='{x_BTd.device}')"
            )
        self.replaced_BT = self._replaced(side_by_side(read, self.site.hooks))
        return x_BTd

    def _replaced(self, x_BTd: Tensor) -> Tensor:
        """Where the SAE acts: the positions asked for, without tokens that are left out."""
        shape, past = (x_BTd.shape[0], x_BTd.shape[1]), self.hooked.past
        at_BT = chosen(self.settings.positions, shape, past, x_BTd.device)
        asked = self.settings.exclude_special_tokens
        if asked is False:
            return at_BT
        tokens_BT = self.hooked.tokens_BT
        if tokens_BT is None or tokens_BT.shape != shape:
            raise UserError(
                "splice: this forward pass was given no tokens, so that special ones cannot be left out:"
                " exclude_special_tokens=False"
            )
        data = self._data_of(past) if asked is True else None
        keep_N = keep_mask(tokens_BT, self._special, data, x_BTd.flatten(0, 1), self.sae.norm_limit)
        return at_BT & keep_N.view(shape)

    def _data_of(self, past: int) -> DataConfig | None:
        """The rules of the run's data: with a cache a forward pass does not begin at the first position."""
        if self._data is None or not past:
            return self._data
        return self._data.model_copy(update={"skip_first_positions": max(0, self._data.skip_first_positions - past)})

    # ---- numbers
    def _output(self, x_BTd: Tensor, y_BTe: Tensor) -> Tensor:
        points, sae = self.points, self.sae
        untouched = not self.interventions and not any(point.fwd_hooks for point in points.values())
        with self._looked_into():
            f_BTh = sae.encode(points["hook_sae_input"](x_BTd.to(sae.W_enc.dtype)))
        for intervention in self.interventions:
            f_BTh = intervention.apply(f_BTh, self.hooked.past)
        f_BTh = points["hook_sae_acts_post"](f_BTh)
        self.codes[self.site.key] = f_BTh
        y_hat_BTe: Tensor = points["hook_sae_recons"](sae.decode(f_BTh))
        if not self.settings.use_error_term:
            return y_hat_BTe
        with torch.no_grad():
            first_BTe = y_hat_BTe if untouched else sae(x_BTd.to(sae.W_enc.dtype))
            error_BTe = (y_BTe - first_BTe) * self.replaced_BT.unsqueeze(-1)
        seen_BTe = points["hook_sae_error"](error_BTe)
        return y_BTe.detach() + (y_hat_BTe - first_BTe.detach()) + (seen_BTe - error_BTe)

    @contextlib.contextmanager
    def _looked_into(self) -> Iterator[None]:
        """`hook_sae_acts_pre` sees, and may change, what the activation function gets."""
        self.sae.__dict__["before_activation"] = self.points["hook_sae_acts_pre"]
        try:
            yield
        finally:
            del self.sae.__dict__["before_activation"]
