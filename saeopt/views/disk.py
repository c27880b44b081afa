"""What a study's run folders hold: an estimate before, and what `study clean` removes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from saeopt.config.run import RunConfig
from saeopt.config.study import StudySpec
from saeopt.errors import UserError
from saeopt.runs.folder import STATES_KEPT
from saeopt.search import ranking
from saeopt.search.objectives import directions
from saeopt.trials import cleaning
from saeopt.trials import internals as db
from saeopt.trials.storage import Store
from saeopt.views.best import find_best, labels, load_points
from saeopt.views.points import candidates
from saeopt.views.spending import gigabytes

if TYPE_CHECKING:
    from saeopt.activations.source import Source
    from saeopt.search.space import Cell

_WEIGHTS, _MOMENTS = 4, 8
"""Bytes of a parameter: in a weights file, and in a state (two moments)."""


def run_folder_bytes(config: RunConfig, n_parameters: int) -> tuple[int, int]:
    """What a run of so many parameters leaves, and what of it `study clean` cannot remove: one weights file."""
    total, every = config.data.n_train_samples or 1, config.save_every_n_samples
    saves = 1 + ((total - 1) // every if every else 0)
    states = min(saves, STATES_KEPT)
    kept = saves if config.keep_checkpoints is None else min(saves, max(config.keep_checkpoints, states))
    return n_parameters * (_WEIGHTS * kept + _MOMENTS * states), n_parameters * _WEIGHTS


def disk_text(spec: StudySpec, cells: Sequence[Cell], proposed: int, hub: bool = False) -> Iterator[str]:
    """For `create`: the estimate for all trials, where the model's structure is on this host (or `hub`: in reach)."""
    from saeopt.training.dry_run import shapes, weightless

    models: dict[str, Source] = {}
    parameters: dict[str, int] = {}
    sizes = []
    try:
        for config in (cell.config for cell in cells):
            if config.tlens_model_path is None and config.data.activations is None and not hub:
                return
            place = f"{config.model} {config.data.activations}"
            shape = f"{place} {config.seeds} {config.saes.model_dump_json(exclude={'sparsity_coeff'})}"
            if shape not in parameters:
                if place not in models:
                    models[place] = weightless(config)[0]
                parameters[shape] = sum(member.n_parameters for member in shapes(config, models[place]))
            sizes.append(run_folder_bytes(config, parameters[shape]))
    except (UserError, OSError, ValueError, ImportError):
        return
    if sizes:
        share = (len(cells) + proposed) / len(cells)
        all_of_it, least = (sum(column) * share for column in zip(*sizes, strict=True))
        yield (
            f"run folders: about {gigabytes(all_of_it)} in all, {gigabytes(max(size for size, _ in sizes))} for the"
            f" largest trial (newest weights alone: {gigabytes(least)})"
        )


def on_front(store: Store, name: str) -> set[int]:
    """The trials whose weights stay: on the front of a hook point or of the objectives, or best in a range of L0."""
    points, _ = load_points(store, name)
    found = {int(label[1:]) for label in labels(find_best(points))} if candidates(points) else set()
    spec, study_id = store.spec(name), store.study_id(name)
    with store.read() as connection:
        numbers = db.numbers_in_state(connection, study_id, cleaning.TrialState.COMPLETE)
        values, out = db.values_of(connection, study_id), db.infeasible(connection, study_id)
    rows = [trial_id for trial_id in numbers if trial_id in values and trial_id not in out]
    signs = [-1.0 if direction == "maximize" else 1.0 for direction in directions(spec)]
    costs = [[v * sign for v, sign in zip(values[trial_id], signs, strict=True)] for trial_id in rows]
    return found | {numbers[rows[i]] for i in ranking.non_dominated(costs)}


def clean(store: Store, name: str, keep: str | None, also: Sequence[str], yes: bool) -> Iterator[str]:
    """Remove what is not kept, or say what would be removed; gives the lines to say.

    Raises:
        UserError: `keep` or `also` names something else than there is.
    """
    if keep not in (None, "front"):
        raise UserError(f"--keep {keep}: 'front' is what can be kept")
    for kind in also:
        if kind not in cleaning.ASKED:
            raise UserError(f"--also {kind}: one of {', '.join(cleaning.ASKED)} is needed")
    study_id, spec = store.study_id(name), store.spec(name)
    front = on_front(store, name) if keep else None
    removals = cleaning.planned(store, study_id, spec, also, front)
    for kind, group in _by_kind(removals):
        size = gigabytes(sum(r.size for r in group))
        what = "all checkpoints" if kind in cleaning.ASKED else "what only resuming needs"
        without = [] if front is None else [r for r in group if r.number not in front]
        more = f" and the weights of {len(without)} of them" if without else ""
        n_files = sum(len(r.files) for r in group)
        yield f"{len(group)} {kind} trials: {what}{more if kind == 'ended' else ''}, {n_files} files, {size}"
    if front is not None:
        yield f"kept: the weights of {len(front)} trials on a front or best in a range of L0: {_numbers(front)}"
    if not removals:
        yield f"nothing to remove in {spec.runs}"
        return
    total = sum(r.size for r in removals)
    if yes:
        yield f"{gigabytes(cleaning.clean(store, study_id, spec, removals))} removed from {spec.runs}"
        return
    words = [*(["--keep", keep] if keep else []), *(word for kind in also for word in ("--also", kind)), "--yes"]
    yield f"{total:,} bytes ({gigabytes(total)}) would go, nothing has; do it: " + store.command(
        "study", "clean", name, *words
    )


def _by_kind(removals: Sequence[cleaning.Removal]) -> Iterator[tuple[str, list[cleaning.Removal]]]:
    for kind in ("ended", *cleaning.ASKED):
        if group := [r for r in removals if r.kind == kind]:
            yield kind, group


def _numbers(numbers: Collection[int]) -> str:
    shown = sorted(numbers)
    return ", ".join(map(str, shown[:12])) + (", …" if len(shown) > 12 else "")
