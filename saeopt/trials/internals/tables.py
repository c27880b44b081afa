"""Optuna's tables and the private names of Optuna and its dashboard that we use."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.storages import RDBStorage, _CachedStorage
from optuna.storages._cached_storage import _StudyInfo
from optuna.storages._rdb import models
from optuna.study._constrained_optimization import _CONSTRAINTS_KEY
from optuna.trial import FrozenTrial, Trial, TrialState

SUPPORTED = "5.0"
# A range ends with its last step, as everybody expects.
warnings.filterwarnings("ignore", message="The distribution is specified by")

studies: sa.Table = models.StudyModel.__table__
study_attrs: sa.Table = models.StudySystemAttributeModel.__table__
study_user_attrs: sa.Table = models.StudyUserAttributeModel.__table__
trials: sa.Table = models.TrialModel.__table__
trial_attrs: sa.Table = models.TrialSystemAttributeModel.__table__
trial_user_attrs: sa.Table = models.TrialUserAttributeModel.__table__
trial_params: sa.Table = models.TrialParamModel.__table__
trial_values: sa.Table = models.TrialValueModel.__table__
trial_reports: sa.Table = models.TrialIntermediateValueModel.__table__
heartbeats: sa.Table = models.TrialHeartbeatModel.__table__


def make_storage(url: str, engine_kwargs: dict[str, Any]) -> RDBStorage:
    """Optuna's storage; creates the tables where they are missing."""
    return RDBStorage(url, engine_kwargs=engine_kwargs, heartbeat_interval=None)


class QueueBlindStorage(_CachedStorage):
    """Optuna's cache without the waiting trials, for samplers and pruners.

    They never look at waiting trials, but the cache would read all of them again at every proposal and every report:
    0.5 s each time with a thousand cells.
    """

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        with self._backend.engine.connect() as connection:
            rows = connection.execute(
                sa.select(trials.c.trial_id, trials.c.number).where(
                    trials.c.study_id == study_id, trials.c.state != TrialState.WAITING
                )
            ).all()
        with self._lock:
            study = self._studies.setdefault(study_id, _StudyInfo())
            finished = {number for number, trial in study.trials.items() if trial.state.is_finished()}
            wanted = {row.trial_id for row in rows if row.number not in finished}
            if wanted:
                found = self._backend._get_trials(study_id, None, wanted, max(wanted))
                self._add_trials_to_cache(study_id, [t for t in found if t._trial_id in wanted])


def schema_is_there(engine: sa.Engine) -> bool:
    """Whether Optuna has finished setting up the tables (the version table comes last)."""
    return bool(sa.inspect(engine).has_table("alembic_version"))


def study_id_of(study: optuna.Study) -> int:
    """The key of a study in the tables."""
    return int(study._study_id)


def live_trial(study: optuna.Study, trial_id: int) -> Trial:
    """The trial as an object that suggests parameters; the study reads everything anew (its cache knows no other way
    to a trial that this process did not create)."""
    study._thread_local.cached_all_trials = None
    study.get_trials(deepcopy=False)
    return Trial(study, trial_id)


def frozen_trial(study: optuna.Study, trial_id: int) -> FrozenTrial:
    """The trial as stored now."""
    study._thread_local.cached_all_trials = None
    return study._storage.get_trial(trial_id)


def constraint_attrs(values: Mapping[str, float]) -> dict[str, Any]:
    """System attributes that say how far a trial is from feasible (at most 0: feasible), for samplers and dashboard.

    The dashboard reads only the older form, a list; the samplers read both and take the named values.
    """
    return {_CONSTRAINTS_KEY: list(values.values())} if values else {}


def note_keys(trial_id: int | None) -> tuple[str, str]:
    """Study attributes under which the dashboard keeps a trial's note (None: the study's): its text, its version."""
    from optuna_dashboard._note import note_str_key_prefix, note_ver_key

    return note_str_key_prefix(trial_id) + "0", note_ver_key(trial_id)
