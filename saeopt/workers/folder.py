"""Where a claimed trial's run folder lets it go on."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from saeopt.config import RunConfig, load_run_config
from saeopt.config.keys import same_anywhere
from saeopt.console import log
from saeopt.errors import UserError
from saeopt.files import read_error
from saeopt.runs.folder import RunFolder, resume_point
from saeopt.runs.owner import owners
from saeopt.training.environment import going_on
from saeopt.trials.packing import Assignment


def start_of(run_dir: Path, config: RunConfig) -> int:
    """Samples of the newest usable checkpoint of this config.

    A folder that holds a run of another config (an older study of the same name) is moved aside.
    """
    saved = RunFolder(run_dir).config_path
    try:
        saved.read_bytes()
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise read_error(saved, error) from error
    before: dict[str, Any] = {}
    with suppress(UserError):
        begun = load_run_config(saved)
        config, before = going_on(config, begun), same_anywhere(begun)
    if before == same_anywhere(config):
        return resume_point(run_dir)
    aside = next(p for i in itertools.count(1) if not (p := run_dir.with_name(f"{run_dir.name}-old-{i}")).exists())
    log.warning("%s holds the run of another config: it is now %s", run_dir, aside.name)
    with suppress(FileNotFoundError):
        run_dir.rename(aside)
        for _, theirs in owners(aside):
            shutil.rmtree(theirs, ignore_errors=True)
    return 0


def same_start(again: Sequence[Assignment]) -> list[list[Assignment]]:
    """Parts that can be trained together after some of them have written checkpoints."""
    parts: dict[int, list[Assignment]] = {}
    for assignment in again:
        parts.setdefault(assignment.start, []).append(assignment)
    return list(parts.values())
