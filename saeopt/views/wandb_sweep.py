"""A study as W&B sweeps. What W&B cannot hold is refused, or said where it changes no trial."""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from saeopt.config.sites import keys_of
from saeopt.config.study import StudySpec
from saeopt.errors import UserError
from saeopt.files import MEAN, write_text
from saeopt.search.objectives import expanded
from saeopt.search.space import Parameter, Space

_METHODS = {"grid": "grid", "tpe": "bayes", "gp": "bayes", "random": "random", "qmc": "random"}
_MOST_VALUES = 1000
"""Values of a stepped range that are written out."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
"""Names of parameters that W&B takes: none with an `@`."""
_AT = "-at-"
_SCRIPT = """\
args=(); for a in "$@"; do n=${{a%%=*}}; args+=(--set "${{n/{at}/@}}=${{a#*=}}"); done
python={python}; [ -x "$python" ] || python=python
exec "$python" -m saeopt.train --config {base} "${{args[@]}}"
"""


def export_wandb_sweep(spec: StudySpec, file: Path) -> tuple[list[Path], list[str]]:
    """Write sweep definitions of a study's space, and the base config beside them.

    W&B knows no conditional parameters: there is a sweep for each choice of the parameters that others depend on.
    Returns the sweeps, the base config last, and what is different in W&B.

    Raises:
        UserError: the study has what W&B cannot hold.
    """
    _refuse(spec)
    space = Space(spec)
    metric, notices = _metric(spec), _notices(spec)
    base = file.with_name(f"{file.stem}_base.yaml").absolute()
    sweeps: dict[Path, dict[str, Any]] = {}
    for label, fixed, free in _unconditional(spec, space):
        path = file.with_name(f"{file.stem}-{label}{file.suffix}") if label else file
        script = _SCRIPT.format(at=_AT, python=shlex.quote(sys.executable), base=shlex.quote(str(base)))
        sweeps[path] = {
            "name": f"{spec.name}-{label}" if label else spec.name,
            **({"project": project} if (project := spec.base.get("wandb_project")) else {}),
            "method": _METHODS[spec.sampler.type],
            **metric,
            "parameters": {_named(spec, k): {"value": v} for k, v in fixed.items()}
            | {_named(spec, p.field): _parameter(spec, p) for p in free},
            "command": ["/usr/bin/env", "bash", "-c", script, "sweep", "${args_no_hyphens}"],
        }
    if spec.max_trials is not None:
        for i, sweep in enumerate(sweeps.values()):  # together as many as the study has
            sweep["run_cap"] = max(1, (spec.max_trials + len(sweeps) - 1 - i) // len(sweeps))
    raw = dict(spec.base)
    if not raw.get("wandb_project") and "wandb" not in (raw.get("trackers") or []):
        raw["trackers"] = [*(raw.get("trackers") or []), "wandb"]  # a sweep sees what its runs log
    write_text(base, yaml.safe_dump(raw, sort_keys=False, allow_unicode=True))
    for path, sweep in sweeps.items():
        write_text(path, yaml.safe_dump(sweep, sort_keys=False, allow_unicode=True))
    return [*sweeps, base], notices


def _refuse(spec: StudySpec) -> None:
    kind = spec.sampler.type
    if refined := Space(spec).refined:
        raise UserError(f"study '{spec.name}': a W&B sweep cannot refine '{refined[0].name}': give a list of values")
    if kind not in _METHODS:
        known = ", ".join(sorted(_METHODS))
        raise UserError(
            f"study '{spec.name}': W&B sweeps have no sampler like {kind} (those of {known} can be exported)"
        )
    if _METHODS[kind] == "bayes" and len(expanded(spec)) > 1:
        names = ", ".join(name for name, _ in expanded(spec))
        raise UserError(
            f"study '{spec.name}': a W&B sweep has one objective, the study {len(expanded(spec))} ({names})"
        )


def _notices(spec: StudySpec) -> list[str]:
    """What a W&B sweep of the study does not do."""
    found = []
    if len(expanded(spec)) > 1:
        found.append(
            f"W&B sweeps have one objective: none is written, and a {_METHODS[spec.sampler.type]} sweep needs none"
        )
    if spec.early_stopping.type != "none":
        found.append(f"'early_stopping: {spec.early_stopping.type}' is not W&B's: its runs train to their end")
    if spec.sampler.type == "grid" and spec.max_trials is not None:
        found.append("'max_trials' becomes run_cap: W&B takes the cells of a grid in an order of its own")
    aimed = spec.base["saes"].get("target_l0") is not None or Space(spec).varies("saes.target_l0")
    if len(expanded(spec)) == 1 and aimed and spec.objectives[0].metric != "l0":
        found.append("the objective of a trial that misses its 'saes.target_l0' is worse here, and not in W&B")
    if spec.sampler.type == "qmc":
        found.append("W&B has no quasi-random design: the sweep is random")
    return found


def _metric(spec: StudySpec) -> dict[str, Any]:
    """The key of the objective as a run logs it; nothing where there are several."""
    objectives = expanded(spec)
    if len(objectives) > 1:
        return {}
    name, objective = objectives[0]
    if objective.target_l0 is not None:
        raise UserError(f"study '{spec.name}': no run logs the objective '{name}': W&B cannot aim at an L0")
    hooks = keys_of((spec.base.get("saes") or {}).get("sae_positions") or [])
    wanted = objective.hook_points if isinstance(objective.hook_points, str) else list(objective.hook_points)
    if wanted == "mean" or wanted == hooks or [wanted] == hooks:
        where = MEAN
    elif isinstance(wanted, list) and len(wanted) > 1:
        raise UserError(f"study '{spec.name}': no run logs the objective '{name}', a mean over some of its hook points")
    else:
        where = wanted if isinstance(wanted, str) else wanted[0]
    goal = "maximize" if objective.maximised else "minimize"
    return {"metric": {"name": f"{where}/eval_{objective.metric}", "goal": goal}}


def _unconditional(spec: StudySpec, space: Space) -> Iterator[tuple[str, dict[str, Any], list[Parameter]]]:
    """(label, values that are fixed, parameters that are free) of each choice on which parameters depend."""
    parents = [p for p in space.parameters if p.field in space.parents]
    for p in parents:
        if p.dimension.values is None or p.dimension.when:
            raise UserError(f"study '{spec.name}': W&B sweeps know no parameters that depend on a range ('{p.name}')")
    for choice in itertools.product(*(p.choices for p in parents)):
        fixed = {p.field: p.value(stored) for p, stored in zip(parents, choice, strict=True)}
        free = [p for p in space.parameters if p not in parents and space.active(p, fixed)]
        label = "-".join(str(v) for v in fixed.values())
        yield "".join(c if c.isalnum() or c in "-_." else "-" for c in label), fixed, free


def _named(spec: StudySpec, field: str) -> str:
    name = field.replace("@", _AT)
    if not _NAME.fullmatch(name):
        raise UserError(f"study '{spec.name}': W&B sweeps know no parameter of the name '{field}'")
    return name


def _parameter(spec: StudySpec, p: Parameter) -> dict[str, Any]:
    d, grid = p.dimension, spec.sampler.type == "grid"
    if d.values is None and not grid and d.step is None:
        ends: dict[str, Any] = {"min": d.low, "max": d.high}
        if d.integer:
            ends = {"min": int(d.low or 0), "max": int(d.high or 0)}
            kind = {"distribution": "q_log_uniform_values", "q": 1} if d.log else {"distribution": "int_uniform"}
            return {**kind, **ends}
        return {"distribution": "log_uniform_values" if d.log else "uniform", **ends}
    if len(p.choices) > _MOST_VALUES:
        raise UserError(f"study '{spec.name}': 'space.{p.name}' has {len(p.choices)} values, too many for a W&B sweep")
    values = [p.value(stored) for stored in p.choices]
    if any(value is None for value in values):
        raise UserError(f"study '{spec.name}': 'space.{p.name}': W&B sweeps know no null")
    return {"values": values}
