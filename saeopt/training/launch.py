"""From a command line to a run: which config, which folder, which device, how many processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeopt.config import RunConfig, load_run_config, recipe_notice
from saeopt.config.keys import same_anywhere
from saeopt.config.roles import DATA_AND_MODEL, MAY_DIFFER
from saeopt.config.run import NEWEST_RECIPE
from saeopt.config.sense import check_sense
from saeopt.console import log
from saeopt.errors import UserError
from saeopt.host.launcher import launched
from saeopt.runs.folder import RunFolder
from saeopt.runs.names import SEEDS
from saeopt.runs.naming import run_name
from saeopt.training.environment import going_on

if TYPE_CHECKING:
    from saeopt.training.plan import Observer, TrialPlan, TrialResult
    from saeopt.training.runtime import Runtime

EXHAUSTED = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What an exhausted host, driver or library says without an error class of its own."""


def resolve(path: Path | None, overrides: Sequence[str], resume: Path | None) -> tuple[RunConfig, Path | None]:
    """The config of a new run, or the config and folder of one that goes on.

    Raises:
        UserError: nothing to train, no such folder, or a config that contradicts the folder's.
    """
    if resume is None:
        if path is None:
            raise UserError("CONFIG is missing: a YAML file (or --resume RUN_DIR)")
        config = load_run_config(path, overrides)
        check_sense(config)
        return config, None
    if not resume.is_dir():
        raise UserError(f"--resume {resume}: no such folder")
    saved = RunFolder(resume).config_path
    whole = resume.absolute().parent.parent
    if resume.absolute().parent.name == SEEDS and RunFolder(whole).config_path.exists():
        raise UserError(f"--resume {resume}: holds one seed of a run with several: give {whole}")
    if not saved.exists():
        if path is None:
            raise UserError(f"--resume {resume}: holds no final_config.yaml; give --config FILE beside it")
        log.warning("%s holds no final_config.yaml: starting over in it", resume)
        return load_run_config(path, overrides), resume
    before = load_run_config(saved)
    now = going_on(load_run_config(path or saved, overrides, before.recipe), before)
    _check_agreement(before, now, saved)
    return now, resume


def _check_agreement(before: RunConfig, now: RunConfig, saved: Path) -> None:
    """A resumed run is the same run: only devices and logging may change."""
    old, new = (flatten(c.model_dump(mode="json", exclude=set(MAY_DIFFER))) for c in (before, now))
    typed = [flatten(same_anywhere(c)) for c in (before, now)]
    differing = [
        key for key in {**old, **new} if old.get(key) != new.get(key) and typed[0].get(key) != typed[1].get(key)
    ]
    moved = [key for key in differing if key in DATA_AND_MODEL]
    differing = [key for key in differing if key not in moved]
    if moved and not differing and not _knows_its_data(saved.parent):
        raise UserError(
            f"'{moved[0]}' is not what {saved} says, and this run's checkpoints are of a version that did not note what"
            " they were trained on: if it only moved, put it back or write the new place into that file"
        )
    if differing:
        key = "recipe" if "recipe" in differing else differing[0]  # the others follow from it
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise UserError(f"'{key}' is {new.get(key)!r}, but {saved} says {old.get(key)!r}{more}: not the same run")
    if moved:
        log.info("%s: %s moved; what is there now must be the same", saved.parent, " and ".join(moved))


def _knows_its_data(run_dir: Path) -> bool:
    """Whether the newest checkpoint tells which tokens and language model it comes from (or there is none)."""
    from saeopt.runs.checkpoint import identity

    folder = RunFolder(run_dir)
    samples = next(iter(folder.usable()), None)
    return samples is None or identity(folder, samples) is not None


def flatten(raw: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys."""
    found: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, dict) and value:
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def check_processes(wanted: int | None) -> None:
    """Raise :class:`UserError` when fewer processes run than were asked for.

    `accelerate launch --cpu --num_processes 2` starts one process without a word; its parent knows what was wanted.
    """
    running = launched().size
    wanted = wanted or _launched_processes()
    if wanted is not None and wanted != running:
        raise UserError(
            f"{wanted} processes were asked for, {running} runs: launch with --multi_gpu, or on the CPU"
            f" ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {wanted} …"
        )


def _launched_processes() -> int | None:
    """`--num_processes` of the `accelerate launch` that started this process."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    if "launch" not in words or not any("accelerate" in word for word in words):
        return None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name.replace("-", "_") == "__num_processes":
            number = value or following
            return int(number) if number.isdigit() else None
        if word.endswith(".py"):
            return None  # what follows belongs to the script
    return None


def make_runtime(device: str) -> Runtime:
    """The process's runtime on a device named on the command line.

    Raises:
        UserError: no such device, or one device for several processes.
    """
    from saeopt.host.devices import choose_device
    from saeopt.training.runtime import Runtime

    if device == "auto":
        return Runtime()
    if launched().size > 1 and device not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: with several processes the launcher gives each its device")
    return Runtime(choose_device(device))


def notices(config: RunConfig, resumed: bool) -> None:
    """What λ means here, for those who bring an SAE-Interpretability config, and which defaults hold."""
    if "recipe" not in config.model_fields_set and config.recipe == NEWEST_RECIPE and not resumed:
        log.info(recipe_notice("the config"))
    may_be_older = config.legacy_scaling is None and "recipe" not in config.model_fields_set
    if may_be_older and not resumed and "sparsity_coeff" in config.saes.model_fields_set:
        log.info(
            "'saes.sparsity_coeff' is in normalised units here (activations of mean norm sqrt(d), losses summed over d)"
            "; legacy_scaling: true keeps SAE-Interpretability's units, false silences this"
        )


def new_folder(config: RunConfig, runtime: Runtime) -> Path:
    """A folder of its own for a new run, the same on every rank."""
    made: Path | UserError | None = None
    if runtime.ranks.is_first:
        try:
            made = RunFolder.create(config.save_dir, run_name(config)).path
        except OSError as error:
            made = UserError(f"'save_dir': {config.save_dir} cannot be written: {error.strerror}")
    found = runtime.ranks.agree(made)
    if isinstance(found, UserError):
        raise found
    return Path(found)


def train_one(
    config: RunConfig, run_dir: Path | None, device: str, observer: Observer, made: Callable[[Path], None]
) -> tuple[TrialPlan, TrialResult, Runtime]:
    """Train one run in this process, in a folder of its own or going on in `run_dir`.

    `made` is told of each new folder, the innermost first, before anything lies in it.

    Raises:
        UserError: something that the user can mend.
    """
    from saeopt.activations.local_files import check_sources
    from saeopt.training import TrialPlan, train_pack

    fresh = run_dir is None
    check_sources(config.data, splits=fresh)  # a missing file is told before the language model is loaded
    runtime = make_runtime(device)
    notices(config, resumed=not fresh)
    save_dir = Path(config.save_dir)
    absent = [folder for folder in (save_dir, *save_dir.parents) if not folder.exists()]
    run_dir = new_folder(config, runtime) if run_dir is None else run_dir
    plan = TrialPlan(run_dir.name, config, run_dir, resume=not fresh)
    if fresh and runtime.ranks.is_first:
        for folder in (run_dir, *absent):
            made(folder)
    with out_of_memory(config, runtime):
        return plan, train_pack([plan], runtime, observer)[plan.name], runtime


@contextmanager
def out_of_memory(config: RunConfig, runtime: Runtime) -> Iterator[None]:
    """Turn an exhausted device into one line that says what to lower."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        exhausted = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not exhausted and not any(words in str(error) for words in EXHAUSTED):
            raise
        size, steps = config.data.train_batch_size, config.gradient_accumulation_steps
        raise UserError(
            f"out of memory on {runtime.device}: lower data.train_batch_size (now {size}; raising"
            f" gradient_accumulation_steps, now {steps}, by the same factor keeps the result), data.eval_batch_size,"
            f" saes.dict_size_to_input_ratio (now {config.saes.dict_size_to_input_ratio:g})"
            " or data.shuffle_buffer_tokens"
        ) from None
