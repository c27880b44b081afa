"""A checkpoint on the disk: the state first, then the weights, each file complete or not there at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeopt.config.run import RunConfig
from saeopt.runs.folder import RunFolder
from saeopt.runs.tensor_file import by_site, read_metadata, read_tensors, write_tensors
from saeopt.runs.weights import save_weights

if TYPE_CHECKING:
    from torch import Tensor

    from saeopt.saes.base import SAE


@dataclass(frozen=True)
class Stored:
    """All of a checkpoint: what the state file says, and by site its state, its weights, and what their file says."""

    told: dict[str, Any]
    state: dict[str, dict[str, Tensor]]
    weights: dict[str, dict[str, Tensor]]
    described: dict[str, Any]


def write_checkpoint(
    folder: RunFolder,
    samples: int,
    state: Mapping[str, Tensor],
    told: Mapping[str, Any],
    config: RunConfig,
    saes: Mapping[str, SAE],
) -> Path:
    """Write both files and delete what is no longer kept; returns the weights file.

    Raises:
        UserError: the disk is full; older checkpoints stay as they are.
    """
    write_tensors(folder.state_path(samples), state, told)
    save_weights(folder.weights_path(samples), config, saes, samples)
    folder.prune(config.keep_checkpoints)
    return folder.weights_path(samples)


def read_checkpoint(folder: RunFolder, samples: int) -> Stored:
    """Both files of a checkpoint.

    Raises:
        CorruptCheckpoint: one of them is damaged.
    """
    state, weights = folder.state_path(samples), folder.weights_path(samples)
    described: Any = read_metadata(weights)["hook_points"]
    return Stored(read_metadata(state), by_site(read_tensors(state)), by_site(read_tensors(weights)), described)


def identity(folder: RunFolder, samples: int) -> dict[str, str] | None:
    """Fingerprints of the tokens and the language model of a checkpoint; None where its version noted none."""
    found: Any = read_metadata(folder.state_path(samples)).get("identity")
    return found
