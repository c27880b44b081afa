"""Where metrics go besides `metrics.jsonl`: W&B and TensorBoard, through Accelerate's trackers.

A result never depends on a sink. `Accelerator.init_trackers` keeps one tracker per service and process; a pack of
N trials needs N runs, so each trial owns tracker objects of its own, and W&B is asked for `reinit="create_new"`:
a new run that leaves the others open.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import secrets
import threading
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic import ValidationError

from saeopt.config.run import RunConfig
from saeopt.config.settings import redact, settings
from saeopt.console import log
from saeopt.errors import UserError
from saeopt.files import MEAN, is_evaluation

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

Metrics = dict[str, dict[str, float]]
"""Hook point → metric → value."""

CONNECT_SECONDS = 5
INIT_SECONDS = 30
FINISH_SECONDS = 60
INTERRUPTED_SECONDS = 3
"""An interrupted run has ten seconds for everything."""


class Sink(ABC):
    """Takes metrics; never raises and never keeps the training waiting."""

    @abstractmethod
    def log(self, samples: int, metrics: Metrics) -> None:
        """Metrics per hook point after so many samples."""

    @abstractmethod
    def finish(self, status: str) -> None:
        """The run has ended: finished, stopped, diverged, interrupted or failed."""


def with_means(metrics: Metrics) -> Metrics:
    """The metrics, and of an evaluation the means over its hook points: what a sweep of a service can aim at."""
    rows = [row for row in metrics.values() if is_evaluation(row)]
    shared = set.intersection(*(set(row) for row in rows)) if rows else set()
    means = {key: sum(row[key] for row in rows) / len(rows) for key in sorted(shared)}
    return {**metrics, MEAN: means} if means else metrics


class TrackerSink(Sink):
    """One of Accelerate's trackers in a thread of its own: a service that hangs holds up nobody.

    `start` makes the tracker; it runs in the thread. After an error the sink is silent; the first gives a warning.
    """

    def __init__(self, name: str, start: Callable[[], GeneralTracker], sample_key: str | None = None) -> None:
        self.name, self._start, self._sample_key = name, start, sample_key
        self._queue: queue.SimpleQueue[tuple[int, Metrics] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"saeopt-{name}", daemon=True)
        self._thread.start()

    def log(self, samples: int, metrics: Metrics) -> None:
        if self._thread.is_alive():
            self._queue.put((samples, with_means(metrics)))

    def finish(self, status: str) -> None:
        self._queue.put(None)
        self._thread.join(INTERRUPTED_SECONDS if status in ("interrupted", "failed") else FINISH_SECONDS)
        if self._thread.is_alive():
            log.warning("%s does not answer; the run's own files are complete", self.name)

    def _work(self) -> None:
        try:
            tracker = self._start()
            while (item := self._queue.get()) is not None:
                samples, metrics = item
                values: dict[str, Any] = {f"{hook}/{k}": v for hook, row in metrics.items() for k, v in row.items()}
                if self._sample_key:  # no step: a resumed run may write samples that the service has seen before
                    tracker.log({self._sample_key: samples, **values}, step=None)
                else:
                    tracker.log(values, step=samples)
            tracker.finish()
        except Exception as error:
            log.warning("%s stopped taking metrics, the run goes on: %s", self.name, redact(_line(error)))


def check_sinks(config: RunConfig) -> None:
    """Raise :class:`UserError` for a sink that would refuse the run: not installed, or W&B's rules are broken."""
    if "tensorboard" in config.trackers and importlib.util.find_spec("tensorboard") is None:
        raise UserError("'trackers': tensorboard is not installed (pip install 'saeopt[tensorboard]')")
    if config.wandb_project is not None or "wandb" in config.trackers:
        _check_wandb(config.wandb_project, tuple(config.wandb_tags))


@cache
def _check_wandb(project: str | None, tags: tuple[str, ...]) -> None:
    """What W&B itself refuses when a run starts; its servers are not asked."""
    import wandb

    def refuse(name: str, error: Exception) -> NoReturn:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        reason = " ".join(reason.removeprefix("Value error, ").split())
        raise UserError(f"{name}: W&B refuses it: {redact(reason)}") from None

    checks: dict[str, dict[str, Any]] = {"wandb_project": {"project": project}, "wandb_tags": {"run_tags": tags}}
    for field, values in checks.items():
        try:
            wandb.Settings(**values)
        except (ValueError, wandb.errors.UsageError) as error:
            refuse(f"'{field}'", error)
    for name, value in os.environ.items():
        if name.startswith("WANDB_"):
            try:
                wandb.Settings().update_from_env_vars({name: value})
            except (ValueError, wandb.errors.UsageError) as error:
                refuse(name, error)


def open_sinks(config: RunConfig, run_dir: Path, run_name: str) -> list[Sink]:
    """The sinks that a config asks for; none by default."""
    check_sinks(config)
    sinks: list[Sink] = []
    if config.wandb_project is not None or config.trackers:
        from accelerate import PartialState

        PartialState()  # the trackers log through Accelerate, which wants its state
    if config.wandb_project is not None or "wandb" in config.trackers:
        sinks.append(TrackerSink("W&B", lambda: _wandb(config, run_dir, run_name), sample_key="samples"))
    if "tensorboard" in config.trackers:
        sinks.append(TrackerSink("TensorBoard", lambda: _tensorboard(run_dir)))
    return sinks


def _tensorboard(run_dir: Path) -> GeneralTracker:
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker("tensorboard", logging_dir=str(run_dir))
    tracker.start()
    return tracker


def _wandb(config: RunConfig, run_dir: Path, run_name: str) -> GeneralTracker:
    """A W&B run of its own; offline when the service cannot be used, with one warning."""
    os.environ.setdefault("WANDB_SILENT", "true")
    mode, problem = _wandb_mode()
    if problem is None:
        try:
            return _start_wandb(config, run_dir, run_name, mode)
        except Exception as error:
            if mode != "online":
                raise
            problem = redact(_line(error))
    log.warning("W&B cannot be used (%s); the run goes on offline: `wandb sync %s/wandb` later", problem, run_dir)
    return _start_wandb(config, run_dir, run_name, "offline")


def _wandb_mode() -> tuple[str, str | None]:
    """`WANDB_MODE`, and why online would not work (a key is missing, nobody answers)."""
    import wandb

    mode = os.environ.get("WANDB_MODE") or "online"
    if mode != "online":
        return mode, None
    key = settings().wandb_api_key
    if key is not None:
        os.environ.setdefault("WANDB_API_KEY", key.get_secret_value())
    if not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        return mode, "no API key: set WANDB_API_KEY or run `wandb login`"
    address = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    try:
        urllib.request.urlopen(address, timeout=CONNECT_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # an answer is an answer
    except (OSError, ValueError) as error:
        return mode, f"{address}: {_line(error)}"
    return mode, None


def _start_wandb(config: RunConfig, run_dir: Path, run_name: str, mode: str) -> GeneralTracker:
    import wandb
    from accelerate.tracking import WandBTracker

    run_id, known = _run_id(run_dir)
    tracker = WandBTracker(
        config.wandb_project or "saeopt",
        name=run_name,
        id=run_id,
        resume="allow" if known and mode == "online" else None,
        entity=settings().wandb_entity,
        tags=config.wandb_tags,
        config=config.model_dump(mode="json"),
        dir=str(run_dir),
        mode=mode,
        reinit="create_new",
        settings=wandb.Settings(
            init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, silent=True, console="off", x_disable_stats=True
        ),
    )
    tracker.start()
    tracker.run.define_metric("*", step_metric="samples")
    return tracker


def _run_id(run_dir: Path) -> tuple[str, bool]:
    """The W&B run of a run folder, and whether it is an old one: a resumed run goes on in its W&B run."""
    path = run_dir / "wandb_run_id"
    if path.exists():
        return path.read_text(encoding="utf-8").strip(), True
    run_id = secrets.token_hex(4)
    path.write_text(run_id + "\n", encoding="utf-8")
    return run_id, False


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
