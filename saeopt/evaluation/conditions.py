"""What an evaluation was made of: data, tokens, language model, settings. It stands in every row of the file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from saeopt.files import read_error, read_sections
from saeopt.runs.names import EVALUATED, EVALUATION

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from saeopt.config import RunConfig

_DATA = ("data", "subset", "split", "column")
_NAMES = {*_DATA, "model", "lm_dtype"}
"""What may differ between equal evaluations: names of the same tokens and weights, and the device's precision."""

_UNFIT = re.compile(r"[^A-Za-z0-9.]+")


class _Model(Protocol):
    dtype: torch.dtype

    @property
    def identity(self) -> str:
        """The same for the same weights."""


class Seen:
    """The tokens that an evaluation gets, and their hash."""

    def __init__(self) -> None:
        self.n_samples = 0
        self._hash = hashlib.sha256()

    def watch(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The batches as they are."""
        for tokens_bT in batches:
            self.n_samples += len(tokens_bT)
            self._hash.update(tokens_bT.numpy().tobytes())
            yield tokens_bT

    @classmethod
    def all_of(cls, batches: Iterable[Tensor]) -> Seen:
        """Where the batches are shared among ranks, each of which gets a part."""
        seen = cls()
        for _ in seen.watch(batches):
            pass
        return seen

    @property
    def fingerprint(self) -> str:
        """Equal for the same tokens in any batches."""
        return self._hash.hexdigest()[:16]


def settings(config: RunConfig, n_samples: int, cross_entropy: bool = True) -> dict[str, Any]:
    """The conditions that a config tells."""
    data = config.data.eval_data or config.data
    return {
        "data": data.dataset_name, "subset": data.subset, "split": data.split, "column": data.column_name,
        "n_samples": n_samples, "context_length": data.context_length, "prepend_bos": data.prepend_bos,
        "mask_special_tokens": data.mask_special_tokens, "mask_norm_outliers": data.mask_norm_outliers,
        "skip_first_positions": data.skip_first_positions, "cross_entropy": cross_entropy,
        "ce_ablation": config.ce_ablation, "model": config.model, "lm_processing": config.lm_processing,
    }  # fmt: skip


def conditions(config: RunConfig, model: _Model, seen: Seen, cross_entropy: bool = True) -> dict[str, Any]:
    """The conditions of an evaluation that has run."""
    found = {"tokens": seen.fingerprint, "weights": model.identity, "lm_dtype": str(model.dtype).partition(".")[2]}
    return settings(config, seen.n_samples, cross_entropy) | found


def with_conditions(metrics: Mapping[str, Mapping[str, Any]], told: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows that say what they were made of."""
    return {hook: {**row, EVALUATED: dict(told)} for hook, row in metrics.items()}


def conditions_in(path: Path) -> dict[str, Any] | None:
    """The conditions that a file of an evaluation holds; None for an older file, or none.

    Raises:
        UserError: it cannot be read.
    """
    try:
        found = read_sections(path)
        return next((row.get(EVALUATED) for row in found.values()), None)
    except (FileNotFoundError, ValueError, AttributeError):
        return None
    except OSError as error:
        raise read_error(path, error) from error


def file_for(told: Mapping[str, Any], own: Mapping[str, Any], folder: Path, words: Sequence[str] = ()) -> Path:
    """`evaluation.json` for what the run itself evaluates, another name for anything else.

    No file is overwritten that was made under other conditions. `own`: the settings of the run, for where the folder
    holds no evaluation yet, or an older one; `words`: what the name must have in any case.
    """
    before = conditions_in(folder / EVALUATION) or own
    names = [*_words(told, before), *words]
    while True:
        path = folder / ("_".join(["evaluation", *names]) + ".json")
        there = conditions_in(path)
        more = [] if there is None else [word for word in _words(told, there) if word not in names]
        if not more:
            return path
        names += more


def _words(told: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What differs between two evaluations, for a file's name: the data, or else single settings."""
    tokens = f"tokens-{told['tokens'][:6]}"
    if any(told[key] != other.get(key) for key in _DATA) and told["tokens"] != other.get("tokens"):
        stem, theirs = (_UNFIT.sub("-", Path(str(given["data"])).stem) for given in (told, other))
        return [stem if stem != theirs else tokens]
    changed = [key for key in told if key in other and key not in _NAMES and told[key] != other[key]]
    if changed == ["tokens"]:
        return [tokens]
    words = {"n_samples": f"{told['n_samples']}-samples", "cross_entropy": "no-ce"}  # tokens follow from the others
    return [words.get(key, _UNFIT.sub("-", f"{key}-{told[key]}")) for key in changed if key != "tokens"]
