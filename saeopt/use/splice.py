"""SAEs in place of a language model's activations, as a context manager."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from saeopt.config.sites import Site
from saeopt.errors import UserError
from saeopt.saes.base import SAE
from saeopt.use.hooked import Hooked
from saeopt.use.interventions import Intervention, Positions, amounts, check_positions, decoder_lengths, indices
from saeopt.use.place import Place, Settings

Given = SAE | Sequence[SAE] | Mapping[str, SAE | tuple[Site, SAE]]


class _Codes(dict[str, Tensor]):
    def __missing__(self, key: str) -> Tensor:
        there = ", ".join(self) or "none yet"
        raise UserError(f"latents: no code at '{key}': no forward pass has come there (there are: {there})")


class Spliced:
    """SAEs that stand in a model, and what is to be done to their codes. Made by :func:`splice`.

    Interventions hold for all forward passes until :meth:`clear`, and act in the order in which they were asked for.
    `positions` count from the beginning of the text, generated tokens included: `all`, `last` (of each forward pass),
    a number (from the end if negative), a slice, several numbers, or a bool tensor (samples, positions). Nothing
    happens at positions that the splice leaves out.
    """

    def __init__(self, model: nn.Module, places: Mapping[str, Place], latents: dict[str, Tensor]) -> None:
        self.model = model
        """The model that was given."""
        self.latents = latents
        """Key → the code (samples, positions, latents) that the last forward pass decoded, interventions included.

        In the units of `SAE.encode`, with its gradient; at all positions, also those that are left out.
        """
        self._places = places

    def steer(
        self,
        site: str,
        latents: int | Sequence[int] | Tensor,
        strength: float | Tensor,
        positions: Positions = "all",
    ) -> Spliced:
        """Add `strength` times each latent's decoder direction, of norm 1 in raw units.

        A strength is a length in the model's units. It may be a tensor that broadcasts to (samples, positions,
        latents named), and may have a gradient. Returns itself.
        """
        sae = self._at(site).sae
        chosen_n = indices(sae, latents)
        values = amounts(strength, len(chosen_n), "strength").to(sae.W_dec.device) / decoder_lengths(sae, chosen_n)
        return self._add(site, chosen_n, values, positions, adds=True)

    def set(
        self, site: str, latents: int | Sequence[int] | Tensor, value: float | Tensor, positions: Positions = "all"
    ) -> Spliced:
        """Put `value` (in the units of `SAE.encode`) in place of some latents. Returns itself."""
        chosen_n = indices(self._at(site).sae, latents)
        return self._add(site, chosen_n, amounts(value, len(chosen_n), "value"), positions, adds=False)

    def ablate(
        self,
        site: str,
        latents: int | Sequence[int] | Tensor,
        to: float | Tensor = 0.0,
        positions: Positions = "all",
    ) -> Spliced:
        """Set some latents to 0, or to their means: `to` may be one of :meth:`means`, a number per latent of the SAE.

        Returns itself.
        """
        sae = self._at(site).sae
        if isinstance(to, Tensor) and to.shape == (sae.h,):
            to = to[indices(sae, latents)]
        return self.set(site, latents, to, positions)

    def clear(self, site: str | None = None) -> Spliced:
        """Take interventions back, at one site or at all. Returns itself."""
        for place in self._places.values() if site is None else [self._at(site)]:
            place.interventions.clear()
        return self

    @torch.no_grad()
    def means(self, tokens: Tensor | Iterable[Tensor]) -> dict[str, Tensor]:
        """Key → mean code (latents) over all positions that are replaced, without interventions.

        `tokens`: a batch (samples, positions), or several. They run through the model as it is spliced.

        Raises:
            UserError: no position of them is replaced.
        """
        before = {key: list(place.interventions) for key, place in self._places.items()}
        sums = {key: torch.zeros(p.sae.h + 1, dtype=torch.float64) for key, p in self._places.items()}
        self.clear()
        try:
            for batch in [tokens] if isinstance(tokens, Tensor) else tokens:
                self.model(batch)
                for key, place in self._places.items():
                    f_Nh = self.latents[key][place.replaced_BT]
                    sums[key] = sums[key] + torch.cat([f_Nh.double().sum(0).cpu(), torch.tensor([len(f_Nh)])])
        finally:
            for key, place in self._places.items():
                place.interventions[:] = before[key]
        if empty := [key for key, total in sums.items() if not total[-1]]:
            raise UserError(f"means: no position of these tokens counts at '{empty[0]}'")
        return {key: (t[:-1] / t[-1]).to(self._places[key].sae.W_dec) for key, t in sums.items()}

    def _at(self, site: str) -> Place:
        if site not in self._places:
            raise UserError(f"no SAE is spliced in at '{site}': 'site' must be one of {', '.join(self._places)}")
        return self._places[site]

    def _add(self, site: str, latents_n: Tensor, values: Tensor, positions: Positions, *, adds: bool) -> Spliced:
        check_positions(positions)
        self._at(site).interventions.append(Intervention(latents_n, values, positions, adds))
        return self


@contextlib.contextmanager
def splice(
    model: nn.Module,
    saes: Given,
    *,
    use_error_term: bool = False,
    positions: Positions = "all",
    exclude_special_tokens: bool | Sequence[int] = True,
) -> Iterator[Spliced]:
    """Run a model with SAEs in place of its activations, as long as the `with` block lasts.

    Inside, every forward pass (`model(tokens)`, `run_with_cache`, `run_with_hooks`, `generate`, …) runs through
    the SAEs. Each brings its hook points along under sae-lens' names, behind the name of the hook point that it writes:
    `hook_sae_input`, `hook_sae_acts_pre`, `hook_sae_acts_post`, `hook_sae_recons`, `hook_sae_error`, `hook_sae_output`.
    Several SAEs act one after the other: a later one reads what an earlier one gave. Splices may be nested; at one
    hook point the inner one reads what the outer one gives. Hooks go when the block ends, also by an error.

    Args:
        model: a TransformerBridge (or HookedRootModule) of TransformerLens 4; it is changed only inside of the block.
        saes: what :func:`saeopt.load` gives; or one SAE or several of them; or `{key: (Site, SAE)}`.
        use_error_term: add what the SAE does not explain, so that nothing changes but by interventions.
        positions: where the SAEs act (see :class:`Spliced`).
        exclude_special_tokens: True: tokens that the run left out keep their own activations, as in training and in
            `saeopt evaluate`: BOS, EOS, padding, a separator that was named, the first positions and norm outliers
            where the run's config says so. False: none. Or the numbers of the tokens.

    Raises:
        UserError: a hook point that the model lacks; an SAE of a model with other `lm_processing`; a site that writes
            several hook points (a crosscoder); two SAEs that write the same.
    """
    check_positions(positions)
    hooked, latents = Hooked(model), _Codes()
    settings = Settings(use_error_term, positions, exclude_special_tokens)
    sites = _sites(saes, hooked)
    places = {site.key: Place(site, sae, hooked, settings, latents) for site, sae in sites}
    with contextlib.ExitStack() as stack:
        stack.enter_context(hooked.switched_on(hook for site, _ in sites for hook in site.hooks))
        stack.enter_context(hooked.watched())
        for part in ("writing", "reading"):  # what is read is read after it was replaced
            for place in places.values():
                stack.enter_context(getattr(place, part)())
        yield Spliced(model, places, latents)


def _sites(saes: Given, hooked: Hooked) -> list[tuple[Site, SAE]]:
    """The SAEs with their sites, checked against the model and against each other."""
    given: object = saes
    if isinstance(given, str) or not isinstance(given, SAE | Iterable):
        raise _no_sae(given)
    if isinstance(saes, Mapping):
        found = [_with_site(key, value) for key, value in saes.items()]
    else:
        found = [(_own_site(sae), sae) for sae in ([saes] if isinstance(saes, SAE) else saes)]
    if not found:
        raise UserError("splice: no SAE was given")
    writers: dict[int, str] = {}
    for site, sae in found:
        _check(site, sae, hooked)
        point = id(hooked.points[site.writes[0]])
        if point in writers:
            raise UserError(
                f"splice: '{writers[point]}' and '{site.key}' write the same hook point: splice one inside of the other"
            )
        writers[point] = site.key
    if len({site.key for site, _ in found}) < len(found):
        raise UserError("splice: two SAEs have the same key")
    return found


def _no_sae(value: object) -> UserError:
    return UserError(f"splice: '{value}' is no SAE: saeopt.load(FOLDER) gives those of a folder")


def _own_site(sae: SAE) -> Site:
    if not isinstance(sae, SAE):
        raise _no_sae(sae)
    if sae.origin is None:
        raise UserError("splice: this SAE does not know its hook point: give {'blocks.…': sae}")
    return sae.origin.site


def _with_site(key: str, value: SAE | tuple[Site, SAE]) -> tuple[Site, SAE]:
    """An SAE by its key: at the site given with it, at its own, or as an autoencoder at another hook point."""
    if isinstance(value, tuple):
        return replace(value[0], key=key), value[1]
    if not isinstance(value, SAE):
        raise _no_sae(value)
    if value.origin is not None and value.origin.site.key == key:
        return value.origin.site, value
    if value.widths is not None:
        raise UserError(f"splice: what '{key}' reads and writes is not known: give (saeopt.Site(…), sae)")
    return Site.of(key), value


def _check(site: Site, sae: SAE, hooked: Hooked) -> None:
    if len(site.writes) > 1:
        raise UserError(
            f"splice: '{site.key}' writes {len(site.writes)} hook points, and a splice writes one: a crosscoder's code"
            " is known only when the last of what it reads is; see SAE.encode on cached activations"
        )
    for hook in site.hooks:
        hooked.check(hook, site.key)
    config = None if sae.origin is None else sae.origin.config
    if config is None or config.data.activations is not None or hooked.processed is None:
        return
    if hooked.processed != (config.lm_processing == "compatibility"):
        now = "is processed" if hooked.processed else "is not: call enable_compatibility_mode() on it"
        raise UserError(
            f"splice: the SAE at '{site.key}' was trained with 'lm_processing: {config.lm_processing}', and this model"
            f" {now}"
        )
