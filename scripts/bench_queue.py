"""What the queue would cost in tables of our own, with Optuna touched through its public storage calls alone.

    python scripts/bench_queue.py [postgresql://…]      (default: an SQLite file)

A prototype of claim, beat, report, give back and end (`OwnQueue`): one row per trial in `saeopt_trials` decides, every
change of state is one guarded UPDATE there, and Optuna's tables are a copy for samplers and dashboard. Prints the
statements (and the transactions) per operation beside those of `saeopt.trials`, and what is not exact. CONTRIBUTING.md
("Optuna's tables") says what follows. Optuna 5.0.0.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState, create_trial

from saeopt.config.study_file import study_spec
from saeopt.trials import claims, endings
from saeopt.trials import internals as db
from saeopt.trials.create import create_study
from saeopt.trials.storage import Store

CELLS, PACK = 100, 8
HOOKS = [f"blocks.{i}.hook_resid_pre" for i in range(3)]
EVALUATION = {f"eval/{h}": {"l0": 9.0, "fvu": 0.1} for h in HOOKS} | {f"metric{i}": float(i) for i in range(20)}
_tables = sa.MetaData()
own = sa.Table(
    "saeopt_trials",
    _tables,
    sa.Column("trial_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("study_id", sa.Integer, nullable=False, index=True),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("token", sa.String(32)),
    sa.Column("seen", sa.DateTime),
    sa.Column("stream", sa.String(64)),
    sa.Column("checkpoint", sa.Integer, nullable=False, default=0),
    sa.Column("turn", sa.Integer, nullable=False, default=0),
    sa.Column("result", sa.Text),
)


class OwnQueue:
    """The same operations as `saeopt.trials`, over a table of our own."""

    def __init__(self, store: Store, study_id: int) -> None:
        self.store, self.study_id, self.optuna = store, study_id, store.optuna
        _tables.create_all(store.engine)

    def create(self, n: int) -> None:
        """Optuna has no call for many trials: one each, then our rows in one."""
        space: dict[str, BaseDistribution] = {"lr": FloatDistribution(1e-6, 1.0)}
        cells = [create_trial(state=TrialState.WAITING, params={"lr": 1e-3}, distributions=space) for _ in range(n)]
        ids = [self.optuna.create_new_trial(self.study_id, cell) for cell in cells]
        rows = [{"trial_id": t, "study_id": self.study_id, "number": i, "state": "WAITING", "stream": "s"}
                for i, t in enumerate(ids)]  # fmt: skip
        with self.store.write() as connection:
            connection.execute(sa.insert(own), rows)

    def claim(self, limit: int) -> tuple[str, list[int]]:
        """One look and one guarded update of ours; Optuna's state per trial, for the dashboard."""
        token = uuid.uuid4().hex
        waiting = sa.and_(own.c.study_id == self.study_id, own.c.state == "WAITING")
        with self.store.write() as connection:
            pick = sa.select(own.c.trial_id).where(waiting).order_by(own.c.number).limit(limit)
            ids = connection.execute(pick.with_for_update(skip_locked=True)).scalars().all()
            taken = sa.update(own).where(own.c.trial_id.in_(ids), own.c.state == "WAITING")
            values = {"state": "RUNNING", "token": token, "seen": db.db_now(connection), "turn": own.c.turn + 1}
            mine = list(connection.execute(taken.values(**values).returning(own.c.trial_id)).scalars())
            db.params_of(connection, mine)
        for trial_id in mine:
            self.optuna.set_trial_state_values(trial_id, TrialState.RUNNING)
        return token, mine

    def _guarded(self, holder: str, ids: list[int], **values: Any) -> set[int]:
        """One statement: nothing waits between the look at the claim and the change."""
        with self.store.write() as connection:
            held = sa.and_(own.c.trial_id.in_(ids), own.c.token == holder, own.c.state == "RUNNING")
            return set(
                connection.execute(sa.update(own).where(held).values(**values).returning(own.c.trial_id)).scalars()
            )

    def beat(self, token: str, ids: list[int]) -> set[int]:
        """A sign of life."""
        with self.store.read() as connection:
            now = db.db_now(connection)
        return self._guarded(token, ids, seen=now)

    def report(self, token: str, trial_id: int, step: int, value: float) -> None:
        """Not in one transaction: whoever is taken for dead between the two still writes into Optuna's tables."""
        if self._guarded(token, [trial_id], state="RUNNING"):
            self.optuna.set_trial_intermediate_value(trial_id, step, value)
            self.optuna.set_trial_system_attr(trial_id, "saeopt:curve", {str(step): [value]})

    def release(self, token: str, trial_id: int) -> None:
        """Back to the queue."""
        if self._guarded(token, [trial_id], state="WAITING", token=None):
            self.optuna.set_trial_state_values(trial_id, TrialState.WAITING)

    def finish(self, token: str, trial_id: int, values: list[float], attrs: dict[str, Any]) -> None:
        """Ours decides; the copy follows call by call, and after a crash in between another worker goes on with it."""
        result = json.dumps({"values": values, "attrs": attrs})
        if self._guarded(token, [trial_id], state="COPYING", result=result):
            for key, value in attrs.items():
                self.optuna.set_trial_user_attr(trial_id, key, value)
            self.optuna.set_trial_system_attr(trial_id, "constraints", [-1.0, -1.0])
            self.optuna.set_trial_state_values(trial_id, TrialState.COMPLETE, values)
            with self.store.write() as connection:
                done = sa.and_(own.c.trial_id == trial_id, own.c.state == "COPYING")
                connection.execute(sa.update(own).where(done).values(state="COMPLETE", token=None))


@contextmanager
def counted(store: Store) -> Iterator[dict[str, int]]:
    """Statements and transactions that a store is asked for meanwhile."""
    found = {"statements": 0, "commits": 0}

    def statement(_connection: Any, _cursor: Any, text: str, *_rest: Any) -> None:
        found["statements"] += not text.startswith(("BEGIN", "COMMIT", "PRAGMA"))
        found["commits"] += text.startswith("COMMIT")  # SQLite's, which we write ourselves

    def commit(_connection: Any) -> None:
        found["commits"] += 1

    sa.event.listen(store.engine, "before_cursor_execute", statement)
    sa.event.listen(store.engine, "commit", commit)
    yield found
    sa.event.remove(store.engine, "before_cursor_execute", statement)
    sa.event.remove(store.engine, "commit", commit)


def measured(store: Store, operation: Callable[[], Any]) -> tuple[str, Any]:
    """`statements/transactions`, and what the operation gave."""
    with counted(store) as found:
        result = operation()
    return f"{found['statements']}/{found['commits']}", result


def today(store: Store) -> dict[str, str]:
    """The operations of `saeopt.trials`."""
    base = {
        "tlens_model_path": "somewhere",
        "data": {"dataset_name": "x.jsonl", "n_train_samples": 64, "train_batch_size": 4},
        "saes": {"sae_type": "relu", "sae_positions": HOOKS, "sparsity_coeff": 0.1},
    }
    space = {"lr": [(i + 1) * 1e-4 for i in range(CELLS)]}
    spec = study_spec({"name": "today", "base": base, "space": space}, "s.yaml")
    row: dict[str, str] = {}
    row[f"create {CELLS} cells"], made = measured(store, lambda: create_study(store, spec))
    key, identity = made.study_id, store.identity(made.study_id)
    row["claim a pack of 8"], pack = measured(store, lambda: claims.claim(store, key, PACK, {"worker": "w"}, identity))
    row["beat for 8"], _ = measured(store, lambda: claims.beat(store, pack))
    curve = {"saeopt:curve": {8: [0.5]}}
    row["report"], _ = measured(store, lambda: claims.report(store, pack[0], 8, 0.5, curve))
    row["give back"], _ = measured(store, lambda: endings.release(store, pack[1]))
    limits = {"min_l0": -1.0, "max_fvu": -1.0}
    row["end"], _ = measured(
        store, lambda: endings.finish(store, pack[0], "COMPLETE", [1.0, 2.0], constraints=limits, attrs=EVALUATION)
    )
    endings.fail(store, pack[2], "no")
    row["retry of a failed trial"], _ = measured(store, lambda: endings.retry(store, key))
    return row


def prototype(store: Store) -> dict[str, str]:
    """The same over our own table."""
    study = optuna.create_study(storage=store.optuna, study_name="own", directions=["minimize", "minimize"])
    queue, row = OwnQueue(store, db.study_id_of(study)), {}
    row[f"create {CELLS} cells"], _ = measured(store, lambda: queue.create(CELLS))
    row["claim a pack of 8"], (token, ids) = measured(store, lambda: queue.claim(PACK))
    row["beat for 8"], _ = measured(store, lambda: queue.beat(token, ids))
    row["report"], _ = measured(store, lambda: queue.report(token, ids[0], 8, 0.5))
    row["give back"], _ = measured(store, lambda: queue.release(token, ids[1]))
    row["end"], _ = measured(store, lambda: queue.finish(token, ids[0], [1.0, 2.0], EVALUATION))
    store.optuna.set_trial_state_values(ids[2], TrialState.FAIL)
    try:
        store.optuna.set_trial_state_values(ids[2], TrialState.WAITING)
    except UpdateFinishedTrialError:
        row["retry of a failed trial"] = "refused"
    return row


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storage", nargs="?", help="default: an SQLite file")
    storage = parser.parse_args().storage
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(storage or f"sqlite:///{folder}/store.db")
        now, own_tables = today(store), prototype(store)
        print(f"{'statements/transactions':26}{'today':>12}{'own tables':>12}")  # noqa: T201
        for name in now:
            print(f"{name:26}{now[name]:>12}{own_tables[name]:>12}")  # noqa: T201
        store.close()


if __name__ == "__main__":
    main()
