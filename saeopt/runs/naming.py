"""A run's name from the parameters that matter. Importing this imports no torch."""

from __future__ import annotations

import re
from pathlib import PurePath

from saeopt.config.run import RunConfig

MAX_LENGTH = 120
"""File systems allow 255 bytes; the run folder appends a number where names are equal."""

_UNSAFE = re.compile(r"[^A-Za-z0-9._+=-]+")


def run_name(config: RunConfig) -> str:
    """`wandb_run_name`, or label, model, hook points, sparsity, learning rate, dictionary ratio and seed.

    The name is safe as a folder name and at most `MAX_LENGTH` characters long.
    """
    if config.wandb_run_name:
        return _safe(config.wandb_run_name)
    saes = config.saes
    head = [saes.name or saes.sae_type.rpartition(":")[2], PurePath(config.model).name, _hooks(saes.keys)]
    tail = [saes.sparsity_label, f"lr{config.lr:g}", f"x{saes.dict_size_to_input_ratio:g}"]
    if config.max_grad_norm != 1.0:
        tail.append("noclip" if config.max_grad_norm is None else f"clip{config.max_grad_norm:g}")
    if saes.per_hook:
        tail.append("perhook")
    last = config.seed + config.seeds - 1
    tail.append(f"seed{config.seed}" if last == config.seed else f"seeds{config.seed}-{last}")
    end = "-".join(tail)
    return _safe("-".join(head))[: MAX_LENGTH - len(end) - 1].rstrip("-.") + "-" + end


def _safe(text: str) -> str:
    """Letters, digits and `._+=-` only, never hidden, never empty."""
    return _UNSAFE.sub("-", text.replace("*", "all")).strip("-.")[:MAX_LENGTH] or "run"


def _hooks(positions: list[str]) -> str:
    """`2+4.resid_pre` for blocks.2.hook_resid_pre and blocks.4.hook_resid_pre; the first and a count for many."""
    if len(positions) > 4:
        return f"{_short(positions[0])}+{len(positions) - 1}more"
    kinds = {_short(p).partition(".")[2] for p in positions}
    if len(kinds) == 1 and all(p.startswith("blocks.") for p in positions):
        return "+".join(_short(p).partition(".")[0] for p in positions) + "." + kinds.pop()
    return "+".join(_short(p) for p in positions)


def _short(hook_point: str) -> str:
    return hook_point.removeprefix("blocks.").replace("hook_", "")
