"""Write docs/configuration.md from the descriptions of the config fields: python scripts/config_reference.py"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from saeopt.config.run import DataConfig, PerformanceConfig, RunConfig
from saeopt.config.saes import SAEConfig
from saeopt.saes.registry import ARCHITECTURES, sae_config_class

TARGET = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
_SIGNS = {
    "minimum": "≥", "ge": "≥", "exclusiveMinimum": ">", "gt": ">", "maximum": "≤", "le": "≤", "exclusiveMaximum": "<",
    "lt": "<",
}  # fmt: skip
HEAD = """# Configuration reference
Written by `scripts/config_reference.py` from the fields themselves. Numbers may be written as people do (`1e-3`,
`20_000`, `1e5`); unknown keys are errors. A *sample* is one sequence of `context_length` tokens.
"""


def table(model: type[Any], skip: frozenset[str] = frozenset()) -> str:
    """One row per field."""
    rows = ["| field | default | meaning |", "| --- | --- | --- |"]
    for name, field in model.model_fields.items():
        if name not in skip:
            rows.append(f"| `{name}` | {_default(field)} | {_cell(field.description or '')}{_bounds(model, name)} |")
    return "\n".join(rows) + "\n"


def _bounds(model: type[Any], name: str) -> str:
    """What a number must lie between."""
    schema = model.model_json_schema()["properties"][name]
    found: dict[str, Any] = next(
        (part for part in (schema, *schema.get("anyOf", [])) if part.keys() & _SIGNS.keys()), {}
    )
    limits = [f"{sign} {found[key]:.10g}" for key, sign in _SIGNS.items() if key in found]
    return f" ({', '.join(limits)})" if limits else ""


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or isinstance(value, bool):
        return f"`{'null' if value is None else str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def reference() -> str:
    """The whole page."""
    parts = [HEAD, "## The run\n" + table(RunConfig, frozenset(["data", "saes", "performance"]))]
    parts.append("## `data`\n" + table(DataConfig))
    parts.append("## `saes`, every architecture\n" + table(SAEConfig))
    common = frozenset(SAEConfig.model_fields)
    for name in ARCHITECTURES:
        own = sae_config_class(name)
        if set(own.model_fields) - common:
            parts.append(f"## `saes` with `sae_type: {name}`\n" + table(own, common))
    parts.append("## `performance`\n" + table(PerformanceConfig))
    return "\n".join(parts)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is out of date")
    if parser.parse_args().check:
        sys.exit(TARGET.read_text(encoding="utf-8") != reference())
    TARGET.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
