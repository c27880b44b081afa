"""A checkpoint on held-out samples: those of its run, or of other data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from saeopt.activations.calibration import calibration
from saeopt.activations.language_model import LanguageModel
from saeopt.activations.source import Source, open_samples, open_source
from saeopt.activations.tokens import HeldOut
from saeopt.config import RunConfig, apply_overrides, load_run_config, validate_run
from saeopt.config.io import changed
from saeopt.config.sites import Site
from saeopt.console import error_console, log
from saeopt.errors import UserError
from saeopt.evaluation.agreement import MOST_MATCHED
from saeopt.evaluation.conditions import Seen, conditions
from saeopt.evaluation.evaluate import evaluate
from saeopt.evaluation.metrics import Metrics
from saeopt.files import read_metrics
from saeopt.runs.names import CONFIG, METRICS_FILE
from saeopt.runs.weights import Checkpoint, all_seeds, list_checkpoints
from saeopt.saes.base import SAE


def config_of(run_dir: Path, loaded: Checkpoint, overrides: list[str]) -> RunConfig:
    """The run's `final_config.yaml`, or the config in the weights file where there is none, with overrides applied."""
    path = (run_dir if run_dir.is_dir() else loaded.path.parent) / CONFIG
    if path.exists():
        return load_run_config(path, overrides)
    raw = loaded.config.model_dump(mode="json")
    return validate_run(changed(raw, overrides), loaded.path, overrides)


def on_other_data(loaded: Checkpoint, data: str | None) -> list[str]:
    """The overrides that have a run evaluated on other data than its own.

    Raises:
        UserError: the run has no language model to read text with.
    """
    if data is not None and loaded.config.data.activations is not None:
        raise UserError(
            f"{data}: the run was trained on stored activations; data.activations set to another file evaluates on the"
            " last samples of that one"
        )
    return [] if data is None else [f"data.eval_dataset_name={data}"]


def is_older(loaded: Checkpoint) -> bool:
    """Whether the folder holds a newer checkpoint, whose evaluation is the result of the run."""
    newest = list_checkpoints(loaded.path.parent)[:1]
    return bool(newest) and newest[0][0] > loaded.samples


def measure(
    loaded: Checkpoint,
    config: RunConfig,
    device: torch.device,
    n_eval_samples: int | None,
    cross_entropy: bool,
    everything: bool = False,
) -> tuple[dict[str, Metrics], dict[str, Any]]:
    """Hook point → metrics of a checkpoint on held-out samples (those of the run, or of data of their own); and the
    conditions."""
    if everything and config.data.eval_data is None:
        raise UserError("--all needs --data FILE: the rest of the run's own data were trained on")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    config, n = (config, 0) if everything else _samples(config, n_eval_samples)
    lm = open_source(config, device)
    cross_entropy = cross_entropy and lm.predicts
    sites, saes = {key: loaded.config.saes.site(key) for key in loaded.saes}, all_seeds(loaded)
    for key, sae in loaded.saes.items():
        _check_widths(loaded.path, sites[key], sae, lm)
    batches, n = _held_out(config, lm, n, everything)
    _set_norm_limits(loaded, saes, config, lm)
    if loaded.config.seeds > 1 and (h := max(sae.h for sae in loaded.saes.values())) > MOST_MATCHED:
        log.info("matching up to %s latents of each two seeds may take minutes", f"{h:,}")
    seen = Seen()
    with Progress(console=error_console, transient=True, disable=not error_console.is_terminal) as bar:
        task = bar.add_task("evaluating", total=n)
        try:
            found = evaluate(
                {key: (sites[key], of_key) for key, of_key in saes.items()},
                lm,
                seen.watch(_first(batches, n)),
                data=config.data,
                cross_entropy=cross_entropy,
                ce_ablation=config.ce_ablation,
                device=device,
                progress=lambda done: bar.advance(task, done),
                most_matched=None,
            )
        except torch.cuda.OutOfMemoryError:
            raise UserError(
                "out of GPU memory: lower it with --set data.eval_batch_size=1 or use --device cpu"
            ) from None
    rows = {hook: {**metrics, **_aimed(loaded, hook), "samples": loaded.samples} for hook, metrics in found.items()}
    return rows, conditions(config, lm, seen, cross_entropy)


def _aimed(loaded: Checkpoint, hook: str) -> dict[str, float]:
    """The L0 that training was to come to, and the λ that it had moved to, as the run's own evaluation says them."""
    target = loaded.config.sae_at(hook).target_l0
    if target is None:
        return {}
    logged = read_metrics(loaded.path.parent / METRICS_FILE)
    here = [row for row in logged if row["hook_point"] == hook and row["samples"] <= loaded.samples]
    moved = [row[key] for row in here for key in ("sparsity_coeff", "eval_sparsity_coeff") if key in row]
    return {"target_l0": target} | ({"sparsity_coeff": moved[-1]} if moved else {})


def _check_widths(path: Path, site: Site, sae: SAE, lm: Source) -> None:
    read, written = (sae.widths.reads, sae.widths.writes) if sae.widths is not None else ((sae.d,), (sae.d,))
    for hooks, widths in ((site.reads, read), (site.writes, written)):
        for hook, width in zip(hooks, widths, strict=True):
            lm.resolve([hook])
            if (have := lm.width(hook)) != width:
                where = "" if site.one else f" at {hook}"
                raise UserError(f"{path}: the SAE at '{site.key}' has width {width}{where}, the model {have}")


def _held_out(config: RunConfig, lm: Source, n: int, everything: bool) -> tuple[Iterator[Tensor], int]:
    """Batches of held-out samples, and how many samples these are; training data are read only if they must be."""
    batch = config.data.eval_batch_size
    if config.data.eval_data is None:
        return open_samples(config.data, lm).eval_batches(batch), n
    assert isinstance(lm, LanguageModel)
    own = HeldOut.load(
        config.data.model_copy(update={"n_eval_samples": n, "n_threshold_samples": None}), lm, everything
    )
    return own.batches(batch), own.n


def _set_norm_limits(loaded: Checkpoint, saes: Mapping[str, Mapping[int, SAE]], config: RunConfig, lm: Source) -> None:
    """Measure the limits of norm outliers where the checkpoint has none, or `--set` asks for others."""
    wanted, had = config.data.mask_norm_outliers, loaded.config.data.mask_norm_outliers
    lacking = [h for h, sae in loaded.saes.items() if wanted is not None and (had != wanted or sae.norm_limit == inf)]
    if lacking:
        tokens = open_samples(config.data, lm)
        sites = [loaded.config.saes.site(key) for key in lacking]
        for site, measured in calibration(sites, lm, tokens, config).items():
            for sae in saes[site.key].values():
                sae.norm_limit = measured.norm_limit


def _samples(config: RunConfig, wanted: int | None) -> tuple[RunConfig, int]:
    """The config to load held-out samples with, and how many of them to take.

    Which documents are held out depends on `n_eval_samples`: fewer samples are the first of the same ones.
    """
    held_out = config.data.n_eval_samples
    n = held_out if wanted is None else wanted
    if n == 0:
        raise UserError("'data.n_eval_samples' is 0 in this run's config: nothing was held out; see --n-eval-samples")
    if n <= held_out:
        return config, n
    if config.data.eval_data is None:
        log.warning("%d samples asked for, %d were held out: the others may have been trained on", n, held_out)
    raw = apply_overrides(config.model_dump(mode="json"), {"data.n_eval_samples": n})
    return validate_run(raw, "the run's config"), n


def _first(batches: Iterator[Tensor], n: int) -> Iterator[Tensor]:
    """The first n samples of the batches."""
    for batch in batches:
        yield batch[:n]
        n -= len(batch)
        if n <= 0:
            return
