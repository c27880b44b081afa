"""A checkpoint on the disk: the state first, then the weights, each file complete or not there at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeopt.config.run import RunConfig
from saeopt.runs.folder import RunFolder
from saeopt.runs.names import SEEDS
from saeopt.runs.tensor_file import by_site, read_metadata, read_tensors, write_tensors
from saeopt.runs.weights import save_weights

if TYPE_CHECKING:
    from torch import Tensor

    from saeopt.saes.base import SAE


@dataclass(frozen=True)
class Stored:
    """All of a checkpoint: what the state file says, the state by key, and of each seed the weights by site, and what
    their file says."""

    told: dict[str, Any]
    state: dict[str, dict[str, Tensor]]
    weights: list[dict[str, dict[str, Tensor]]]
    described: list[dict[str, Any]]


def write_checkpoint(
    folder: RunFolder,
    samples: int,
    state: Mapping[str, Tensor],
    told: Mapping[str, Any],
    config: RunConfig,
    saes: Sequence[Mapping[str, SAE]],
) -> Path:
    """Write the files (`saes`: of each seed, by site) and delete what is no longer kept; returns the weights file.

    Raises:
        UserError: the disk is full; older checkpoints stay as they are.
    """
    others = [one.seed for one in config.of_each_seed[1:]]
    write_tensors(folder.state_path(samples), state, {**told, SEEDS: others} if others else told)
    for seed, one, found in zip(others, config.of_each_seed[1:], saes[1:], strict=True):
        save_weights(folder.seed(seed).weights_path(samples), one, found, samples)
    save_weights(folder.weights_path(samples), config, saes[0], samples)
    folder.prune(config.keep_checkpoints)
    return folder.weights_path(samples)


def read_checkpoint(folder: RunFolder, samples: int, config: RunConfig) -> Stored:
    """All files of a checkpoint of this config.

    Raises:
        CorruptCheckpoint: one of them is damaged.
    """
    state, files = folder.state_path(samples), [f.weights_path(samples) for f in folder.of_each_seed(config)]
    described: list[Any] = [read_metadata(file)["hook_points"] for file in files]
    weights = [by_site(read_tensors(file)) for file in files]
    return Stored(read_metadata(state), by_site(read_tensors(state)), weights, described)


def identity(folder: RunFolder, samples: int) -> dict[str, str] | None:
    """Fingerprints of the tokens and the language model of a checkpoint; None where its version noted none."""
    found: Any = read_metadata(folder.state_path(samples)).get("identity")
    return found
