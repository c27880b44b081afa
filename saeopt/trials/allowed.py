"""What a worker takes from a store. Whoever may write to the store chooses what workers import and where they write.

`worker --only-builtin` and `--output-root DIR` refuse it. Both are environment variables too, so that a worker's own
processes have them.
"""

from __future__ import annotations

import os
from pathlib import Path

from saeopt.config.places import expanded
from saeopt.config.study import StudySpec
from saeopt.errors import UserError
from saeopt.saes.registry import ARCHITECTURES, ONLY_BUILTIN

OUTPUT_ROOT = "SAEOPT_OUTPUT_ROOT"


def check_allowed(spec: StudySpec) -> None:
    """Raise :class:`UserError` for a study that asks this worker for more than it may do."""
    if os.environ.get(ONLY_BUILTIN):
        named = {spec.base_sae_type, *map(str, _values(spec, "saes.sae_type"))}
        foreign = sorted(named - ARCHITECTURES.keys())
        if foreign:
            raise UserError(f"--only-builtin: study {spec.name} names '{foreign[0]}', which is not one of saeopt's own")
    root = os.environ.get(OUTPUT_ROOT)
    if root:
        sections = [spec.base.get("activations"), *_values(spec, "activations")]
        caches = [section.get("cache") for section in sections if isinstance(section, dict)]
        folders = {str(spec.runs), *(str(cache) for cache in caches if cache not in (None, "auto", "off", False))}
        for folder in sorted(folders):
            if not Path(expanded(folder)).resolve().is_relative_to(Path(root).expanduser().resolve()):
                raise UserError(f"--output-root: study {spec.name} writes to {folder}, which does not lie in {root}")


def _values(spec: StudySpec, field: str) -> list[object]:
    return [value for dimension in spec.space.get(field, []) for value in dimension.values or []]
