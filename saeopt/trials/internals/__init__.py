"""The one place that knows Optuna's tables and private names; `tests/search/test_internals.py` fails when they move.

Why at all: Optuna's own queue hands a waiting trial to two workers on SQLite, its retries make new trials, it cannot
give a trial back, and a thousand cells take minutes through its public calls. The tables underneath are plain, and its
schema is versioned. (What it would cost to do without: CONTRIBUTING.md, "Optuna's tables".)
"""

from sqlalchemy import Connection, Engine, Table

from saeopt.trials.internals.queue import (
    PAUSED,
    TrialToCome,
    beats,
    change_state,
    counts,
    first_beats,
    first_trial,
    in_order_of_end,
    in_state,
    insert_trials,
    lock_first_waiting,
    lock_study,
    lock_waiting,
    n_waiting_with_params,
    next_number,
    numbers_in_state,
    reporters,
    reports_of,
    running,
    study_keys,
    told_in_study,
    waiting_after,
    with_params,
)
from saeopt.trials.internals.tables import (
    SUPPORTED,
    QueueBlindStorage,
    constraint_attrs,
    frozen_trial,
    heartbeats,
    live_trial,
    make_storage,
    note_keys,
    schema_is_there,
    study_attrs,
    study_id_of,
    study_user_attrs,
    trial_attrs,
    trial_params,
    trial_reports,
    trial_user_attrs,
    trial_values,
    trials,
)
from saeopt.trials.internals.values import (
    attrs_of,
    clear_params,
    db_now,
    db_time,
    drop_attrs,
    forget_result,
    get_attrs,
    infeasible,
    insert_missing,
    other_params,
    params_of,
    set_attrs,
    set_report,
    set_values,
    upsert,
    values_of,
)

__all__ = [
    "PAUSED", "SUPPORTED", "Connection", "Engine", "QueueBlindStorage", "Table", "TrialToCome", "attrs_of", "beats",
    "change_state", "clear_params", "constraint_attrs", "counts", "db_now", "db_time", "drop_attrs", "first_beats",
    "first_trial", "forget_result", "frozen_trial", "get_attrs", "heartbeats", "in_order_of_end",
    "in_state", "infeasible", "insert_missing", "insert_trials", "live_trial", "lock_first_waiting", "lock_study",
    "lock_waiting", "make_storage", "n_waiting_with_params", "next_number", "note_keys",
    "numbers_in_state", "other_params", "params_of", "reporters", "reports_of", "running",
    "schema_is_there", "set_attrs", "set_report", "set_values", "study_attrs", "study_id_of", "study_keys",
    "study_user_attrs", "told_in_study", "trial_attrs", "trial_params", "trial_reports", "trial_user_attrs",
    "trial_values", "trials", "upsert", "values_of", "waiting_after", "with_params",
]  # fmt: skip
