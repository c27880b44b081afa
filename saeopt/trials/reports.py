"""What running trials say to the store, sent by a thread of its own: training never waits for a database."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from saeopt.config.run import RunConfig
from saeopt.config.settings import redact
from saeopt.config.study import StudySpec
from saeopt.console import log
from saeopt.files import is_evaluation, read_metrics
from saeopt.metrics import value_of
from saeopt.runs.folder import bytes_of
from saeopt.runs.names import METRICS_FILE
from saeopt.search import pruning
from saeopt.search.collapse import why_all_collapsed
from saeopt.search.objectives import Evaluation, objective_names, objective_values
from saeopt.search.pruning import Curve, Patience
from saeopt.search.stopping import stand_in
from saeopt.trials import claims
from saeopt.trials import internals as db
from saeopt.trials.attributes import CURVE_NAME
from saeopt.trials.states import Claim
from saeopt.trials.stopper import CURVE, Report, Stopper
from saeopt.trials.storage import Store, persistently

T = TypeVar("T")


@dataclass
class Progress:
    """A trial that is being trained."""

    claim: Claim
    config: RunConfig
    total: int = 0
    reported: int = 0
    patience: Patience = field(default_factory=Patience)
    curve: Curve = field(default_factory=dict)
    verdict: str | None = None


class Reports(threading.Thread):
    """Collects log steps and evaluations, sends at most fifty per trial, and asks whether the trial should stop."""

    def __init__(self, store: Store, study_id: int, spec: StudySpec, settle: Callable[[], None] | None = None) -> None:
        super().__init__(name="saeopt-reports", daemon=True)
        self.store, self.study_id, self.spec, self.settle = store, study_id, spec, settle
        self.stopper = Stopper(store, study_id, spec)
        self._named = self._asked = False
        self._fresh: list[tuple[Progress, int]] = []  # reported, and not judged yet: of the sending thread
        self.from_evaluations = bool(spec.base.get("eval_every_n_samples"))
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue()

    def run(self) -> None:
        """Send in order; errors that do not pass are logged and skipped."""
        while (action := self._queue.get()) is not None:
            try:
                persistently(action, "reporting")
            except Exception as error:
                log.warning("a report was lost: %s: %s", type(error).__name__, redact(str(error))[:300])
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def stop(self) -> None:
        """End the thread after what is waiting, but do not wait long for a lost store."""
        self._queue.put(None)
        self.join(timeout=2)

    def asked(self, question: Callable[[], T], otherwise: T, gives_up: Callable[[], bool]) -> T:
        """The answer to a question that is put after all that waits; `otherwise` where the worker `gives_up` before,
        or the store stays away. Whoever asks waits, through an outage too: the answer decides what is trained on."""
        box: list[T] = []
        self._queue.put(lambda: box.append(question()))
        while not box and self._queue.unfinished_tasks and self.is_alive() and not gives_up():
            time.sleep(0.005)
        return box[0] if box else otherwise

    def flush(self, seconds: float) -> None:
        """Wait until all that was handed in has been sent, for at most `seconds`."""
        end = time.monotonic() + seconds
        while self._queue.unfinished_tasks and time.monotonic() < end and self.is_alive():
            time.sleep(0.002)

    # ---- from the training loop
    def started(self, progress: Progress, samples: int, total: int) -> None:
        """A trial starts, perhaps in the middle: its earlier curve is read back, and its reports are counted again."""
        progress.total, progress.reported, progress.patience = total, samples, Patience()
        if samples > 0:
            for then, evaluated, metrics in earlier_reports(self.spec.run_dir(progress.claim.number), samples):
                self._collapse(progress, then, metrics)
                if evaluated == self.from_evaluations:
                    progress.reported = then
            self._queue.put(lambda: self._read_curve(progress))

    def measured(self, progress: Progress, samples: int, metrics: Evaluation, *, evaluated: bool) -> str | None:
        """Metrics of a log step or of an evaluation; returns why the trial should stop, if that is known.

        Once all of its pack have said theirs, :meth:`judge` compares them.
        """
        if found := self._collapse(progress, samples, metrics):
            return found
        if evaluated != self.from_evaluations:
            return progress.verdict
        if evaluated or pruning.is_due(progress.reported, samples, progress.total):
            progress.reported = samples
            values = objective_values(self.spec, metrics)
            shown = values[0] if values is not None else self._stand_in(metrics)
            if shown is not None:
                self._asked = True
                self._queue.put(lambda: self._send(progress, samples, shown, values))
                if not self._named:
                    self._named = True
                    self._queue.put(lambda: self._name_curve(values is not None))
        return progress.verdict

    def judge(self) -> None:
        """All of a pack have been measured: compare them with each other and with everyone else."""
        if self._asked:
            self._asked = False
            self._queue.put(self._judge)

    def _collapse(self, progress: Progress, samples: int, metrics: Evaluation) -> str | None:
        """Why the trial has collapsed, once enough reports in a row have said so."""
        rule = self.spec.early_stopping.collapse
        if rule is None:
            return None
        found = why_all_collapsed(rule, metrics) if samples >= self._warmup(progress) else None
        if progress.patience.report(samples, found is not None) >= rule.patience:
            return f"{found} (after {samples} samples)"
        return None

    def _warmup(self, progress: Progress) -> int:
        return pruning.warmup_samples(self.spec.early_stopping, progress.config, progress.total)

    def checkpointed(self, claim: Claim, samples: int) -> None:
        """The trial can go on from here."""
        self.book()
        self._queue.put(lambda: self._checkpointed(claim, samples))

    def book(self) -> None:
        """Store what this worker has spent so far, before what comes of it is stored."""
        if self.settle is not None:
            self._queue.put(self.settle)

    # ---- in the thread
    def _checkpointed(self, claim: Claim, samples: int) -> None:
        """A refused report means a lost claim, which the heart notices."""
        claims.checkpointed(self.store, claim, samples, bytes_of(self.spec.run_dir(claim.number)))

    def _send(self, progress: Progress, samples: int, shown: float, values: list[float] | None) -> None:
        if values is not None:
            progress.curve[samples] = values
        attrs: Mapping[str, object] = {CURVE: progress.curve} if progress.curve else {}
        if claims.report(self.store, progress.claim, samples, shown, attrs):
            self._fresh.append((progress, samples))

    def _judge(self) -> None:
        told = [Report(p.claim.trial_id, samples, p.total, self._warmup(p)) for p, samples in self._fresh]
        found = self.stopper.reasons(told)
        for progress, _ in self._fresh:
            progress.verdict = found.get(progress.claim.trial_id, progress.verdict)
        self._fresh = []

    def _read_curve(self, progress: Progress) -> None:
        with self.store.read() as connection:
            stored = db.get_attrs(connection, db.trial_attrs, progress.claim.trial_id, CURVE).get(CURVE, {})
        curve = {s: v for s, v in pruning.parse_curve(stored).items() if s <= progress.reported}
        progress.curve = curve | progress.curve

    def _name_curve(self, measured: bool) -> None:
        """Say in the study what the intermediate values of its trials are: Optuna has no name for them."""
        name = objective_names(self.spec)[0] if measured else f"{self._stand_in_name} (mean over hook points)"
        with self.store.write() as connection:
            db.set_attrs(connection, db.study_user_attrs, self.study_id, {CURVE_NAME: name})

    @property
    def _stand_in_name(self) -> str:
        return stand_in(self.spec)

    def _stand_in(self, metrics: Evaluation) -> float | None:
        """A curve for objectives that training does not measure: explained variance or FVU, by direction."""
        found = [value_of(row, self._stand_in_name) for row in metrics.values()]
        if not found or any(v is None or not math.isfinite(v) for v in found):
            return None
        return math.fsum(v for v in found if v is not None) / len(found)


def earlier_reports(run_dir: Path, samples: int) -> Iterator[tuple[int, bool, Evaluation]]:
    """Samples, whether it is an evaluation, and metrics of what a run had reported up to a number of samples."""
    found: dict[tuple[int, bool], dict[str, dict[str, float]]] = {}
    for row in read_metrics(run_dir / METRICS_FILE):
        if row["samples"] <= samples:
            values = {k.removeprefix("eval_"): math.nan if v is None else v for k, v in row.items()}
            found.setdefault((row["samples"], is_evaluation(row)), {})[row["hook_point"]] = values
    for (then, evaluated), metrics in found.items():
        yield then, evaluated, metrics
