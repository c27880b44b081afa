"""The texts that the dashboard shows beside a study and a trial, and how they are stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from saeopt.config.settings import redact
from saeopt.config.sites import keys_of
from saeopt.config.study import Dimension, StudySpec
from saeopt.metrics import Metric, Shown, shown_in
from saeopt.search.collapse import rule_of
from saeopt.spread import N_SEEDS, text_of
from saeopt.trials import internals as db
from saeopt.trials.attributes import ORIGIN, Evaluation, number
from saeopt.trials.storage import Store

LIMIT = 2_000
"""The dashboard stores notes in pieces of 2,045 characters and reads all of them with every page: one must do."""


def save(store: Store, study_id: int, trial_id: int | None, body: str) -> None:
    """Store a note of at most one piece. (The dashboard's `save_note` reads the notes of all trials at every call.)"""
    body = redact(body)
    body = body if len(body) <= LIMIT else body[: LIMIT - 2] + " …"
    text_key, key = db.note_keys(trial_id)
    with store.write() as connection:
        version = db.get_attrs(connection, db.study_attrs, study_id, key).get(key, 0)
        values = {text_key: body, key: version + 1}
        db.set_attrs(connection, db.study_attrs, study_id, values)


def dimension_text(dimension: Dimension) -> str:
    """`0.05 … 10 (log)` or `8, 16, 32`."""
    if dimension.values is not None:
        text = ", ".join(str(v) for v in dimension.values) + (", refined" if dimension.refine else "")
    else:
        kinds = [name for name, on in (("log", dimension.log), ("whole numbers", dimension.integer)) if on]
        kinds += [f"step {dimension.step:g}"] if dimension.step else []
        text = f"{dimension.low:g} … {dimension.high:g}" + (f" ({', '.join(kinds)})" if kinds else "")
    when = "; ".join(f"{k.removeprefix('saes.')} {'/'.join(map(str, v))}" for k, v in dimension.when.items())
    return f"{text} where {when}" if when else text


def study_text(spec: StudySpec) -> str:
    """What the study is about and where its files are."""
    base, rule = spec.base, rule_of(spec)
    data, saes = base.get("data") or {}, base.get("saes") or {}
    model = base.get("tlens_model_name") or base.get("tlens_model_path") or base["data"].get("activations")
    objectives = ", ".join(("maximise " if o.maximised else "minimise ") + o.metric for o in spec.objectives)
    lines = [
        f"# {spec.name}",
        f"- language model: `{model}`",
        f"- data: `{data.get('activations') or data.get('dataset_name')}`, {data.get('n_train_samples')} samples of"
        f" {data.get('context_length')} tokens",
        f"- hook points: {', '.join(f'`{h}`' for h in keys_of(saes.get('sae_positions', [])))}",
        f"- sampler: {spec.sampler.type}; objectives: {objectives}; early stopping: {spec.early_stopping.type}",
        *([f"- seeds: {spec.n_seeds} per trial; values are means over them"] if spec.n_seeds > 1 else []),
        f"- run folders: `{spec.runs.resolve()}/<trial>/`",
        f"- a trial whose SAEs have all collapsed (L0 below {rule.min_l0:g} or FVU from {rule.max_fvu:g} on) is shown"
        " as pruned: no front holds it",
        "",
        "| parameter | values |",
        "|---|---|",
    ]
    for name, alternatives in spec.space.items():
        lines.append(f"| {name} | {'; '.join(dimension_text(d) for d in alternatives)} |")
    return "\n".join([*lines, "", f"Status: `saeopt study status {spec.name}`; best: `saeopt study best {spec.name}`"])


def _cell(metric: Metric, row: Mapping[str, Any]) -> str:
    numbers = {name: short for name, value in row.items() if (short := number(value)) is not None}
    return text_of(metric, numbers).replace("\n", " ")


def trial_text(trial: FrozenTrial, run_dir: Path, outcome: str, evaluation: Evaluation | None = None) -> str:
    """What the trial trains, what it came to, and where its files are."""
    rows = evaluation or {}
    n_seeds = max((row.get(N_SEEDS, 1) for row in rows.values()), default=1)
    lines, shown = [f"**{outcome}**", ""], shown_in(Shown.TABLE, seeds=n_seeds > 1)
    if rows:
        lines += [f"| hook point | {' | '.join(m.title for m in shown)} |", "|---|" + "--:|" * len(shown)]
    lines += [f"| {hook} | " + " | ".join(_cell(m, row) for m in shown) + " |" for hook, row in rows.items()]
    if n_seeds > 1:
        lines += ["", f"Means ± standard deviation over {n_seeds} seeds."]
    lines += ["", f"- run folder: `{run_dir.resolve()}`", f"- config: `{run_dir}/final_config.yaml`"]
    lines += [f"- started from: study {origin}"] if (origin := trial.user_attrs.get(ORIGIN)) else []
    lines += [f"- {name}: {json.dumps(value)}" for name, value in trial.params.items()]
    return "\n".join(lines)
