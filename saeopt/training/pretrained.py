"""Members that start from saved SAEs: those of our runs, and those of other tools, in raw units."""

from __future__ import annotations

from pathlib import Path

from saeopt.config.places import site_and_place
from saeopt.console import log
from saeopt.errors import UserError
from saeopt.files import digest
from saeopt.imports.find import choose, find, is_foreign
from saeopt.imports.imported import Held, shape_of
from saeopt.imports.trees import is_hub
from saeopt.runs.weights import load_checkpoint
from saeopt.saes.base import SAE
from saeopt.training.pack import Member

FIELD = "'saes.pretrained_sae_paths'"


def load_pretrained(member: Member) -> bool:
    """Start from the SAE of the same site (or the only one) among `pretrained_sae_paths`.

    Whether the weights are another tool's: they read raw activations, and nothing normalises yet.

    Raises:
        UserError: no such SAE, or one of another architecture or shape.
    """
    own, foreign = _found(member)
    site, wanted = member.hook_point, [one for one in foreign if one.key == member.hook_point]
    if wanted or (not own and foreign):
        try:
            held = choose(wanted or foreign, site)
            if held.site is not None and held.site.one and held.key != site:
                log.warning("%s: is of %s, as its files say, and is taken for %s", held.path, held.key, site)
            weights, file = held.weights()
            weights.put_into(member.sae, held.path)
        except UserError as error:
            raise UserError(f"{FIELD}: {error}") from None
        member.begun_from = {"file": str(file.absolute()), "sha256": digest(file), "sae": held.key, "from": held.path}
        return True
    if site not in own and len(own) != 1:
        known = ", ".join(sorted([*own, *(one.key for one in foreign)])) or "none"
        raise UserError(f"{FIELD}: no SAE for {site} (found: {known})")
    key = site if site in own else next(iter(own))
    _take(member, key, *own[key])
    return False


def _found(member: Member) -> tuple[dict[str, tuple[SAE, Path]], list[Held]]:
    """Ours by site, and those of other tools; nothing of what is named for other sites."""
    own: dict[str, tuple[SAE, Path]] = {}
    foreign: list[Held] = []
    for text in member.config.saes.pretrained_sae_paths or []:
        site, place = site_and_place(text)
        if site not in (None, member.hook_point):
            continue
        try:
            if is_hub(place) or (Path(place).exists() and is_foreign(Path(place))):
                found = find(place)
                foreign += found if site is None else [choose(found, site).at(site)]
                continue
            loaded = load_checkpoint(place)
        except UserError as error:
            raise UserError(f"{FIELD}: {error}") from None
        own |= {hook: (sae, loaded.path) for hook, sae in loaded.saes.items()}
    return own, foreign


def _take(member: Member, key: str, sae: SAE, path: Path) -> None:
    """Weights and normalisation of one of ours."""
    own = member.sae
    if type(sae) is not type(own) or (sae.d, sae.h, sae.widths) != (own.d, own.h, own.widths):
        raise UserError(
            f"{path}: holds a {sae.config.sae_type} SAE with {shape_of(sae)}; "
            f"the config asks for {own.config.sae_type} with {shape_of(own)} at {member.hook_point}"
        )
    lost = [name for name, _ in sae.normalising() if not hasattr(own, name)]
    if lost:
        raise UserError(
            f"{path}: its activations are normalised with '{lost[0]}': set saes.normalize_activations:"
            f" {sae.normalisation} (the config has {own.normalisation})"
        )
    state = {name: tensor.to(own.W_enc.device) for name, tensor in sae.state_dict().items()}
    own.load_state_dict({name: state.get(name, tensor) for name, tensor in own.state_dict().items()})
    member.begun_from = {"file": str(path.absolute()), "sha256": digest(path), "sae": key}
    if own.unit_rows and own.config.retrain_saes and own.rescale_rows():
        log.warning("%s: its decoder rows are made 1 long (saes.decoder_norm: free keeps them)", path)


def put_in_its_units(member: Member) -> None:
    """Weights of another tool, once it is known what normalises: the same map, in the units that training works in.

    The code's units are arbitrary, and training's are those in which decoder rows are 1 long; where a k selects between
    latents of unequal length, that is left to `decoder_norm`.
    """
    sae = member.sae
    sae.unfold()
    length_h = sae.W_dec.norm(dim=-1)
    even = bool((length_h / length_h.mean() - 1).abs().max() < 1e-3)
    if sae.unit_rows or even or not sae.selected:
        changed = sae.rescale_rows()
        if changed and sae.selected and not even:
            log.warning(
                "%s: rows of the decoder are made 1 long, so that k selects otherwise (saes.decoder_norm: free)",
                member.begun_from["from"] if member.begun_from else member.hook_point,
            )
