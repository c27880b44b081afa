"""What a study may spend, has spent, and why it has ended: for `create`, `status` and the dashboard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from saeopt.config.limits import UNITS, Budget
from saeopt.config.study import StudySpec
from saeopt.errors import UserError
from saeopt.trials import budget
from saeopt.trials import internals as db
from saeopt.trials.budget import Account, amount
from saeopt.trials.storage import Store, check_identity

BUDGET, ENDED = "budget", "ended"
"""Study (for the dashboard and other programs): what is spent of its budget; why no trial is begun any more."""


@dataclass(frozen=True)
class Spending:
    """What is known of a study's budget and end."""

    account: Account = field(default_factory=lambda: Account({}, {}))
    over: str | None = None
    """Why no trial is begun any more."""

    @property
    def text(self) -> str:
        """`3.2 of 10 gpu_hours, 5 of 40 trials`; empty without a budget."""
        return ", ".join(map(self.account.text, self.account.limits))

    def lines(self, command: Callable[..., str], name: str) -> Iterator[str]:
        """For `status`."""
        if self.text:
            yield f"budget: {self.text}"
        size = self.account.spent.get("disk_gb")
        if size is not None and "disk_gb" not in self.account.limits:
            yield f"run folders: {gigabytes(1e9 * size)}"
        if self.over:
            unit = next(iter(self.account.used_up), None)
            words = [] if unit is None else ["--budget", f"{unit}=NUMBER"]
            yield f"ended: {self.over}; go on: {command('study', 'resume', name, *words)}"
            if unit == "disk_gb":
                yield f"make room: {command('study', 'clean', name)}"


def spending(store: Store, study_id: int, spec: StudySpec) -> Spending:
    """How a study stands."""
    with store.read() as connection:
        return Spending(budget.account(connection, study_id, spec), budget.why_over(connection, study_id, spec))


def show(store: Store, study_id: int, spec: StudySpec, identity: str | None) -> None:
    """Say in the study's attributes what the dashboard shows of it."""
    found = spending(store, study_id, spec)
    told = {BUDGET: found.text, ENDED: found.over or ""}
    with store.write() as connection:
        check_identity(connection, study_id, identity)
        known = db.get_attrs(connection, db.study_user_attrs, study_id)
        news = {name: text for name, text in told.items() if text != known.get(name, "")}
        if news:
            db.set_attrs(connection, db.study_user_attrs, study_id, news)


def limits_text(spec: StudySpec) -> Iterator[str]:
    """For `create`: what ends the study before its last trial."""
    if spec.budget is not None:
        limits = spec.budget.limits
        said = ", ".join(f"{amount(unit, value)} {unit}" for unit, value in limits.items())
        at_once = " or ".join(unit for unit in budget.AT_ONCE if unit in limits)
        then = f"; when {at_once} are used up, packs checkpoint and go back to the queue" if at_once else ""
        yield f"budget of all workers: {said}{then}"
    if spec.constraints:
        yield "constraints: " + ", ".join(f"{name} {text}" for name, text in spec.constraints.items())
    if (rule := spec.stop_when) is not None:
        yield f"ends by itself when {rule.over} trials have not made its front {rule.hypervolume_gain:.3g} larger"


def given_budget(changes: list[str]) -> Budget | None:
    """The budget of `--budget UNIT=NUMBER …`. :class:`UserError` where it is none."""
    from pydantic import ValidationError

    from saeopt.config.base import explain

    if not changes:
        return None
    raw = {}
    for change in changes:
        unit, sign, number = change.partition("=")
        if not sign:
            raise UserError(f"--budget {change}: UNIT=NUMBER is needed, as in {UNITS[0]}=10")
        raw[unit.strip()] = number.strip()
    try:
        return Budget.model_validate(raw)
    except ValidationError as error:
        raise explain(error, "--budget", {(): list(Budget.model_fields)}) from None


def gigabytes(size: float) -> str:
    """`1.2 GB`, `34 MB`, `5.6 kB`."""
    unit, of = next((u, n) for u, n in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if size >= n or u == "kB")
    return f"{size / of:.3g} {unit}"


def waiting_again(name: str, numbers: Sequence[int]) -> str:
    """Which trials have gone back into the queue."""
    many = "1 trial of study {} waits again" if len(numbers) == 1 else f"{len(numbers)} trials of study {{}} wait again"
    return many.format(name) + (f": {', '.join(map(str, numbers))}" if numbers else "")


def going_on(store: Store, name: str, numbers: Sequence[int]) -> Iterator[str]:
    """Which trials have gone back into the queue, and what trains them: more budget first, where it is used up."""
    yield waiting_again(name, numbers)
    found = spending(store, store.study_id(name), store.spec(name))
    if found.over:
        yield from (f"  {line}" for line in found.lines(store.command, name) if line.startswith("ended: "))
    yield f"  work: {store.command('worker', name)}"


def resume(store: Store, name: str, changes: list[str]) -> list[str]:
    """Let a study go on that was stopped or has ended by itself; the lines that a person is told.

    Raises:
        UserError: its budget is used up, and nothing more or no more than was spent is given.
    """
    from saeopt.trials import claims, paused

    study_id, spec, given = store.study_id(name), store.spec(name), given_budget(changes)
    with store.write() as connection:
        reason = budget.go_on(connection, study_id, spec, given)
        unit = next(iter(budget.account(connection, study_id, spec).used_up), UNITS[0])
    if reason is not None:
        more = store.command("study", "resume", name, "--budget", f"{unit}=NUMBER")
        raise UserError(f"study {name}: {reason}; give more in all than that: {more}")
    claims.set_stopped(store, study_id, False)
    show(store, study_id, spec, None)
    with store.write() as connection:
        again = paused.stand_again(connection, study_id) if budget.is_left(connection, study_id, spec) else []
        waits = any(db.counts(connection, study_id)[state] for state in ("WAITING", "RUNNING"))
        ended = [trial.number for trial in paused.paused(connection, study_id, ended=True)]
    if again:
        what = "1 paused trial goes" if len(again) == 1 else f"{len(again)} paused trials go"
        when = "while the budget lasts, the best first" + (", once nothing else waits" if waits else "")
        return [f"study {name} goes on, and {what} on {when}", f"  work: {store.command('worker', name)}"]
    if waits or not ended:
        return [f"study {name} goes on: its trials can be claimed again"]
    promote = store.command("study", "promote", name, *ended[:3]) + (" …" if len(ended) > 3 else "")
    return [f"study {name}: no trial waits; {len(ended)} ended while they were paused, and go on with", f"  {promote}"]
