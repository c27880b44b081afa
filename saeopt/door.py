"""What `import saeopt` gives: load SAEs, train a run, evaluate one. Everything takes and gives raw activations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saeopt.config import RunConfig, apply_overrides, told_of, validate_run
from saeopt.config.sense import check_sense
from saeopt.config.sites import Site
from saeopt.errors import UserError
from saeopt.evaluation.metrics import Metrics
from saeopt.exports.formats import About
from saeopt.files import remove_empty
from saeopt.runs.folder import RunFolder
from saeopt.runs.weights import load_checkpoint
from saeopt.saes.base import SAE

Location = str | Path


@dataclass(frozen=True)
class Run:
    """A run that was trained: its folder, how it ended, and its evaluation (key of the SAE → metric → value)."""

    folder: Path
    status: str
    samples: int
    reason: str | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)

    def saes(self, device: str = "cpu") -> dict[str, SAE]:
        """Its SAEs at the end."""
        return load(self.folder, device=device)


def load(
    path: Location, *, checkpoint: int | Location | None = None, device: str = "cpu", seed: int | None = None
) -> dict[str, SAE]:
    """The SAEs of a run folder (its newest checkpoint, or the one named) or of one weights file, by key.

    The key is the hook point's name where an SAE reads and gives back one hook point. `seed`: of a run with several
    seeds this one; None: the first. What other tools saved is read as well, from a folder, a file or the hub
    (`OWNER/NAME[@REVISION][:FOLDER]`); where the files tell no hook point, the key is their folder's name.

    Raises:
        UserError: no such folder or file, one that is damaged, or an SAE that none of our architectures says.
    """
    from saeopt.host.devices import choose_device
    from saeopt.imports.find import is_foreign
    from saeopt.imports.trees import is_hub

    if checkpoint is None and seed is None and (is_hub(str(path)) or (Path(path).exists() and is_foreign(Path(path)))):
        return _imported(str(path), str(choose_device(device)))
    return load_checkpoint(path, checkpoint, choose_device(device), seed).saes


def load_sae(
    path: Location,
    *,
    site: str | None = None,
    checkpoint: int | Location | None = None,
    device: str = "cpu",
    seed: int | None = None,
) -> SAE:
    """One SAE of a run folder or weights file; `site` is its key where there are several, `seed` as in :func:`load`.

    Raises:
        UserError: there is none of this key, or several and none is named.
    """
    found = load(path, checkpoint=checkpoint, device=device, seed=seed)
    if site is None and len(found) == 1:
        return next(iter(found.values()))
    if site is None or site not in found:
        problem = "holds several SAEs" if site is None else f"holds no SAE at '{site}'"
        raise UserError(f"{path}: {problem}: 'site' must be one of {', '.join(found)}")
    return found[site]


def train_run(
    config: RunConfig | Mapping[str, Any] | Location | None = None,
    changes: Mapping[str, Any] | None = None,
    *,
    resume: Location | None = None,
    device: str = "auto",
) -> Run:
    """Train one run as `saeopt train` does, in this process, and return what came of it.

    Args:
        config: a YAML file, a mapping as in such a file, or a config; with `resume` it may be left out.
        changes: dotted fields to change, as `--set` does: `{"saes.sparsity_coeff": 2}`.
        resume: a run folder to go on with.
        device: auto, cpu, cuda, cuda:1, …

    Raises:
        UserError: something that the caller can mend; no run folder is left where nothing was trained.
    """
    from saeopt.training.environment import check_accumulation, check_environment
    from saeopt.training.launch import train_one
    from saeopt.training.loggers import check_sinks
    from saeopt.training.plan import Observer
    from saeopt.views.plots import plot_run

    class Drawing(Observer):
        def draw(self, name: str, folder: Path) -> None:
            plot_run(folder)

    chosen, folder, source = _chosen(config, changes or {}, resume)
    made: list[Path] = []
    try:
        with told_of(chosen, source, _texts(changes or {})):
            check_sinks(chosen)
            check_environment()
            check_accumulation(chosen)
            plan, result, _ = train_one(chosen, folder, device, Drawing(), made.append)
    except BaseException:
        remove_empty(made)
        raise
    return Run(plan.run_dir, result.status, result.samples, result.reason, dict(result.evaluation))


def evaluate_run(
    path: Location,
    *,
    checkpoint: int | Location | None = None,
    device: str = "auto",
    n_eval_samples: int | None = None,
    data: str | None = None,
    everything: bool = False,
    cross_entropy: bool = True,
) -> dict[str, Metrics]:
    """Metrics of what a run saved, on its held-out samples or on other `data`, by key; writes nothing.

    Raises:
        UserError: no such run, or data and model that do not fit it.
    """
    from saeopt.evaluation.held_out import config_of, measure, on_other_data
    from saeopt.host.devices import choose_device

    chosen = choose_device(device)
    loaded = load_checkpoint(path, checkpoint, chosen)
    config = config_of(Path(path), loaded, on_other_data(loaded, data))
    return measure(loaded, config, chosen, n_eval_samples, cross_entropy, everything)[0]


def _imported(source: str, device: str) -> dict[str, SAE]:
    """What another tool saved, by key; of several that are called alike by their folders."""
    from saeopt.imports.find import find

    held = find(source)
    keys = [one.key for one in held]
    saes = {}
    for one in held:
        alone = keys.count(one.key) == 1
        key = one.key if alone else f"{one.key} ({Path(one.path).parent.name})"
        saes[key if key not in saes else one.path] = one.sae(device)
    return saes


def export(
    saes: Run | SAE | Mapping[str, SAE] | Location,
    *,
    to: str,
    folder: Location,
    site: str | Site | None = None,
    checkpoint: int | None = None,
    seed: int | None = None,
    unit_decoder: bool = False,
    license: str | None = None,
    push: str | None = None,
) -> Path:
    """Write SAEs in the format of another tool (docs/export.md), as `saeopt export` does, and return the folder.

    Args:
        saes: a run folder, weights file or `Run`; or SAEs by key, or one SAE.
        to: the format's name, as `saeopt export -h` lists them.
        folder: is made anew.
        site: of a run the key of one SAE; of one SAE the hook point that it was trained at, or its `Site` (an SAE
            that was loaded knows it).
        checkpoint, seed: of a run, as in :func:`load`.
        unit_decoder: decoder rows of norm 1 in raw units.
        license: an identifier for the model cards.
        push: `OWNER/NAME` on the hub to upload the folder to.

    Raises:
        UserError: the format cannot say one of the SAEs exactly, or the hub refuses; nothing is left half-written.
    """
    from saeopt.exports import making, sources
    from saeopt.exports.push import check_repo
    from saeopt.exports.push import push as upload

    if push is not None:
        check_repo(push)
    path, how = Path(folder), making.How(to, unit_decoder, license, push)
    if isinstance(saes, SAE | Mapping):
        given = saes if isinstance(saes, Mapping) else {site.key if isinstance(site, Site) else site or "": saes}
        leaving = iter([sources.Leaving(About(_site(key, sae, site)), sae) for key, sae in given.items()])
    else:
        key = site.key if isinstance(site, Site) else site
        wanted = sources.of_run(Path(saes.folder if isinstance(saes, Run) else saes), key)
        leaving = sources.leaving(wanted, checkpoint, seed)
    making.export_saes(leaving, (), how, path)
    if push is not None:
        upload(path, push)
    return path


def _site(key: str, sae: SAE, given: str | Site | None) -> Site:
    """Where an SAE that was given by itself reads and writes: it knows it, or its key tells it."""
    if isinstance(given, Site):
        return given
    if sae.origin is not None and key in ("", sae.origin.site.key):
        return sae.origin.site
    reads, arrow, writes = key.partition("->")
    if not key or (sae.widths is not None) != bool(arrow):
        raise UserError(
            f"export: '{key}' does not say where the SAE reads and writes: give 'site', a hook point's name for an"
            " autoencoder, else Site(reads, writes, key)"
        )
    return Site(tuple(reads.split("+")), tuple(writes.split("+")), key) if arrow else Site.of(key)


def _chosen(
    config: RunConfig | Mapping[str, Any] | Location | None, changes: Mapping[str, Any], resume: Location | None
) -> tuple[RunConfig, Path | None, Location]:
    """The config, the folder of a run that goes on, and where the config is from."""
    from saeopt.training.launch import resolve

    if config is None and resume is None:
        raise UserError("train_run: give a config (a YAML file, a mapping or a RunConfig), or resume=RUN_DIR")
    if config is None or isinstance(config, str | Path):
        path, folder = (None if given is None else Path(given) for given in (config, resume))
        return *resolve(path, _texts(changes), folder), path or RunFolder(folder or Path()).config_path
    if resume is not None:
        raise UserError("train_run: with resume, config must be a YAML file or left out")
    raw = config.model_dump(mode="json", exclude_unset=True) if isinstance(config, RunConfig) else config
    chosen = validate_run(apply_overrides(raw, changes), "train_run")
    check_sense(chosen)
    return chosen, None, "train_run"


def _texts(changes: Mapping[str, Any]) -> list[str]:
    """Changes as a command line gives them."""
    return [f"{field}={json.dumps(value)}" for field, value in changes.items()]
