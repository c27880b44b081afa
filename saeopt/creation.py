"""What `saeopt study create` does once it has a spec: plan, store, tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from saeopt.config.study import AUTO, TARGET
from saeopt.console import log, wrapped
from saeopt.errors import UserError

if TYPE_CHECKING:
    from saeopt.config.study import StudySpec
    from saeopt.search.space import Cell
    from saeopt.trials.storage import Store


def looked_up(
    spec: StudySpec, dry_run: bool, elsewhere: bool, is_there: Callable[[str], bool], storage: str | None
) -> tuple[StudySpec, list[str]]:
    """The spec with what has to be looked up elsewhere (L0s of `auto`, trials of other studies), and what was found."""
    if any(d.values == [AUTO] for d in spec.space.get(TARGET, [])):
        from saeopt.reach import with_first_targets

        spec = with_first_targets(spec, elsewhere=elsewhere)
    said: list[str] = []
    if spec.start_from and (dry_run or not is_there(spec.name)):
        from saeopt.reach import with_fitting_weights
        from saeopt.trials.starts import with_starts

        spec, said = with_starts(spec, storage)
        spec, more = with_fitting_weights(spec, elsewhere=elsewhere)
        said += more
    return spec, said


def planned_trials(spec: StudySpec, elsewhere: bool, is_there: Callable[[str], bool]) -> tuple[list[Cell], int]:
    """The cells and the number of proposals; what cannot be trained, or never stopped by its rule, is refused.

    A study that is there already keeps its rule: containers say `create` at each start.
    """
    from saeopt.search.space import Space
    from saeopt.search.stopping import why_never
    from saeopt.training.loggers import check_sinks
    from saeopt.trials.create import planned_cells

    planned = planned_cells(spec)
    if not elsewhere:
        from saeopt.reach import check_reach

        check_reach(spec, planned[0] or [Space(spec).middle()])
    for cell in planned[0]:
        check_sinks(cell.config)
    if (reason := why_never(spec, len(planned[0]) + planned[1])) and not is_there(spec.name):
        raise UserError(reason)
    return planned


def created(
    spec: StudySpec,
    elsewhere: bool,
    is_there: Callable[[str], bool],
    open_store: Callable[[], Store],
    said: Sequence[str],
) -> Iterator[str]:
    """Store the study, and the lines that a person is told."""
    from saeopt.config import recipe_notice
    from saeopt.search.rounds import proposals_text
    from saeopt.search.space import Space
    from saeopt.search.starts import doubles_text
    from saeopt.search.stopping import stopping_text
    from saeopt.trials.create import create_study
    from saeopt.views.disk import disk_text
    from saeopt.views.monitoring import on_study_created
    from saeopt.views.spending import limits_text, spending

    waits = spec.start_from is not None and spec.start_from.found is None  # the study is there, as it was found then
    planned = None if waits else planned_trials(spec, elsewhere, is_there)  # refused before there is a store
    store = open_store()
    made = create_study(store, spec, planned)
    if made.is_new:
        with suppress(OSError):  # workers that start elsewhere on this host find the run folders here
            spec.runs.mkdir(parents=True, exist_ok=True)
        on_study_created(store, made.study_id, spec)
        if any(one.base != spec.base for one in spec.older):
            log.info(recipe_notice("the base config"))
    else:
        spec = store.spec(spec.name)  # as it was made then
    what = "created with" if made.is_new else "is there already, with"
    yield f"study {spec.name} {what} {made.n_trials} trials in {store.shown}"
    limits = [*limits_text(spec), *(disk_text(spec, *planned) if planned and not elsewhere else ())]
    doubles = doubles_text(spec, Space(spec))
    for about in filter(None, (*said, doubles, proposals_text(spec), stopping_text(spec), *limits)):
        yield wrapped(f"  {about}")
    for line in () if made.is_new else spending(store, made.study_id, spec).lines(store.command, spec.name):
        yield f"  {line}"
    yield f"  work:      {store.command('worker', spec.name)}"
    yield f"  watch:     {store.command('study', 'status', spec.name, '--watch')}"
    yield f"  dashboard: {store.command('dashboard')}"
