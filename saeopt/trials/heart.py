"""The worker's sign of life, and its eye on the others: one thread that no lost connection kills."""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections.abc import Iterable

from saeopt.config.settings import redact
from saeopt.config.study import StudySpec
from saeopt.console import log
from saeopt.trials import budget, claims, endings, presence
from saeopt.trials import internals as db
from saeopt.trials.clock import PackClock
from saeopt.trials.presence import Presence
from saeopt.trials.states import Claim
from saeopt.trials.storage import Store, StudyGone, check_identity, is_transient


class Heart(threading.Thread):
    """Beats for the claims that it holds, notices lost claims and a stopped study, and reaps dead workers' trials."""

    def __init__(self, store: Store, study_id: int, spec: StudySpec, me: Presence, identity: str | None = None) -> None:
        super().__init__(name="saeopt-heart", daemon=True)
        self.store, self.study_id, self.spec, self.me, self.identity = store, study_id, spec, me, identity
        self.study_stopped = threading.Event()
        self.study_gone = threading.Event()
        self.budget_spent = threading.Event()
        """What running packs go on spending is used up."""
        self.meter = budget.Meter(me.worker, identity)
        self._held: dict[int, Claim] = {}
        self._lost: set[str] = set()
        self._closing: set[int] = set()
        self._guard = threading.Lock()
        self._wake = threading.Event()
        self._end = threading.Event()
        self._seen: dict[int, tuple[dt.datetime, float]] = {}
        self._outage = False
        self._progress: float | None = None
        self._enough: float | None = None
        """Tokens of this worker with which the budget is used up, if no other spends any."""
        self.clock = PackClock()

    def hold(self, taken: Iterable[Claim]) -> None:
        """Beat for these trials from now on."""
        with self._guard:
            self._held |= {c.trial_id: c for c in taken}
            self.me.trials = sorted(c.number for c in self._held.values())
        self._wake.set()

    def closing(self, claim: Claim) -> None:
        """The trial is being ended or given back: go on beating, but its claim may end at any moment."""
        self._closing.add(claim.trial_id)

    def drop(self, claim: Claim) -> None:
        """The trial has ended or was given back."""
        with self._guard:
            self._closing.discard(claim.trial_id)
            if self._held.get(claim.trial_id) == claim:
                del self._held[claim.trial_id]
            self.me.trials = sorted(c.number for c in self._held.values())

    def training(self, trials: int) -> None:
        """A pack of this number of trials starts; 0: it has ended."""
        self._progress = time.monotonic() if trials else None
        if trials:
            self.meter.begin()
            self.clock.claimed(trials)
        else:
            self.meter.end()
            self.clock.over()

    def pulse(self) -> None:
        """The training has made progress."""
        if self._progress is not None:
            self._progress = time.monotonic()

    def held(self) -> list[Claim]:
        """The claims that are being kept alive."""
        with self._guard:
            return list(self._held.values())

    def has_lost(self, claim: Claim) -> bool:
        """Whether somebody else has taken this worker for dead and its trial back."""
        return claim.token + str(claim.trial_id) in self._lost

    def run(self) -> None:
        """Until :meth:`stop`; an error costs one beat."""
        while not self._end.is_set():
            self._wake.clear()
            try:
                self._once()
                self._outage = False
            except Exception as error:
                self._trouble(error)
            self._wake.wait(min(1.0, self.spec.heartbeat) if self._outage else self.spec.heartbeat)

    def stop(self) -> None:
        """End the thread and take the worker off the list."""
        self._end.set()
        self._wake.set()
        self.join(timeout=5)
        try:
            presence.leave(self.store, self.study_id, self.me)
        except Exception as error:
            if not is_transient(error):
                raise

    def _trouble(self, error: Exception) -> None:
        if not self._outage:
            cause = redact(" ".join(str(error).split())[:200])
            log.warning("no heartbeat, the store cannot be reached: %s: %s", type(error).__name__, cause)
        self._outage = True
        # Everybody's heartbeats are old after an outage: nobody is dead until observed anew.
        self._seen.clear()

    def _once(self) -> None:
        mine = self.held()
        ours = claims.beat(self.store, mine)
        for claim in mine:
            if claim.trial_id not in ours and claim.trial_id not in self._closing and claim in self.held():
                log.warning("trial %d was taken for dead and given to another worker", claim.number)
                self._lost.add(claim.token + str(claim.trial_id))
                self.drop(claim)
        with self.store.read() as connection:
            try:
                check_identity(connection, self.study_id, self.identity)
            except StudyGone:
                self.study_gone.set()
                return
            if claims.is_stopped(connection, self.study_id):
                self.study_stopped.set()
            else:
                self.study_stopped.clear()
            has_budget = budget.has_budget(connection, self.study_id, self.spec)
            alive = db.running(connection, self.study_id)
        if has_budget:
            self.settle()
        else:
            self._over(budget.Account({}, {}))
        self._reap({t: beat for t, beat in alive.items() if t not in ours})
        progress = self._progress
        self.me.quiet = None if progress is None else time.monotonic() - progress
        self.me.pack, self.me.left, self.me.whole = self.clock.trials, self.clock.left, self.clock.whole
        presence.beat(self.store, self.study_id, self.me, self.identity, self.meter)

    def settle(self) -> None:
        """Book what was spent, and see whether that was all."""
        with self.store.write() as connection:
            booked = self.meter.book(connection, self.study_id)
            limited = budget.has_budget(connection, self.study_id, self.spec)
            spent = budget.account(connection, self.study_id, self.spec) if limited else budget.Account({}, {})
        left = spent.left.get("tokens")
        self._enough = None if left is None else booked + left
        self._over(spent)

    def reached(self, trial: str, samples: int) -> None:
        """A trial has come this far. A small study spends much between two beats: what is left is watched here too."""
        self.meter.reached(trial, samples)
        if self._enough is not None and self.meter.tokens >= self._enough:
            self.budget_spent.set()

    def _over(self, spent: budget.Account) -> None:
        units = [unit for unit in spent.used_up if unit in budget.AT_ONCE]
        if units and not self.budget_spent.is_set():
            log.info("study %s: %s", self.spec.name, spent.why_over)
        (self.budget_spent.set if units else self.budget_spent.clear)()

    def _reap(self, others: dict[int, dt.datetime]) -> None:
        """Reap what this worker itself has seen silent: for the whole grace, or for two heartbeats where the sign is
        also too old by the store's clock. That clock may be wrong: on SQLite it is that of the host that writes."""
        now = time.monotonic()
        seen = {
            t: self._seen[t] if self._seen.get(t, (None,))[0] == beat else (beat, now) for t, beat in others.items()
        }
        self._seen = seen
        suspects = [t for t, (_, since) in seen.items() if now - since >= min(2 * self.spec.heartbeat, self.spec.grace)]
        if not suspects:
            return
        silent = {t: seen[t][0] for t in suspects if now - seen[t][1] >= self.spec.grace}
        limits = (self.spec.grace, self.spec.max_losses)
        for trial_id in endings.reap(self.store, self.study_id, suspects, *limits, silent):
            log.warning("a worker was lost: its trial (key %d) is back in the queue", trial_id)
            self._seen.pop(trial_id, None)
