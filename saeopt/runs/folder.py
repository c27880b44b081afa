"""The run folder: which files lie where, and how they come and go. Importing this imports no torch."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saeopt.config.io import dump_yaml
from saeopt.config.run import RunConfig
from saeopt.files import (
    atomic_write,
    check_owned,
    is_evaluation,
    jsonable,
    parse_json,
    read_error,
    read_metrics,
    read_sections,
    remove,
    remove_temporaries,
    write_error,
    write_json,
)
from saeopt.runs import names
from saeopt.runs.tensor_file import CorruptCheckpoint, MissingFile, read_metadata, verify

STATES_KEPT = 2


@dataclass(frozen=True)
class RunFolder:
    """`final_config.yaml`, `samples_<N>.safetensors`, `state/<N>.safetensors`, `metrics.jsonl`, `evaluation.json`."""

    path: Path

    @classmethod
    def create(cls, save_dir: str | Path, name: str) -> RunFolder:
        """A new folder below `save_dir`; a suffix keeps equal names apart."""
        parent = Path(save_dir)
        parent.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = parent / (name if number == 1 else f"{name}-{number}")
            try:
                path.mkdir()
                return cls(path)
            except FileExistsError:
                number += 1

    @property
    def config_path(self) -> Path:
        """The complete, re-runnable config."""
        return self.path / names.CONFIG

    @property
    def metrics_path(self) -> Path:
        """One JSON object per line: samples, hook point, metrics of a log step or an evaluation."""
        return self.path / names.METRICS_FILE

    @property
    def evaluation_path(self) -> Path:
        """Hook point → metric → value."""
        return self.path / names.EVALUATION

    @property
    def status_path(self) -> Path:
        """How the run ended: status, samples, reason."""
        return self.path / names.STATUS

    def weights_path(self, samples: int) -> Path:
        """The weights after so many samples."""
        return names.weights_path(self.path, samples)

    def state_path(self, samples: int) -> Path:
        """What resuming needs besides the weights."""
        return names.state_path(self.path, samples)

    def seed(self, seed: int) -> RunFolder:
        """Where a seed that is not the run's first has its weights."""
        return RunFolder(self.path / names.SEEDS / str(seed))

    def of_each_seed(self, config: RunConfig) -> list[RunFolder]:
        """The folders of a config's seeds: this one is the first's."""
        return [self, *(self.seed(config.seed + i) for i in range(1, config.seeds))]

    def seeds(self) -> list[int]:
        """The seeds that have such a folder, in order."""
        return _numbers(self.path / names.SEEDS, names.SEED_FOLDER)[::-1]

    def weights(self) -> list[int]:
        """Samples of the weights files, newest first."""
        return _numbers(self.path, names.WEIGHTS_FILE)

    def states(self) -> list[int]:
        """Samples of the state files, newest first."""
        return _numbers(self.path / names.STATE, names.STATE_FILE)

    def write_config(self, config: RunConfig) -> None:
        """Write `final_config.yaml`, for each seed."""
        for folder, own in zip(self.of_each_seed(config), [config, *config.of_each_seed[1:]], strict=True):
            with atomic_write(folder.config_path) as temporary:
                temporary.write_text(dump_yaml(own), encoding="utf-8")

    def append_metrics(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add lines to `metrics.jsonl`; NaN and infinities become null.

        The file is opened before the right to write is looked at: who takes the run over rewrites it, so what is open
        here is either ours or no longer there.

        Raises:
            HostError: the disk is full.
            LostRun: another process has taken the run over.
        """
        text = "".join(json.dumps(jsonable(row), allow_nan=False) + "\n" for row in rows)
        try:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                check_owned(self.path)
                file.write(text)
        except OSError as error:
            raise write_error(self.metrics_path, error) from error

    def rewind_metrics(self, samples: int) -> None:
        """Drop lines that a resumed run will write again, and a line that a crash cut short."""
        try:
            text = self.metrics_path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        except OSError as error:
            raise read_error(self.metrics_path, error) from error
        kept = []
        for line in text.splitlines():
            try:
                if parse_json(line)["samples"] <= samples:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        with atomic_write(self.metrics_path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def rows_at(self, samples: int) -> set[tuple[str, bool]]:
        """Hook point and whether it is an evaluation, of each line of `metrics.jsonl` at a number of samples."""
        found = [row for row in read_metrics(self.metrics_path) if row["samples"] == samples]
        return {(row["hook_point"], is_evaluation(row)) for row in found}

    def evaluation(self) -> dict[str, Any] | None:
        """What the run itself wrote into `evaluation.json`; None where another command has written it, or nobody."""
        try:
            found = read_sections(self.evaluation_path)
            if any("samples" in row for row in found.values()):
                return None
            rows = {h: {k: v for k, v in row.items() if k != names.EVALUATED} for h, row in found.items()}
            return {h: {k: math.nan if v is None else v for k, v in row.items()} for h, row in rows.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return None

    def status(self) -> dict[str, Any]:
        """The content of `status.json`; empty where there is none."""
        try:
            return read_sections(self.status_path)
        except (FileNotFoundError, ValueError):
            return {}
        except OSError as error:
            raise read_error(self.status_path, error) from error

    def write_status(self, status: str, samples: int, reason: str | None) -> bool:
        """Write `status.json`; False if it says so already."""
        wanted = {"status": status, "samples": samples, "reason": reason}
        if self.status() == wanted:
            return False
        write_json(self.status_path, wanted)
        return True

    def prune(self, keep_checkpoints: int | None) -> None:
        """Delete states beyond the last two, and weights beyond `keep_checkpoints` (never those of a kept state)."""
        states = self.states()
        for samples in states[STATES_KEPT:]:
            remove(self.state_path(samples))
        for folder in (self, *map(self.seed, self.seeds())) if keep_checkpoints is not None else ():
            for samples in folder.weights()[max(keep_checkpoints or 0, 1) :]:
                if samples not in states[:STATES_KEPT]:
                    remove(folder.weights_path(samples))

    def drop_checkpoints(self) -> None:
        """Delete all weights and states: the run is not gone on with, and nobody looks at it again."""
        for samples in self.states():
            remove(self.state_path(samples))
        for folder in (self, *map(self.seed, self.seeds())):
            for samples in folder.weights():
                remove(folder.weights_path(samples))

    def rewind(self, samples: int) -> None:
        """Make ready to go on from `samples`: what comes later is written again, half-written files go.

        Later states were found unusable, and would count among the two that are kept.
        """
        check_owned(self.path)
        for later in (n for n in self.states() if n > samples):
            remove(self.state_path(later))
        for folder in (self.path, self.path / names.STATE, *(self.seed(seed).path for seed in self.seeds())):
            remove_temporaries(folder)
        self.rewind_metrics(samples)

    def usable(self) -> Iterable[int]:
        """Samples of the checkpoints whose state and weights are whole, newest first; damaged ones give a warning.

        Raises:
            UserError: one of them cannot be read, and may be whole.
        """
        from saeopt.console import log

        for samples in self.states():
            try:
                verify(self.state_path(samples))
                others: Any = read_metadata(self.state_path(samples)).get(names.SEEDS, [])
                for folder in (self, *map(self.seed, others)):
                    verify(folder.weights_path(samples))
            except (CorruptCheckpoint, MissingFile) as error:
                log.warning("checkpoint %d cannot be used: %s", samples, error)
                continue
            yield samples


def resume_point(run_dir: str | Path) -> int:
    """Samples of the newest usable checkpoint of a run folder, 0 if there is none.

    Raises:
        UserError: a checkpoint cannot be read.
    """
    return next(iter(RunFolder(Path(run_dir)).usable()), 0)


def _numbers(folder: Path, pattern: re.Pattern[str]) -> list[int]:
    try:
        found = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise read_error(folder, error) from error
    return sorted((int(m[1]) for name in found if (m := pattern.fullmatch(name))), reverse=True)


def bytes_of(folder: Path) -> int:
    """What the files of a folder and its subfolders hold; those that go meanwhile count nothing."""
    total, left = 0, [folder]
    while left:
        try:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        left.append(Path(entry.path))
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue
    return total
