"""A study as files: runnable configs, tables, and a W&B sweep of the same space."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import yaml

from saeopt.config.study import Dimension, StudySpec
from saeopt.errors import UserError
from saeopt.files import atomic_write, write_text
from saeopt.search import queries
from saeopt.search.attributes import REASON, RUN_DIR, evaluation_of
from saeopt.search.objectives import expanded, objective_names
from saeopt.search.storage import Store


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


def export_wandb_sweep(spec: StudySpec, file: Path) -> Path:
    """Write a W&B sweep definition of the same space, and the base config beside it; returns the latter's path.

    Raises:
        UserError: the space has conditional parameters, which W&B sweeps do not know.
    """
    conditional = [name for name, found in spec.space.items() if len(found) > 1 or found[0].when]
    if conditional:
        raise UserError(f"study '{spec.name}': W&B sweeps know no conditional parameters ('{conditional[0]}')")
    base = file.with_name(f"{file.stem}_base.yaml")
    name, objective = expanded(spec)[0]
    method = {"grid": "grid", "tpe": "bayes", "gp": "bayes"}.get(spec.sampler.type, "random")
    script = (
        f'args=(); for a in "$@"; do args+=(--set "$a"); done; '
        f'exec accelerate launch --quiet saeopt/train.py --config {base} "${{args[@]}}"'
    )
    sweep: dict[str, Any] = {
        "name": spec.name,
        "method": method,
        "metric": {"name": name, "goal": "maximize" if objective.maximised else "minimize"},
        "parameters": {key: _wandb_parameter(found[0]) for key, found in spec.space.items()},
        "command": ["/usr/bin/env", "bash", "-c", script, "sweep", "${args_no_hyphens}"],
    }
    if spec.max_trials is not None:
        sweep["run_cap"] = spec.max_trials
    write_text(base, yaml.safe_dump(spec.base, sort_keys=False, allow_unicode=True))
    write_text(file, yaml.safe_dump(sweep, sort_keys=False, allow_unicode=True))
    return base


def _wandb_parameter(dimension: Dimension) -> dict[str, Any]:
    if dimension.values is not None:
        return {"values": dimension.values}
    low, high = dimension.low, dimension.high
    if dimension.integer and not dimension.log:
        kind = "q_uniform" if dimension.step and dimension.step > 1 else "int_uniform"
        ends: dict[str, Any] = {"distribution": kind, "min": int(low or 0), "max": int(high or 0)}
        return {**ends, "q": int(dimension.step or 1)} if kind == "q_uniform" else ends
    if dimension.step is not None:
        return {"distribution": "q_uniform", "min": low, "max": high, "q": dimension.step}
    kind = "log_uniform_values" if dimension.log else "uniform"
    if dimension.integer:
        return {"distribution": "q_log_uniform_values", "min": low, "max": high, "q": 1}
    return {"distribution": kind, "min": low, "max": high}
