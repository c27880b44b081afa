"""A study as files: runnable configs, tables, and a W&B sweep of the same space."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from saeopt.errors import UserError
from saeopt.files import atomic_write, write_text
from saeopt.search.objectives import objective_names
from saeopt.trials.attributes import REASON, RUN_DIR, evaluation_of
from saeopt.trials.internals import queries
from saeopt.trials.storage import Store


def export_configs(store: Store, name: str, folder: Path) -> list[Path]:
    """One runnable YAML per trial whose parameters are known (every cell of a grid, waiting ones too)."""
    from saeopt.config.io import dump_yaml
    from saeopt.search.space import Space

    spec, study_id = store.spec(name), store.study_id(name)
    rows = queries.trial_rows(store.engine, study_id)
    queries.add_params(store.engine, rows, study_id)
    space, written = Space(spec), []
    width = len(str(max((row.number for row in rows), default=0)))
    for row in rows:
        if row.params or not spec.space:
            path = folder / f"{name}-{row.number:0{width}d}.yaml"
            write_text(path, dump_yaml(space.config(row.params)))
            written.append(path)
    if not written:
        raise UserError(f"study '{name}' has no trial yet whose parameters are known")
    return written


def table_rows(store: Store, name: str) -> list[dict[str, Any]]:
    """A row per trial and hook point (per trial where there is no evaluation): parameters, objectives, metrics."""
    spec, study_id = store.spec(name), store.study_id(name)
    rows = queries.trial_rows(store.engine, study_id)
    queries.add_params(store.engine, rows, study_id)
    queries.add_values(store.engine, rows, study_id)
    result = []
    for row in rows:
        head: dict[str, Any] = {"trial": row.number, "state": row.state}
        head |= {"started": _iso(row.start), "ended": _iso(row.complete), "seconds": row.seconds}
        head |= {"run_dir": row.attributes.get(RUN_DIR), "reason": row.attributes.get(REASON)}
        head |= {f"param:{k}": v for k, v in row.params.items()}
        head |= {f"objective:{k}": v for k, v in zip(objective_names(spec), row.values, strict=False)}
        for hook, metrics in evaluation_of(row.attributes).items() or [(None, {})]:
            result.append({**head, "hook_point": hook, **metrics})
    return result


def _iso(value: Any) -> str | None:
    return value.isoformat(sep=" ", timespec="seconds") if value else None


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def export_csv(store: Store, name: str, file: Path) -> int:
    """Write `table_rows` as CSV; returns the number of rows."""
    rows = table_rows(store, name)
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(rows))
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, text.getvalue())
    return len(rows)


def export_parquet(store: Store, name: str, file: Path) -> int:
    """Write `table_rows` as Parquet; a column of mixed kinds becomes text."""
    import pyarrow
    import pyarrow.parquet

    rows = table_rows(store, name)
    columns = {}
    for key in _columns(rows):
        values = [row.get(key) for row in rows]
        kinds = {type(v) for v in values if v is not None}
        if kinds == {int, float}:
            values = [None if v is None else float(v) for v in values]
        elif len(kinds) > 1 or kinds & {list, dict}:
            values = [None if v is None else json.dumps(v) for v in values]
        columns[key] = values
    with atomic_write(file) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary)
    return len(rows)
