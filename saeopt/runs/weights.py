"""Weights files: `samples_<N>.safetensors` with keys `<hook point>/<tensor>` and the run's config in the metadata.

Importing this module imports no torch, so that looking for checkpoints stays cheap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeopt.config import RunConfig, stored, validate_run
from saeopt.config.places import as_typed
from saeopt.config.roles import REPORTING
from saeopt.console import log
from saeopt.errors import UserError
from saeopt.runs.folder import RunFolder
from saeopt.runs.names import weights_path
from saeopt.runs.tensor_file import CorruptCheckpoint, MissingFile, by_site, read_metadata, read_tensors, write_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from saeopt.saes.base import SAE, Widths


@dataclass(frozen=True)
class Checkpoint:
    """What a weights file holds."""

    path: Path
    samples: int
    config: RunConfig
    saes: dict[str, SAE]


def list_checkpoints(run_dir: str | Path) -> list[tuple[int, Path]]:
    """(samples, path) of every weights file in a run folder, newest first."""
    return [(samples, weights_path(run_dir, samples)) for samples in RunFolder(Path(run_dir)).weights()]


def save_weights(path: str | Path, config: RunConfig, saes: Mapping[str, SAE], samples: int) -> None:
    """Write the SAEs of one run, by their sites' keys, atomically."""
    described = {
        "config": as_typed(config.model_dump(mode="json", exclude=set(REPORTING) - {"as_typed"})),
        "samples": samples,
        "hook_points": {hook: _description(sae, config) for hook, sae in saes.items()},
    }
    tensors = {f"{hook}/{name}": t for hook, sae in saes.items() for name, t in sae.state_dict().items()}
    write_tensors(Path(path), tensors, described)


def _description(sae: SAE, config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = {"d": sae.d, "h": sae.h, "sae_type": config.saes.sae_type}
    if sae.widths is not None:
        found["widths"] = sae.widths._asdict()
    return found if sae.norm_limit == math.inf else {**found, "norm_limit": sae.norm_limit}


def load_weights(path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """The SAEs of one weights file, with the config that they were trained under.

    Raises :class:`CorruptCheckpoint` when the file is damaged and :class:`UserError` when it is absent.
    """
    tensors = read_tensors(Path(path), device)
    described: Any = read_metadata(Path(path))
    try:
        config_raw, samples, hook_points = described["config"], int(described["samples"]), described["hook_points"]
    except (KeyError, TypeError, ValueError):
        raise CorruptCheckpoint(f"{path}: holds no saeopt metadata: not a weights file of this system") from None
    config = validate_run(stored(config_raw), path)
    found = by_site(tensors)
    saes = {hook: _build(path, config, hook, shape, found.get(hook, {})) for hook, shape in hook_points.items()}
    return Checkpoint(Path(path), samples, config, saes)


def _build(path: str | Path, config: RunConfig, hook: str, shape: Mapping[str, Any], tensors: dict[str, Tensor]) -> SAE:
    from saeopt.saes.base import where
    from saeopt.saes.origin import Origin
    from saeopt.saes.registry import get_sae

    if "W_enc" not in tensors:
        raise CorruptCheckpoint(f"{path}: '{hook}/W_enc' is missing")
    sae = get_sae(str(shape["sae_type"]))(
        int(shape["d"]),
        int(shape["h"]),
        config.sae_at(hook),
        legacy_scaling=bool(config.legacy_scaling),
        recipe=config.recipe,
        dtype=tensors["W_enc"].dtype,
        device=tensors["W_enc"].device,
        **where(_widths(shape.get("widths"))),
    )
    try:
        sae.load_state_dict(tensors)
    except RuntimeError as error:
        raise CorruptCheckpoint(f"{path}: the tensors of '{hook}' do not fit its config: {error}") from None
    sae.norm_limit = float(shape.get("norm_limit", math.inf))
    sae.origin = Origin(config.saes.site(hook), config)
    return sae.requires_grad_(False)


def _widths(stored: Mapping[str, Any] | None) -> Widths | None:
    from saeopt.saes.base import Widths

    if stored is None:
        return None
    return Widths(tuple(stored["reads"]), tuple(stored["writes"]), bool(stored["same"]))


def all_seeds(loaded: Checkpoint) -> dict[str, dict[int, SAE]]:
    """Site → the SAE of each seed of a run, from one weights file and those that belong to it, in `seeds/` beside it.

    What is not there is a warning: a weights file may have been copied alone.
    """
    config, folder = loaded.config, RunFolder(loaded.path.parent)
    found = {hook: {config.seed: sae} for hook, sae in loaded.saes.items()}
    device = next((sae.W_enc.device for sae in loaded.saes.values()), "cpu")
    for one in config.of_each_seed[1:]:
        path = folder.seed(one.seed).path / loaded.path.name
        try:
            others = load_weights(path, device).saes
        except MissingFile:
            log.warning("%s: no such file: seed %d is left out", path, one.seed)
            continue
        for hook, sae in others.items():
            found[hook][one.seed] = sae
    return found


def load_checkpoint(
    run_dir: str | Path,
    checkpoint: int | str | Path | None = None,
    device: torch.device | str = "cpu",
    seed: int | None = None,
) -> Checkpoint:
    """One checkpoint of a run folder (or the weights file itself).

    `checkpoint` is a number of samples or a file; None takes the newest that is whole, and warns about every newer
    one that is damaged. A checkpoint asked for by name is never replaced by another. `seed`: of a run that has several
    this one; None: the first.
    """
    folder = Path(run_dir) if seed is None else seed_folder(Path(run_dir), seed)
    if checkpoint is None and folder.is_file():
        return load_weights(folder, device)
    if checkpoint is not None:
        return load_weights(_named(folder, str(checkpoint)), device)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run folder")
    found = list_checkpoints(folder)
    for _, path in found:
        try:
            return load_weights(path, device)
        except CorruptCheckpoint as error:
            log.warning("%s; trying the checkpoint before it", error)
    raise UserError(f"{folder}: " + ("no usable checkpoint" if found else "no checkpoint (samples_<N>.safetensors)"))


def seed_folder(run_dir: Path, seed: int) -> Path:
    """The folder in which a seed of a run has its weights.

    Raises:
        UserError: the run has no such seed.
    """
    known = []
    for _, path in list_checkpoints(run_dir)[:1]:
        config: Any = read_metadata(path).get("config", {})
        known = [config.get("seed", 0), *RunFolder(run_dir).seeds()]
        if seed in known:
            return run_dir if seed == known[0] else RunFolder(run_dir).seed(seed).path
    raise UserError(f"{run_dir}: no seed {seed} (there are: {', '.join(map(str, known)) or 'none'})")


def _named(folder: Path, checkpoint: str) -> Path:
    if checkpoint.isdigit():
        path = weights_path(folder, int(checkpoint))
        if not path.exists():
            known = ", ".join(str(n) for n, _ in list_checkpoints(folder)) or "none"
            raise UserError(f"{folder}: no checkpoint at {checkpoint} samples (there are: {known})")
        return path
    return Path(checkpoint) if Path(checkpoint).exists() else folder / checkpoint


def load_run(
    run_dir: str | Path, checkpoint: int | str | Path | None = None, device: torch.device | str = "cpu"
) -> tuple[RunConfig, dict[str, SAE]]:
    """The config of a run and its SAEs by hook point; see :func:`load_checkpoint`."""
    loaded = load_checkpoint(run_dir, checkpoint, device)
    return loaded.config, loaded.saes
