"""saeopt's searches on a table: its own space, samplers, rungs, verdicts, promotion and order of packs.

One worker is played. A pack advances to its next rung or to the end and counts as many samples as its members take;
survivors of a rung go back to the queue, which says what comes next, as in a study whose packs merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import TrialState

from saeopt.config.study import StudySpec
from saeopt.search.collapse import why_all_collapsed
from saeopt.search.halving import Ranking, Standing, rungs_in_samples
from saeopt.search.rounds import n_proposed
from saeopt.search.samplers import make_sampler, n_known
from saeopt.search.space import Space, key_of
from saeopt.search.starts import first_cells
from saeopt.trials.waiting import Merging, Waiting, packs
from tabulated.curves import Log, Pair, Tabulated

_ATTEMPTS = 12


@dataclass
class Trial:
    """A trial of a search that is replayed."""

    number: int
    params: dict[str, Any] | None = None
    samples: int = 0
    paused: bool = False
    ended: bool = False
    asked: optuna.Trial | None = None


@dataclass
class Search:
    """One repetition: a study over the table's space, trained by looking up."""

    table: Tabulated
    spec: StudySpec
    pack: int
    promote_after: bool = False
    """What is paused goes on, the best first, once all have been begun (as with a budget that is left)."""

    def __post_init__(self) -> None:
        rule = self.spec.early_stopping
        self.space, self.log = Space(self.spec), Log(self.table)
        window = self.spec.base["data"]["train_batch_size"]
        self.rungs = rungs_in_samples(rule, self.table.total, window) if rule.type == "halving" else ()
        self.ranking = Ranking(self.spec)
        self.standings: dict[int, dict[int, Standing]] = {rung: {} for rung in self.rungs}
        self.trials = [Trial(number) for number in range(self.spec.max_trials or 0)]
        first = [cell.params for cell in first_cells(self.spec, self.space, n_known(self.spec))]
        for trial, params in zip(self.trials, first, strict=False):
            trial.params = params
        self.seen = {key_of(p) for p in first[: len(self.trials)]}
        self.study = optuna.create_study(directions=["minimize", "minimize"])
        self.how = Merging(self.pack, results_first=n_proposed(self.spec) > 0)

    def run(self, share: float) -> Log:
        """Until nothing is left to do, or a share of the full grid's samples is used up."""
        while self.log.spent < share * self.table.tokens:
            chosen = self._next()
            if not chosen and not self._promoted():
                break
            for trial in chosen:
                if trial.params is None:
                    trial.params = self._proposed(trial)
            if chosen:
                self._advance(chosen)
        return self.log

    def _next(self) -> list[Trial]:
        ready = [self._waiting(t) for t in self.trials if not t.paused and not t.ended]
        learns = self.how.results_first
        known = {w.trial_id for w in ready if not learns or self.trials[w.trial_id].params is not None}
        for pack, size in packs(ready, known, self.pack, self.how.most):
            return [self.trials[w.trial_id] for w in pack[:size]]
        return []

    def _waiting(self, trial: Trial) -> Waiting:
        return Waiting(trial.number, trial.number, "stream", trial.samples, False, False, 0, trial.samples)

    def _proposed(self, trial: Trial) -> dict[str, Any]:
        """As a worker asks: again where the sampler repeats itself."""
        trial.asked = self.study.ask()
        for attempt in range(_ATTEMPTS):
            self.study.sampler = make_sampler(self.spec, trial.number, attempt)
            if attempt:
                self.study.tell(trial.asked, state=TrialState.FAIL)
                trial.asked = self.study.ask()
            params = self.space.suggest(trial.asked)
            if key_of(params) not in self.seen:
                break
        self.seen.add(key_of(params))
        return params

    def _advance(self, pack: list[Trial]) -> None:
        samples = pack[0].samples
        rung = next((r for r in self.rungs if r > samples), None)
        until = rung or self.table.total
        self.log.spent += (until - samples) * len(pack)
        for trial in pack:
            trial.samples = until
        if rung is not None:
            self._judge(pack, rung)
            return
        for trial in pack:
            trial.ended = True
            final = self.table.curve(trial.params or {}).final
            self.log.ended.append((self.log.spent, final))
            self._tell(trial, final)

    def _judge(self, pack: list[Trial], rung: int) -> None:
        there = self.standings[rung]
        for trial in pack:
            values = self.table.curve(trial.params or {}).at(rung)
            there[trial.number] = Standing(trial.number, None if self._collapsed(values) else values)
        for number in self.ranking.verdicts(list(there.values()), [t.number for t in pack]):
            self.trials[number].paused = True
            self.log.stopped.append((self.log.spent, self.table.curve(self.trials[number].params or {}).at(rung)))

    def _collapsed(self, values: Pair | None) -> bool:
        rule = self.spec.early_stopping.collapse
        if values is None or rule is None:
            return values is None
        return why_all_collapsed(rule, {"": {"l0": values[0], "fvu": values[1]}}) is not None

    def _tell(self, trial: Trial, final: Pair | None) -> None:
        """The sampler learns of a result; a trial that was given or designed is added with its parameters."""
        state = TrialState.FAIL if self._collapsed(final) else TrialState.COMPLETE
        values = final if state == TrialState.COMPLETE else None
        if trial.asked is not None:
            self.study.tell(trial.asked, values, state)
        elif values is not None:
            by_name = self.space.by_name
            distributions = {name: by_name[name].distribution for name in trial.params or {}}
            self.study.add_trial(
                optuna.trial.create_trial(params=trial.params, distributions=distributions, values=list(values))
            )

    def _promoted(self) -> bool:
        """The best of those that are paused at the highest rung go on, a pack of them."""
        waiting = [t for t in self.trials if t.paused]
        if not self.promote_after or not waiting:
            return False
        highest = max(t.samples for t in waiting)
        wanted = {t.number for t in waiting if t.samples == highest}
        ranked = [n for n in self.ranking.order(list(self.standings[highest].values())) if n in wanted]
        for number in ranked[: self.pack]:
            self.trials[number].paused = False
        return bool(ranked)
