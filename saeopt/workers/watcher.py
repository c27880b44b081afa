"""What a worker hears of a pack while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from saeopt.config.keys import stream_key
from saeopt.console import log
from saeopt.search import halving
from saeopt.training.plan import Metrics, Observer, Rungs, TrialResult
from saeopt.trials.attributes import mean_metric, number
from saeopt.trials.heart import Heart
from saeopt.trials.packing import Assignment
from saeopt.trials.reports import Reports
from saeopt.trials.rungs import Rung
from saeopt.trials.storage import is_transient
from saeopt.workers.outcomes import Outcomes

_STORE_SECONDS = 5.0
"""How long the others of a pack wait while the result of a trial that has ended is stored."""
_VERDICT_SECONDS = 3.0
"""How long a pack waits after an evaluation to hear which of its trials should stop."""


class Watcher(Observer):
    """Passes on what a pack says; stores a trial's result as soon as it has ended."""

    def __init__(
        self,
        heart: Heart,
        reports: Reports,
        outcomes: Outcomes,
        leaving: Callable[[], bool],
        pack: Sequence[Assignment],
        rung: Rung | None = None,
        most: int = 1,
    ) -> None:
        self.heart, self.reports, self.outcomes, self.leaving = heart, reports, outcomes, leaving
        self.pack = {assignment.name: assignment for assignment in pack}
        self.rung, self.most, self._wanted_elsewhere = rung, most, False

    def on_start(self, name: str, samples: int, total: int) -> None:
        self.heart.clock.begun(samples, total)
        self.heart.meter.start(name, samples, self.pack[name].config.data.context_length)
        self.reports.started(self.outcomes.progress[name], samples, total)

    def on_log(self, name: str, samples: int, metrics: Metrics) -> str | None:
        means = {key: mean_metric(metrics, key) for key in ("l0", "fvu")}
        newest = {key: short for key, value in means.items() if (short := number(value)) is not None}
        me = self.heart.me
        me.latest = {**me.latest, name: {"samples": samples, **newest}}  # a new one: the heart's thread reads it
        return self._measured(name, samples, metrics, evaluated=False)

    def on_eval(self, name: str, samples: int, metrics: Metrics) -> str | None:
        return self._measured(name, samples, metrics, evaluated=True)

    def on_evaluated(self, samples: int) -> dict[str, str]:
        self.reports.judge()
        self.reports.flush(_VERDICT_SECONDS)
        verdicts = {name: progress.verdict for name, progress in self.outcomes.progress.items()}
        return {name: verdict for name, verdict in verdicts.items() if verdict is not None}

    def rungs(self, total: int, window: int) -> Rungs:
        if self.rung is None:
            return Rungs()
        spec = self.rung.spec
        return Rungs(halving.rungs_in_samples(spec.early_stopping, total, window), halving.held_out(spec))

    def on_rung(self, samples: int, metrics: Mapping[str, Metrics]) -> dict[str, str]:
        """Without a store nobody is judged, and a worker that leaves judges nobody: whoever goes on from here does."""
        assert self.rung is not None
        rung, there = self.rung, {self.pack[name].claim: rows for name, rows in metrics.items()}
        total = max(self.outcomes.progress[name].total for name in metrics)
        reasons = self.reports.asked(lambda: rung.arrive(there, samples, total), dict[int, str](), self.leaving)
        self.reports.asked(self.heart.settle, None, self.leaving)
        behind = {name: reasons[n] for name in metrics if (n := self.pack[name].claim.number) in reasons}
        stay = [self.pack[name] for name in metrics if name not in behind]
        if stay and not self.leaving():
            where = ([a.claim for a in stay], stream_key(stay[0].config), samples, self.most)
            self._wanted_elsewhere = self.reports.asked(lambda: rung.others_come(*where), False, self.leaving)
        return behind

    def _measured(self, name: str, samples: int, metrics: Metrics, *, evaluated: bool) -> str | None:
        progress = self.outcomes.progress[name]
        self.heart.reached(name, samples)
        return self.reports.measured(progress, samples, metrics, evaluated=evaluated)

    def on_checkpoint(self, name: str, samples: int, path: Path) -> None:
        self.heart.reached(name, samples)
        self.reports.checkpointed(self.pack[name].claim, samples)

    def draw(self, name: str, folder: Path) -> None:
        from saeopt.views.plots import plot_run

        plot_run(folder)

    def on_end(self, name: str, result: TrialResult) -> None:
        self.heart.reached(name, result.samples)
        if result.status == "interrupted" or self.leaving():
            return
        self.reports.book()
        self.reports.flush(_STORE_SECONDS)
        try:
            self.outcomes.store_safely(self.pack[name], result, _STORE_SECONDS)
        except Exception as error:
            if not is_transient(error):
                raise
            log.info("trial %s is stored with the rest of its pack: the store cannot be reached", name)

    def lost(self, name: str) -> bool:
        return self.heart.has_lost(self.pack[name].claim)

    def progress(self, samples: int, total: int, tokens_per_s: float) -> None:
        me = self.heart.me
        me.samples, me.total, me.tokens_per_s = samples, total, tokens_per_s
        self.heart.clock.moved(samples)
        self.reports.judge()

    def evaluation_takes(self, samples: float) -> None:
        self.heart.clock.evaluation_takes(samples)

    def should_interrupt(self) -> bool:
        return self.leaving() or self._wanted_elsewhere
