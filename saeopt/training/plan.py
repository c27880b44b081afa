"""What is to be trained, what comes of it, and who watches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from saeopt.config.run import RunConfig
from saeopt.runs.owner import Owner

Metrics = dict[str, dict[str, float]]
"""Hook point → metric → value."""


@dataclass(frozen=True)
class TrialPlan:
    """One run of a pack: a name that is unique in the pack, its config, its folder, and whether to go on from there."""

    name: str
    config: RunConfig
    run_dir: Path
    resume: bool = False
    owner: Owner | None = None
    """Who has taken the folder for this run; None: the run takes it."""


@dataclass
class TrialResult:
    """How a trial of a pack ended.

    finished: all samples were consumed; stopped: the observer gave a reason; paused: others are ahead of it at a rung,
    and it can be resumed there; diverged: NaN or Inf in every
    member; interrupted: a checkpoint was written and the trial can be resumed; lost: another process has the trial
    now, and nothing was written. `reason` also names single members that diverged in a trial that finished.
    """

    status: Literal["finished", "stopped", "paused", "diverged", "interrupted", "lost"]
    samples: int
    reason: str | None = None
    evaluation: Metrics = field(default_factory=dict)
    checkpoint: Path | None = None
    cost: dict[str, float] = field(default_factory=dict)
    """Of a finished one: see `saeopt.training.cost`."""


@dataclass(frozen=True)
class Rungs:
    """Where all trials of a pack are compared with each other and with others."""

    samples: tuple[int, ...] = ()
    held_out: int = 0
    """Held-out samples that are evaluated there; 0: what training measures decides."""


class Observer:
    """What a caller learns and decides while a pack trains. The default decides nothing."""

    def on_start(self, name: str, samples: int, total: int) -> None:
        """A trial starts at `samples` of `total`."""

    def on_log(self, name: str, samples: int, metrics: Metrics) -> str | None:
        """Training metrics of a log step; a returned reason stops the trial."""
        return None

    def on_eval(self, name: str, samples: int, metrics: Metrics) -> str | None:
        """Held-out metrics; a returned reason stops the trial."""
        return None

    def on_evaluated(self, samples: int) -> dict[str, str]:
        """All trials of the pack have been evaluated; reasons of those that should stop, by name."""
        return {}

    def rungs(self, total: int, window: int) -> Rungs:
        """Where to compare trials of so many samples, which are consumed a window at a time."""
        return Rungs()

    def on_rung(self, samples: int, metrics: Mapping[str, Metrics]) -> dict[str, str]:
        """All trials of the pack (by name) have come to a rung; reasons of those that are paused there. Afterwards
        :meth:`should_interrupt` is asked: the others may be wanted elsewhere."""
        return {}

    def on_checkpoint(self, name: str, samples: int, path: Path) -> None:
        """A checkpoint is complete on the disk."""

    def lost(self, name: str) -> bool:
        """True: another worker has the trial; it is dropped and nothing is written. Polled at every step."""
        return False

    def on_end(self, name: str, result: TrialResult) -> None:
        """A trial has ended, also where others of its pack go on."""

    def draw(self, name: str, folder: Path) -> None:
        """The files of a trial that has ended are complete: pictures for people may be drawn of them."""

    def progress(self, samples: int, total: int, tokens_per_s: float) -> None:
        """The stream has come so far. After a log step: all trials have told their metrics."""

    def evaluation_takes(self, samples: float) -> None:
        """The evaluation at the end will take about as long as so many training samples."""

    def should_interrupt(self) -> bool:
        """True: write checkpoints and return `interrupted` results. Polled at every step."""
        return False
