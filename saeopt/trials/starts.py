"""`start_from`: the best trials of another study as the first trials of a new one, looked up once, at its creation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from saeopt.config.run import RunConfig
from saeopt.config.starts import Found, StartFrom, Weights
from saeopt.config.study import TARGET, StudySpec
from saeopt.errors import HostError, UserError
from saeopt.files import digest
from saeopt.runs.weights import list_checkpoints
from saeopt.search import ranking
from saeopt.search.collapse import rule_of, why_collapsed
from saeopt.search.objectives import directions
from saeopt.search.pareto import Point, pareto_front
from saeopt.search.space import Parameter, Space, key_of
from saeopt.search.starts import Known, Translation, numbers
from saeopt.trials.attributes import RUN_DIR, evaluation_of, mean_metric
from saeopt.trials.internals import queries
from saeopt.trials.internals.queries import TrialRow
from saeopt.trials.storage import Store

_LAMBDA = "saes.sparsity_coeff"


def with_starts(spec: StudySpec, url: str | None = None) -> tuple[StudySpec, list[str]]:
    """The spec with the trials that `start_from` means, and what is to be said about them, a line each.

    `url`: the store of the new study, where `start_from` names no other. What was looked up before stays.

    Raises:
        UserError: no such study or store, or no trial of it has come to its end.
    """
    asked = spec.start_from
    if asked is None or asked.found is not None:
        return spec, []
    where = f"study {spec.name}: 'start_from'"
    try:
        store = Store.open(asked.storage or url, create=False)
        try:
            other = store.spec(asked.study)
            rows = _chosen(asked, other, _ended(store, asked.study))
        finally:
            store.close()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not rows:
        raise UserError(f"{where}: no trial of study '{asked.study}' has come to its end without a collapse")
    most = (spec.max_trials or 0) - len(spec.enqueue)
    if not most:
        raise UserError(f"{where}: 'max_trials' ({spec.max_trials}) leaves no room beside 'enqueue'")
    found, translation = _translated(spec, other, rows[:most])
    said = [_summary(asked, spec, other, rows, found), *translation.told()]
    stood_for = {_LAMBDA, "saes.k"} if TARGET in spec.space else set()  # by the L0
    if dropped := sorted(set(other.space) - set(spec.space) - stood_for):
        said.append(f"not varied here, so as 'base' says: {', '.join(dropped)}")
    if len(rows) > most:
        said.append(f"'max_trials' leaves room for {most} of {len(rows)}: the best")
    return spec.model_copy(update={"start_from": asked.model_copy(update={"found": found})}), said


def check_weights(weights: Weights) -> None:
    """Whether what a trial is to start from is still what it was when the study was made.

    Raises:
        HostError: this host does not have it.
        UserError: it has changed.
    """
    try:
        now = digest(Path(weights.file))
    except OSError as error:
        raise HostError(f"'start_from': {weights.file}: {error.strerror}: trials start from its weights") from None
    if now != weights.sha256:
        raise UserError(f"'start_from': {weights.file} has changed since the study was made")


def _ended(store: Store, name: str) -> list[TrialRow]:
    """The trials of a study that were trained to their end."""
    study_id = store.study_id(name)
    rows = [row for row in queries.trial_rows(store.engine, study_id) if row.state == "COMPLETE"]
    queries.add_params(store.engine, rows, study_id)
    queries.add_values(store.engine, rows, study_id)
    return rows


def _chosen(asked: StartFrom, other: StudySpec, rows: Sequence[TrialRow]) -> list[TrialRow]:
    """The best, best first; trials of which every SAE has collapsed are never among them."""
    rule, signs = rule_of(other), [1.0 if way == "minimize" else -1.0 for way in directions(other)]
    points = [
        Point(str(i), metrics, hook, collapsed=why_collapsed(rule, metrics) is not None)
        for i, row in enumerate(rows)
        for hook, metrics in evaluation_of(row.attributes).items()
    ]
    if asked.front:
        hooks = dict.fromkeys(point.hook_point for point in points)
        wanted = {p.label for hook in hooks for p in pareto_front([p for p in points if p.hook_point == hook])}
    else:
        wanted = {point.label for point in points if not point.collapsed}
    rows = [row for i, row in enumerate(rows) if str(i) in wanted and len(row.values) == len(signs)]
    values = [[sign * value for sign, value in zip(signs, row.values, strict=True)] for row in rows]
    return [rows[i] for i in ranking.ranked(values, asked.top or len(rows))]


def _translated(spec: StudySpec, other: StudySpec, rows: Sequence[TrialRow]) -> tuple[list[Found], Translation]:
    space, theirs = Space(spec), Space(other)
    translation, shares = Translation(space), space.shares(spec.n_starts + len(rows), spec.sampler.seed)
    found: dict[str, Found] = {}
    first = len(spec.enqueue)
    for row, point in zip(rows, shares[first:], strict=True):
        params = translation.params(_known(spec, theirs.config(row.params), row, space.parameters), point)
        if (before := found.get(key_of(params))) is not None:
            translation.same[row.number] = before.trial
            continue
        space.cell(params)
        weights = _weights_of(other, row) if spec.start_from and spec.start_from.from_weights else None
        found[key_of(params)] = Found(trial=row.number, params=params, weights=weights)
    return list(found.values()), translation


def _known(spec: StudySpec, config: RunConfig, row: TrialRow, parameters: Iterable[Parameter]) -> Known:
    """A trial of another study: what its config says of each field, whatever of it was varied there."""
    evaluation = evaluation_of(row.attributes)
    run: dict[str, Any] = config.model_dump(mode="json")
    at = {hook: config.sae_at(hook).model_dump(mode="json") for hook in evaluation}
    values: dict[str, Any] = {}
    unusable: dict[str, str] = {}
    for name in dict.fromkeys(p.field for p in parameters):
        field, _, hook = name.partition("@")
        section, _, own = field.rpartition(".")
        if section == "saes":
            places = [at[h] for h in ([hook] if hook else at) if h in at and own in at[h]]
            if len({json.dumps(place[own]) for place in places}) > 1:
                unusable[name] = "it differs between its hook points"
            elif places:
                values[name] = places[0][own]
        elif own in (here := run.get(section) or {} if section else run):
            values[name] = here[own]
        if field == _LAMBDA and config.saes.steers:
            unusable[name] = "λ was moved to reach 'saes.target_l0'"
        elif field == _LAMBDA and bool(config.legacy_scaling) != bool(spec.base.get("legacy_scaling")):
            unusable[name] = "λ is in other units ('legacy_scaling')"
    reached = {hook: metrics["l0"] for hook, metrics in evaluation.items() if "l0" in metrics}
    mean = mean_metric(evaluation, "l0")
    return Known(row.number, values, unusable, reached if mean is None else {**reached, "": mean})


def _weights_of(other: StudySpec, row: TrialRow) -> Weights:
    here = other.run_dir(row.number)  # as seen from here, else as its worker saw it
    folder = here if here.is_dir() else Path(row.attributes.get(RUN_DIR, here))
    newest = next((path for _, path in list_checkpoints(folder)), None)
    if newest is None:
        raise UserError(
            f"study '{other.name}' has no weights of trial {row.number} on this host ({folder}): 'from_weights' needs"
            " them when the study is created"
        )
    return Weights(file=str(newest.absolute()), sha256=digest(newest))


def _summary(
    asked: StartFrom, spec: StudySpec, other: StudySpec, rows: Sequence[TrialRow], found: Sequence[Found]
) -> str:
    """Which trials, in a line."""
    which = "the fronts" if asked.front else f"the best {asked.top}"
    few = f" (there are {len(rows)})" if asked.top and len(rows) < asked.top else ""
    by_l0 = f"; '{TARGET}' is the L0 that they reached" if TARGET in spec.space else ""
    return f"first come {which} of study {other.name}{few}: {numbers([one.trial for one in found])}{by_l0}"
