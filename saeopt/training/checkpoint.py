"""Checkpoints of a trial: what of its members is stored, and how they go on from it (files: `runs.checkpoint`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeopt.config.run import RunConfig
from saeopt.console import log
from saeopt.errors import UserError
from saeopt.runs.checkpoint import identity as stored_identity
from saeopt.runs.checkpoint import read_checkpoint, write_checkpoint
from saeopt.runs.folder import RunFolder
from saeopt.runs.tensor_file import CorruptCheckpoint
from saeopt.saes.base import SAE
from saeopt.training.pack import Member, Pack
from saeopt.training.plan import TrialResult


@dataclass
class Restored:
    """What a checkpoint gives back: samples consumed, the stream's cursor, each member's optimiser state by its key.

    `ended`: how the trial ended here, if it was given up or diverged.
    """

    samples: int
    cursor: dict[str, Any]
    states: dict[str, dict[str, Tensor]]
    ended: TrialResult | None = None


def save(
    folder: RunFolder,
    members: Sequence[Member],
    pack: Pack,
    samples: int,
    cursor: dict[str, Any],
    ended: TrialResult | None = None,
    identity: Mapping[str, str] | None = None,
) -> Path:
    """Write state and weights of one trial, and how it ended if it goes no further; returns the weights file.

    `identity`: fingerprints of the tokens and of the language model.

    Raises:
        UserError: the disk is full; older checkpoints stay as they are.
    """
    tensors = {f"{m.key}/{name}": t for m in members for name, t in pack.state(m).items()}
    metadata: dict[str, Any] = {
        "samples": samples,
        "cursor": cursor,
        "threads": torch.get_num_threads(),
        "world": pack.runtime.ranks.data.size,
        "stopped": {m.key: m.reason for m in members if m.reason is not None},
        **({} if identity is None else {"identity": dict(identity)}),
    }
    if ended is not None:
        metadata["ended"] = asdict(ended) | {"checkpoint": None}
    saes: list[dict[str, SAE]] = [{} for _ in range(members[0].config.seeds)]
    for member in members:
        saes[member.replica][member.hook_point] = member.sae
    return write_checkpoint(folder, samples, tensors, metadata, members[0].config, saes)


def restore(
    folder: RunFolder, members: Sequence[Member], world: int, identity: Mapping[str, str] | None = None
) -> Restored | None:
    """Load the newest usable checkpoint's weights into `members`; None (with a warning) if there is none.

    Raises:
        UserError: a checkpoint cannot be read (it may be whole, and starting over would replace it), or comes from
            other tokens or another language model than `identity` says.
    """
    for samples in folder.usable():
        try:
            _check_identity(folder, samples, members[0].config, identity or {})
            return _restore(folder, samples, members, world)
        except (CorruptCheckpoint, KeyError, TypeError, AttributeError) as error:
            log.warning("checkpoint %d of %s cannot be used: %s", samples, folder.path, error)
    log.warning("%s holds no usable checkpoint: starting over", folder.path)
    return None


def _restore(folder: RunFolder, samples: int, members: Sequence[Member], world: int) -> Restored:
    """One checkpoint into the members, once all of it has been read."""
    stored = read_checkpoint(folder, samples, members[0].config)
    told = stored.told
    threads, processes, stopped, ended = told["threads"], told["world"], told["stopped"], told.get("ended")
    states = {m.key: stored.state.get(m.key, {}) for m in members}
    found = Restored(samples, told["cursor"], states, None if ended is None else TrialResult(**ended))
    for member in members:
        _load(member, stored.weights[member.replica].get(member.hook_point, {}))
        member.sae.norm_limit = stored.described[member.replica][member.hook_point].get("norm_limit", math.inf)
        member.reason = stopped.get(member.key)
    if threads != torch.get_num_threads():
        log.info(
            "resuming with %d threads instead of %d: results may differ in the last bits",
            torch.get_num_threads(),
            threads,
        )
    if processes != world:
        log.warning(
            "resuming with %d processes instead of %d: the effective batch changes by the same factor",
            world,
            processes,
        )
    return found


def _check_identity(folder: RunFolder, samples: int, config: RunConfig, identity: Mapping[str, str]) -> None:
    before = stored_identity(folder, samples) or {}
    data = config.data
    lacking = {
        "tokens": f"'data.dataset_name': {data.dataset_name} does not give the tokens",
        "model": f"the language model {config.model} does not give the model",
    }
    for what, fingerprint in identity.items():
        if before.get(what, fingerprint) != fingerprint:
            rows = f"'data.activations': {data.activations} does not hold the rows of {what}"
            lack = lacking[what] if data.activations is None else rows
            raise UserError(f"{lack} that {folder.path} was trained on: not the same run")


def _load(member: Member, weights: dict[str, Tensor]) -> None:
    """Copy weights into a member. Only what does not fit is the file's fault: memory may be exhausted meanwhile."""
    own = member.sae.state_dict()
    if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in weights.items()}:
        raise CorruptCheckpoint(f"its tensors at {member} are not those of the config")
    member.sae.load_state_dict(weights)
