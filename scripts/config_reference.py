"""Write docs/configuration.md, docs/study.md and the table of docs/metrics.md from the descriptions in the source.

python scripts/config_reference.py
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from saeopt.config.limits import Budget, StopWhen
from saeopt.config.marks import role
from saeopt.config.roles import sections
from saeopt.config.saes import SAEConfig
from saeopt.config.starts import StartFrom
from saeopt.config.stopping import Collapse, EarlyStopping
from saeopt.config.study import Dimension, Objective, Sampler, StudySpec
from saeopt.metrics import METRICS, objective_metrics
from saeopt.saes.registry import ARCHITECTURES, sae_config_class

DOCS = Path(__file__).resolve().parents[1] / "docs"
STUDY_SECTIONS: dict[str, type[BaseModel]] = {
    "A parameter of `space`": Dimension,
    "`sampler`": Sampler,
    "An entry of `objectives`": Objective,
    "`early_stopping`": EarlyStopping,
    "`early_stopping.collapse`": Collapse,
    "`start_from`": StartFrom,
    "`budget`": Budget,
    "`stop_when`": StopWhen,
}
_SIGNS = {
    "minimum": "≥", "ge": "≥", "exclusiveMinimum": ">", "gt": ">", "maximum": "≤", "le": "≤", "exclusiveMaximum": "<",
    "lt": "<",
}  # fmt: skip
_LEGEND = """Numbers may be written as people do (`1e-3`, `20_000`, `1e5`); unknown keys are errors."""
RUN_HEAD = f"""# Configuration reference
Written by `scripts/config_reference.py` from the fields themselves. {_LEGEND}

The column *fixes* says what a field decides, and so which trials of a study can be trained together
([glossary](glossary.md)):

| fixes | trials that differ in it | may a study vary it? |
| --- | --- | --- |
| stream | read other activations: never in one pack | yes |
| shape | have other tensors: one pack, stacks of their own | yes |
| stack | are computed otherwise: one pack, stacks of their own | yes |
| member | train in one stack | yes |
| – | give the same results: names, folders, services, and how often something is done | no |
"""
STUDY_HEAD = f"""# Study file reference
Written by `scripts/config_reference.py` from the fields themselves. {_LEGEND} A short example:
```yaml
name: my-sweep
base: ../configs/tinystories/tinystories-relu.yaml
space:
  saes.sparsity_coeff: {{low: 0.1, high: 10, log: true}}
  saes.sae_type: [relu, topk]
  saes.k: {{values: [16, 32], when: {{sae_type: topk}}}}
sampler: tpe
max_trials: 40
objectives: [{{metric: ce_recovered, target_l0: 30}}]
early_stopping: {{type: median, warmup: 0.3}}
```
"""


def table(model: type[BaseModel], skip: frozenset[str] = frozenset(), *, roles: bool = False) -> str:
    """One row per field."""
    rows = [
        f"| field | default |{' fixes |' if roles else ''} meaning |",
        f"| --- | --- |{' --- |' if roles else ''} --- |",
    ]
    for name, field in model.model_fields.items():
        if name not in skip:
            found = role(field)
            fixes = f" {found.fixes if found.result else '–'} |" if roles else ""
            shown = field.alias or name
            meaning = f"{_cell(field.description or '')}{_bounds(model, shown)}"
            rows.append(f"| `{shown}` | {_default(field)} |{fixes} {meaning} |")
    return "\n".join(rows) + "\n"


def _bounds(model: type[BaseModel], name: str) -> str:
    """The words that may stand there, where the description does not name them, and what a number must lie between."""
    schema = model.model_json_schema()["properties"][name]
    parts = [schema, *schema.get("anyOf", [])]
    words = [str(word) for part in parts for word in part.get("enum", []) if word is not None]
    told = schema.get("description", "")
    found: dict[str, Any] = next((part for part in parts if part.keys() & _SIGNS.keys()), {})
    limits = [f"{sign} {found[key]:.10g}" for key, sign in _SIGNS.items() if key in found]
    choices = f" One of {', '.join(words)}." if any(word not in told for word in words) else ""
    return choices + (f" ({', '.join(limits)})" if limits else "")


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    return f"`{_shown(field.get_default(call_default_factory=True, validated_data={}))}`"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, BaseModel):  # what it is called in short, or its own section's defaults
        return str(getattr(value, "type", getattr(value, "metric", "{}")))
    return f"[{', '.join(map(_shown, value))}]" if isinstance(value, list | tuple) else str(value)


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def configuration(architectures: Iterable[str] = ARCHITECTURES) -> str:
    """docs/configuration.md."""
    found = sections()
    parts = [RUN_HEAD, "## The run\n" + table(found[""], frozenset(found), roles=True)]
    common = frozenset(SAEConfig.model_fields)
    for section, model in found.items():
        if section == "saes":
            parts.append("## `saes`, every architecture\n" + table(model, roles=True))
            for name in architectures:
                own = sae_config_class(name)
                if set(own.model_fields) - common:
                    parts.append(f"## `saes` with `sae_type: {name}`\n" + table(own, common, roles=True))
        elif section:
            parts.append(f"## `{section}`\n" + table(model, roles=True))
    return "\n".join(parts)


def study() -> str:
    """docs/study.md."""
    parts = [STUDY_HEAD, "## The study\n" + table(StudySpec)]
    for title, model in STUDY_SECTIONS.items():
        parts.append(f"## {title}\n{_text(model)}\n\n" + table(model))
    known = ", ".join(f"`{name}`" for name in objective_metrics())
    parts.append(f"## Metrics that can be objectives\n{known}: see [Metrics](metrics.md).\n")
    return "\n".join(parts)


def _text(model: type[BaseModel]) -> str:
    return re.sub(r"\s+", " ", (model.__doc__ or "").strip())


def metrics() -> str:
    """docs/metrics.md: its table is written anew, the text around it stays."""
    before, rest = (DOCS / "metrics.md").read_text(encoding="utf-8").split(_TABLE, 1)
    rows = [f"| `{metric.name}` | {_cell(metric.what)} |\n" for metric in METRICS.values() if metric.what]
    return before + _TABLE + "".join(rows) + "\n" + rest.partition("\n\n")[2]


_TABLE = "| metric | what it is |\n| --- | --- |\n"
PAGES = {"configuration.md": configuration, "study.md": study, "metrics.md": metrics}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is out of date")
    if parser.parse_args().check:
        sys.exit(any((DOCS / name).read_text(encoding="utf-8") != page() for name, page in PAGES.items()))
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
