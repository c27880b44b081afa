"""A warm start on a table: narrow cells as a study that has ended, from which a search of the wide ones starts.

The study is a real one in a store of its own, made and ended by the code of workers, and what the search begins with is
what `start_from` finds in it: which trials, in which order, and what of each is taken over. Only the training, by
looking up, is the replay's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from saeopt.config.starts import StartFrom
from saeopt.config.study import StudySpec
from saeopt.search.objectives import objective_values
from saeopt.search.space import Space
from saeopt.trials import claims, endings
from saeopt.trials.attributes import evaluation_attributes
from saeopt.trials.create import create_study
from saeopt.trials.starts import with_starts
from saeopt.trials.storage import Store
from tabulated.curves import Tabulated

HOOK = "blocks.2.hook_resid_pre"


class Narrow:
    """A store with studies of the narrow cells, of which every trial was trained to its end."""

    def __init__(self, table: Tabulated) -> None:
        self.table, self._folder = table, tempfile.TemporaryDirectory()
        self.url = f"sqlite:///{Path(self._folder.name) / 'narrow.db'}"
        self._made: set[str] = set()

    def study(self, name: str, trained: Iterable[dict[str, Any]] | None = None) -> str:
        """A study of all cells, or of those that a search has trained (their parameters); its name."""
        if name not in self._made:
            self._made.add(name)
            spec = self.table.spec.model_copy(update={"name": name})
            if trained is not None:
                points = list(map(Space(spec).values, trained))
                raw = spec.model_dump(by_alias=True)
                raw |= {"sampler": {"type": "random"}, "enqueue": points, "max_trials": len(points)}
                spec = StudySpec.model_validate(raw)
            self._end(spec)
        return name

    def _end(self, spec: StudySpec) -> None:
        store = Store.open(self.url)
        made = create_study(store, spec)
        for claim in claims.claim(store, made.study_id, made.n_trials, {"worker": "replay"}):
            final = self.table.curve(claim.params).final
            row = {HOOK: {} if final is None else {"l0": final[0], "fvu": final[1]}}
            values = objective_values(spec, row)
            state: Any = "PRUNED" if values is None else "COMPLETE"
            endings.finish(store, claim, state, values, attrs=evaluation_attributes(row))
        store.close()

    def started(self, spec: StudySpec, study: str, **which: Any) -> StudySpec:
        """`spec` with the trials that `start_from: {study: …, **which}` means."""
        asked = StartFrom(study=study, storage=self.url, **which)
        return with_starts(spec.model_copy(update={"start_from": asked}))[0]
