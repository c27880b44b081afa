"""Creating a study: the spec and the whole queue in one transaction, however many creators start at once."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import optuna

from saeopt.config import validate_run
from saeopt.config.places import as_typed
from saeopt.config.study import StudySpec
from saeopt.errors import UserError
from saeopt.search.objectives import directions, objective_names
from saeopt.search.samplers import n_known
from saeopt.search.sensible import check_selections, check_space, check_study
from saeopt.search.space import Cell, Space, key_of
from saeopt.search.starts import first_cells
from saeopt.trials import internals as db
from saeopt.trials import states
from saeopt.trials.attributes import ORIGIN
from saeopt.trials.storage import IDENTITY_KEY, SPEC_KEY, Store, new_identity, persistently
from saeopt.trials.waiting import STREAM


@dataclass(frozen=True)
class Created:
    """What `create_study` did."""

    study_id: int
    n_trials: int
    is_new: bool


def planned_cells(spec: StudySpec) -> tuple[list[Cell], int]:
    """The cells that are known at creation, and the number of trials that the sampler will propose later.

    Raises:
        UserError: some cell is no valid run config.
    """
    space = Space(spec)
    check_space(spec, space)
    if spec.sampler.type == "grid":
        cells = space.grid()
        if not cells:
            raise UserError(f"study {spec.name}: the space has no cells")
        _check_evaluated(spec, cells)
        check_study(spec, cells)
        check_selections(spec, cells)
        return cells, 0
    corners = space.corners()
    if spec.start_from and spec.start_from.found is None:
        raise UserError(f"study {spec.name}: 'start_from' has not been looked up (saeopt.trials.starts.with_starts)")
    cells = first_cells(spec, space, n_known(spec))
    _check_evaluated(spec, [*cells, space.middle()])
    check_study(spec, [*cells, space.middle()])
    check_selections(spec, [*corners, *cells])
    return cells, (spec.max_trials or 0) - len(cells)


def _check_evaluated(spec: StudySpec, cells: Iterable[Cell]) -> None:
    """Refuse trials that would be trained to their end and then have no objective."""
    for cell in cells:
        if cell.config.data.n_eval_samples == 0:
            raise UserError(
                f"study {spec.name}: 'data.n_eval_samples' is 0: objectives are measured on held-out samples"
            )
        if cell.config.eval_every_n_samples is None:
            raise UserError(
                f"study {spec.name}: 'eval_every_n_samples' is null (never): objectives need an evaluation; 0 means at"
                " the end"
            )


def create_study(store: Store, spec: StudySpec, planned: tuple[list[Cell], int] | None = None) -> Created:
    """Create the study and its queue; the same spec again changes nothing. `planned`: its :func:`planned_cells`.

    Raises:
        UserError: another study has this name, or a cell is invalid.
    """
    found = _existing(store, spec)
    if found is not None:
        return found
    cells, proposed = planned or planned_cells(spec)
    rows = _rows(spec, cells, proposed)
    names, origins = objective_names(spec), _origins(spec)
    with store.lock(f"study-{spec.name}"):
        found = _existing(store, spec)
        if found is not None:
            return found
        study = optuna.create_study(
            storage=store.optuna, study_name=spec.name, directions=directions(spec), load_if_exists=True
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(names)
        study_id = db.study_id_of(study)

        def fill() -> None:
            with store.write() as connection:
                states.create(connection, study_id, 0, rows)
                for trial_id, number in db.numbers_in_state(connection, study_id, states.WAITING).items():
                    if number < len(cells) and (origin := origins.get(key_of(cells[number].params))):
                        db.set_attrs(connection, db.trial_user_attrs, trial_id, {ORIGIN: origin})
                attrs = {SPEC_KEY: spec.to_json(), IDENTITY_KEY: new_identity()}
                db.set_attrs(connection, db.study_attrs, study_id, attrs)

        persistently(fill, "creating the study")
    return Created(study_id, len(rows), True)


def _origins(spec: StudySpec) -> dict[str, str]:
    """Parameters of what was found in another study → which trial it was, and whether its weights come along."""
    asked = spec.start_from
    return {
        key_of(one.params): f"{asked.study} #{one.trial}" + (", its weights" if one.weights else "")
        for one in (asked and asked.found) or []
        if asked is not None
    }


def _rows(spec: StudySpec, cells: list[Cell], proposed: int) -> list[db.TrialToCome]:
    space = Space(spec)
    distributions = {p.name: p.distribution for p in space.parameters}
    rows: list[db.TrialToCome] = [
        ({name: (value, distributions[name]) for name, value in cell.params.items()}, {STREAM: cell.stream})
        for cell in cells
    ]
    if proposed:
        # The stream of a trial to come is known only when no parameter can change it.
        known = {} if space.fixes_stream else {STREAM: space.middle().stream}
        rows += [({}, dict(known)) for _ in range(proposed)]
    return rows


def _existing(store: Store, spec: StudySpec) -> Created | None:
    """The study of this name if it is complete; :class:`UserError` if it is another one."""
    if spec.name not in store.study_names():
        return None
    study_id = store.study_id(spec.name)
    with store.read() as connection:
        text = db.get_attrs(connection, db.study_attrs, study_id, SPEC_KEY).get(SPEC_KEY)
        n_trials = sum(db.counts(connection, study_id).values())
    if text is None:
        if n_trials:
            raise UserError(f"{store.shown} has a study '{spec.name}' that saeopt did not make; choose another name")
        return None
    known = [spec, *spec.older]
    if _comparable(_today(text, spec)) not in [_comparable(one.to_json()) for one in known]:
        raise UserError(
            f"{store.shown} has a study '{spec.name}' with a different {_difference(text, spec)};"
            f" choose another --name, or delete the old one with '{store.command('study', 'delete', spec.name)}'"
        )
    return Created(study_id, n_trials, False)


def _today(text: str, spec: StudySpec) -> str:
    """A stored spec with what its base config lacks: fields that are newer, in their old meaning. What `spec` leaves
    open too (k beside a varied `saes.target_l0`, what each of several architectures has its own default for) stays so.
    """
    found = StudySpec.from_json(text)
    try:
        base = validate_run(found.base, found.name).model_dump(mode="json")
    except UserError:  # it names something that is not here any more: certainly another study
        return text
    for name in base["saes"].keys() - found.base["saes"].keys() - spec.base["saes"].keys():
        del base["saes"][name]
    return found.model_copy(update={"base": base}).to_json()


def _comparable(text: str) -> dict[str, Any]:
    """A spec with its paths as they were typed, wherever they lie, and without what was looked up."""
    raw: dict[str, Any] = json.loads(text)
    if raw.get("start_from"):
        raw["start_from"] = {**raw["start_from"], "found": None}  # the other study may have gone on since
    return {**raw, "base": as_typed(raw["base"])}


def _difference(text: str, spec: StudySpec) -> str:
    """Names of the fields in which two specs differ, two levels deep."""
    old, new = _comparable(text), _comparable(spec.to_json())
    found = []
    for key in {**old, **new}:
        a, b = old.get(key), new.get(key)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            found += [f"{key}.{inner}" for inner in {**a, **b} if a.get(inner) != b.get(inner)]
        else:
            found.append(key)
    return ", ".join(f"'{name}'" for name in found[:3]) + (", …" if len(found) > 3 else "")
