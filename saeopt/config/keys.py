"""What makes two runs, or two trials' streams, the same."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from saeopt.config.places import as_typed
from saeopt.config.roles import MAY_DIFFER, MEMBER_FIELDS
from saeopt.config.run import RunConfig


def stream_key(config: RunConfig) -> str:
    """Hash of everything that fixes the stream: trials with equal keys may share a pack (hook points may differ)."""
    fixed = as_typed(config.model_dump(mode="json", exclude=set(MEMBER_FIELDS) - {"as_typed"}))
    fixed["data"]["seed"] = config.data_seed
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def same_anywhere(config: RunConfig) -> dict[str, Any]:
    """What fixes a run's result, its paths as they were typed: equal for the same run on every host."""
    dumped = as_typed(config.model_dump(mode="json"))
    return {key: value for key, value in dumped.items() if key not in MAY_DIFFER}
