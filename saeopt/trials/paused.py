"""What becomes of paused trials: promoted they go on from their rung; at the study's end they are pruned there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from saeopt.config.study import StudySpec
from saeopt.console import log
from saeopt.runs.folder import RunFolder
from saeopt.trials import budget, states
from saeopt.trials import internals as db
from saeopt.trials.attributes import PAUSED_AT, REASON
from saeopt.trials.rungs import Rung
from saeopt.trials.states import PAUSED, PRUNED, RUNNING, WAITING, State
from saeopt.trials.storage import Store, check_identity
from saeopt.trials.waiting import PROMOTED


@dataclass(frozen=True)
class Paused:
    """A trial that stands behind others at a rung."""

    trial_id: int
    number: int
    samples: int
    """Of the rung."""
    values: list[float] | None
    limits: Mapping[str, float]
    """What its end tells the sampler."""


def paused(connection: db.Connection, study_id: int, ended: bool = False) -> list[Paused]:
    """All paused trials, in the order of their numbers; with `ended` those that were paused until the study's end."""
    numbers = db.numbers_in_state(connection, study_id, PRUNED if ended else WAITING)
    marks = db.attrs_of(connection, db.trial_attrs, numbers, [db.PAUSED])
    told: dict[int, dict[str, Any]] = {trial_id: mark for (trial_id, _), mark in marks.items()}
    return [
        Paused(i, number, int(told[i]["samples"]), told[i].get("values"), told[i].get("limits") or {})
        for i, number in numbers.items()
        if i in told
    ]


def numbers(connection: db.Connection, study_id: int) -> set[int]:
    """The trials that can be promoted."""
    found = [*paused(connection, study_id), *paused(connection, study_id, ended=True)]
    return {trial.number for trial in found}


def promote(store: Store, study_id: int, wanted: Iterable[int], *, by_hand: bool = True) -> list[int]:
    """Let paused trials go on from their rung, also after the study's end; returns the numbers of those that do.

    What a person promotes (`by_hand`) no later rung pauses again.
    """
    asked, promoted = set(wanted), []
    with store.write() as connection:
        origins: list[tuple[State, bool]] = [(PAUSED, False), (PRUNED, True)]
        for of, ended in origins:
            chosen = {t.trial_id: t.number for t in paused(connection, study_id, ended) if t.number in asked}
            for trial_id in states.move(connection, chosen, WAITING, of=of):
                db.forget_result(connection, trial_id)
                db.drop_attrs(connection, db.trial_user_attrs, trial_id, [REASON, PAUSED_AT])
                if by_hand:
                    db.set_attrs(connection, db.trial_attrs, trial_id, {PROMOTED: True})
                promoted.append(chosen[trial_id])
    return sorted(promoted)


def stand_again(connection: db.Connection, study_id: int) -> list[int]:
    """After the study's end, what was paused until then is paused again, where it stood; returns the numbers."""
    there = {trial.trial_id: trial.number for trial in paused(connection, study_id, ended=True)}
    moved = states.move(connection, there, PAUSED, of=PRUNED)
    for trial_id in moved:
        db.forget_result(connection, trial_id)
    return sorted(there[trial_id] for trial_id in moved)


class Ending:
    """The end of a study with rungs, as one worker sees it."""

    def __init__(self, store: Store, study_id: int, spec: StudySpec, identity: str | None) -> None:
        self.store, self.study_id, self.spec, self.identity = store, study_id, spec, identity

    def step(self, most: int) -> bool:
        """Where nothing runs and nothing may be begun: what is left of the budget goes to the best paused trials, up to
        `most` of them; without a budget, what is paused ends. Whether there was something to do."""
        rule = self.spec.early_stopping
        if rule.type != "halving":
            return False
        if best := self._best(most):
            promoted = promote(self.store, self.study_id, best, by_hand=False)
            who = f"trial{'s'[: len(promoted) != 1]} {', '.join(map(str, promoted))}"
            log.info("study %s: the budget lets %s go on from the rung", self.spec.name, who)
            return bool(promoted)
        ended = finish(self.store, self.study_id, self.identity, keep=rule.keep_paused, spec=self.spec)
        for number in ended if not rule.keep_paused else ():
            RunFolder(self.spec.run_dir(number)).drop_checkpoints()
        if ended:
            go_on = self.store.command("study", "promote", self.spec.name, "TRIAL")
            more = f"; to let one go on: {go_on}" if rule.keep_paused else ""
            log.info("study %s: %d paused trials ended at their rungs%s", self.spec.name, len(ended), more)
        return bool(ended)

    def _best(self, most: int) -> list[int]:
        """The paused trials that go on next: of the highest rung, the best first; none where no budget is left."""
        with self.store.read() as connection:
            check_identity(connection, self.study_id, self.identity)
            where = (connection, self.study_id, self.spec)
            now = db.counts(connection, self.study_id)
            idle = now[WAITING.name] + now[RUNNING.name] == 0  # asked again: another worker may have promoted some
            goes_on = idle and budget.is_left(*where) and budget.why_over(*where) is None
            there = paused(connection, self.study_id) if goes_on else []
        if not there:
            return []
        highest = max(trial.samples for trial in there)
        wanted = {trial.number for trial in there if trial.samples == highest}
        rung = Rung(self.store, self.study_id, self.spec)
        ranked = [number for number in rung.ranking.order(rung.standings(highest)) if number in wanted]
        return (ranked or sorted(wanted))[:most]


def finish(
    store: Store, study_id: int, identity: str | None, *, keep: bool = True, spec: StudySpec | None = None
) -> list[int]:
    """Where nothing runs and nothing waits, end what is paused; returns the numbers of the trials that ended so.

    What waits in vain, since the budget of `spec` is used up, keeps nothing from ending. With `keep` they may be
    promoted later. In one transaction: whoever ends the study, each of them ends once.
    """
    with store.write() as connection:
        check_identity(connection, study_id, identity)
        there = {trial.trial_id: trial for trial in paused(connection, study_id)}
        now = db.counts(connection, study_id)
        over = spec is not None and budget.why_over(connection, study_id, spec) is not None
        if not there or now[RUNNING.name] > 0 or (now[WAITING.name] > 0 and not over):
            return []
        moved = states.move(connection, there, PRUNED, of=PAUSED)
        for trial in (there[trial_id] for trial_id in moved):
            if trial.values is not None:
                db.set_values(connection, trial.trial_id, trial.values)
            db.set_attrs(connection, db.trial_attrs, trial.trial_id, db.constraint_attrs(trial.limits))
            if not keep:
                db.drop_attrs(connection, db.trial_attrs, trial.trial_id, [db.PAUSED])
    return sorted(there[trial_id].number for trial_id in moved)
