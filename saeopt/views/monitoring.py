"""What a study shows of itself in optuna-dashboard: notes, readable attributes, pictures. Imports no torch.

For each trial the worker calls `on_trial_start` after the claim, passes `evaluation_attributes(…)` to `endings.finish`,
and calls `on_trial_end` just before it (of a paused trial `on_trial_paused` as well); `on_study_progress` after it. All
are decoration: what goes wrong in them is a warning and never costs a trial.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec

import optuna
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact
from optuna.trial import FrozenTrial

from saeopt.config.study import StudySpec
from saeopt.console import log
from saeopt.files import write_bytes
from saeopt.runs.names import METRICS_FILE
from saeopt.trials import claims
from saeopt.trials import internals as db
from saeopt.trials.attributes import CURVE_NAME, RUN_DIR, Evaluation
from saeopt.trials.states import Claim
from saeopt.trials.storage import Store, StudyGone, check_identity
from saeopt.views import notes, spending
from saeopt.views.points import study_points

ARTIFACTS = "artifacts"
FRONT = "pareto_front.png"
IMPORTANCES = "importances.png"
PROGRESS_EVERY_S = 60.0
SHARE_OF_TIME = 0.05
"""Of a worker's time, for finding out what mattered while trials are still to come."""
ARTIFACTS_AT = "saeopt:artifacts"
"""Study: the absolute folder of its artifacts on the hosts that train."""
_DRAWN = "saeopt:front_drawn"
_WEIGHED = "saeopt:importances_drawn"
_P = ParamSpec("_P")


def harmless(function: Callable[_P, None]) -> Callable[_P, None]:
    """Monitoring may fail (a lost database, a full disk) without any effect on training."""

    @wraps(function)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except StudyGone:
            return  # its worker notices it and logs it
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            log.warning("monitoring: %s: %s: %s", function.__name__, type(error).__name__, text)

    return guarded


def artifact_dir(spec: StudySpec) -> Path:
    """Where the study's artifacts lie."""
    return spec.runs / ARTIFACTS


def _is_lost(store: Store, claim: Claim | None) -> bool:
    return claim is not None and not claims.beat(store, [claim])


@harmless
def on_study_created(store: Store, study_id: int, spec: StudySpec) -> None:
    """The note of the study."""
    notes.save(store, study_id, None, notes.study_text(spec))


@harmless
def on_trial_start(
    store: Store, study_id: int, trial_id: int, spec: StudySpec, worker: str = "", *, claim: Claim | None = None
) -> None:
    """The note of a trial and the folder of its run. Nothing where its `claim` is lost."""
    if _is_lost(store, claim):
        return
    trial = store.optuna.get_trial(trial_id)
    run_dir = spec.run_dir(trial.number)
    with store.write() as connection:
        db.set_attrs(connection, db.trial_user_attrs, trial_id, {RUN_DIR: str(run_dir)})
    outcome = f"training on {worker}" if worker else "training"
    notes.save(store, study_id, trial_id, notes.trial_text(trial, run_dir, outcome))


@harmless
def on_trial_end(
    store: Store,
    study_id: int,
    trial_id: int,
    spec: StudySpec,
    outcome: str = "trained",
    *,
    claim: Claim | None = None,
    evaluation: Evaluation | None = None,
    curves: bool = True,
) -> None:
    """Training curves as an artifact, the note with the results. Before the end: an ended trial takes no artifacts."""
    if _is_lost(store, claim):
        return
    trial = store.optuna.get_trial(trial_id)
    text = notes.trial_text(trial, spec.run_dir(trial.number), outcome, evaluation or {})
    notes.save(store, study_id, trial_id, text)
    if curves:
        _draw_curves(store, study_id, trial, spec)


@harmless
def on_trial_paused(store: Store, study_id: int, trial_id: int, spec: StudySpec) -> None:
    """Its training curves, once nobody waits for them."""
    _draw_curves(store, study_id, store.optuna.get_trial(trial_id), spec)


def _draw_curves(store: Store, study_id: int, trial: FrozenTrial, spec: StudySpec) -> None:
    from saeopt.files import read_metrics
    from saeopt.views.plots import CURVES, training_curves

    run_dir = spec.run_dir(trial.number)
    picture = run_dir / CURVES
    rows = [] if picture.exists() else read_metrics(run_dir / METRICS_FILE)
    if rows:
        training_curves(rows, picture)
    if picture.exists():
        put_artifact(store, study_id, trial, artifact_dir(spec), picture)


@harmless
def on_study_progress(
    store: Store, study_id: int, spec: StudySpec, force: bool = False, *, identity: str | None = None
) -> None:
    """Draw the front anew, at most once a minute over all workers unless forced."""
    from saeopt.views import figures
    from saeopt.views.plots import pareto_plot

    with store.write() as connection:
        check_identity(connection, study_id, identity)
        last = db.get_attrs(connection, db.study_attrs, study_id, _DRAWN).get(_DRAWN, 0.0)
        if not force and time.time() - last < PROGRESS_EVERY_S:
            return
        db.set_attrs(connection, db.study_attrs, study_id, {_DRAWN: time.time()})
    spending.show(store, study_id, spec, identity)
    study = store.study(spec.name)
    if (name := study.user_attrs.get(CURVE_NAME)) is not None:
        figures.save(study, figures.curves_figure(store.engine, study_id, name), "curves")
    found = study_points(store.engine, study_id, spec)
    if not found:
        return
    with tempfile.TemporaryDirectory() as scratch:
        put_artifact(store, study_id, study, artifact_dir(spec), pareto_plot(found, Path(scratch) / FRONT))
    figures.save(study, figures.front_figure(found), "front")
    _draw_importances(store, study_id, spec, study, force)


def _draw_importances(store: Store, study_id: int, spec: StudySpec, study: optuna.Study, force: bool) -> None:
    """Draw what mattered anew where trials have ended since. A forest per objective and hook point takes seconds: not
    more than a twentieth of a worker's time goes into it."""
    from saeopt.views import figures, importance
    from saeopt.views.best import load_points

    points, trials = load_points(store, spec.name)
    with store.read() as connection:
        last = db.get_attrs(connection, db.study_attrs, study_id, _WEIGHED).get(_WEIGHED) or {}
    begun = time.time()
    waits = begun - last.get("at", 0.0) < last.get("seconds", 0.0) / SHARE_OF_TIME
    if last.get("trials") == len(trials) or (waits and not force):
        return
    found = importance.find_importances(store, spec.name, points, trials)
    if any(importance.explained(found)):
        with tempfile.TemporaryDirectory() as scratch:
            picture = importance.importance_plot(found, Path(scratch) / IMPORTANCES)
            put_artifact(store, study_id, study, artifact_dir(spec), picture)
        figures.save(study, figures.importance_figure(found), "importances")
    told = {"at": time.time(), "seconds": time.time() - begun, "trials": len(trials)}
    with store.write() as connection:
        db.set_attrs(connection, db.study_attrs, study_id, {_WEIGHED: told})


def put_artifact(store: Store, study_id: int, owner: optuna.Study | FrozenTrial, folder: Path, file: Path) -> None:
    """Upload a file, or overwrite the artifact of the same name (a retried trial, a front that has grown)."""
    folder.mkdir(parents=True, exist_ok=True)
    files, storage = FileSystemArtifactStore(folder), store.optuna
    for known in get_all_artifact_meta(owner, storage=storage):
        if known.filename == file.name:
            write_bytes(folder / known.artifact_id, file.read_bytes())
            return
    upload_artifact(artifact_store=files, file_path=str(file), study_or_trial=owner, storage=storage)
    with store.write() as connection:  # for a dashboard that was started in another folder
        db.set_attrs(connection, db.study_attrs, study_id, {ARTIFACTS_AT: str(folder.resolve())})
