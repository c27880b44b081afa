"""What makes two runs, or two trials' streams, the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from saeopt.config.places import as_typed
from saeopt.config.roles import MAY_DIFFER, MEMBER_FIELDS
from saeopt.config.run import RunConfig

_LATER = {"activations", "n_threshold_samples"}
"""Fields of `data` that did not exist when the first studies stored their keys: null is as if they were not there."""


def stream_key(config: RunConfig) -> str:
    """Hash of everything that fixes the stream: trials with equal keys may share a pack (hook points may differ)."""
    fixed = as_typed(config.model_dump(mode="json", exclude=set(MEMBER_FIELDS) - {"as_typed"}))
    fixed["data"]["seed"] = config.data_seed
    for name in _LATER & fixed["data"].keys():
        if fixed["data"][name] is None:
            del fixed["data"][name]
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def same_anywhere(config: RunConfig) -> dict[str, Any]:
    """What fixes a run's result, its paths as they were typed: equal for the same run on every host."""
    dumped = as_typed(config.model_dump(mode="json"))
    return {key: value for key, value in dumped.items() if key not in MAY_DIFFER}
