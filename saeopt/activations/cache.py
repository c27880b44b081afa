"""Activations on disk, so that several runs on one host push the same text through the language model once.

A shard holds the activations of some consecutive slots at one hook point, in the language model's own dtype (or
`activations.dtype`), as a checksummed file that appears whole or not at all. Whoever needs a shard that is not there
harvests it under a lock and goes on; whoever comes meanwhile waits and reads. Shards are read through memory maps.

Suffixes: n slots, T positions, N = n·T tokens, d width.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from saeopt.console import log
from saeopt.errors import UserError
from saeopt.tensor_file import CorruptCheckpoint, read_metadata, verify, write_tensors

if TYPE_CHECKING:
    from saeopt.activations.language_model import LanguageModel
    from saeopt.activations.tokens import TokenBatch, TokenData
    from saeopt.config.run import RunConfig

CACHE_VARIABLE = "SAEOPT_ACTIVATION_CACHE"
"""A worker names the folder of its study's cache in this variable; `activations.cache: auto` uses it."""

SHARD_BYTES = 16 * 2**20
"""A shard is harvested in one go, during which nothing else happens: small enough for some seconds on a CPU."""
_OPEN_SHARDS = 16
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
_NOT_IN_KEY = {"eval_batch_size", "mask_special_tokens", "mask_norm_outliers", "shuffle_buffer_tokens"}


def cache_folder(config: RunConfig) -> Path | None:
    """Where a run's cache lies; None without one."""
    choice = config.activations.cache
    if choice == "off":
        return None
    root = os.environ.get(CACHE_VARIABLE) if choice == "auto" else choice
    return Path(root) if root else None


def cache_key(config: RunConfig, model: LanguageModel, tokens: TokenData, world: int, *layout: object) -> str:
    """Hash of everything that a cached number depends on, the rounding of batched products included.

    Names are not enough, because files change under them: some weights and tokens are looked at too.
    """
    fixed: dict[str, Any] = {
        "model": config.model, "lm_dtype": config.lm_dtype, "lm_processing": config.lm_processing,
        "lm_batch_size": config.lm_batch_size, "world": world, "layout": [str(part) for part in layout],
        "weights": model.fingerprint(), "tokens": tokens.fingerprint(),
        "data": config.data.model_dump(mode="json", exclude=_NOT_IN_KEY) | {"seed": config.data_seed},
    }  # fmt: skip
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def cache_bytes(n_samples: int, context_length: int, widths: Sequence[int], dtype: torch.dtype) -> int:
    """Size on disk of the activations of some hook points."""
    return n_samples * context_length * sum(widths) * dtype.itemsize


class ActivationCache:
    """The shards of one activation stream.

    Args:
        folder: the cache's root; the stream gets a folder of its own in it.
        group_slots: slots over all ranks that are harvested together (a shard holds whole groups).
        group_rows: sequences of one rank in such a group; `sequences` of them go through the model at once.
    """

    def __init__(
        self, folder: Path, config: RunConfig, model: LanguageModel, tokens: TokenData, hooks: Sequence[str],
        *, world: int, group_slots: int, sequences: int,
    ):  # fmt: skip
        self.model, self.tokens, self.config, self.world = model, tokens, config, world
        self.sequences = sequences
        self.T = config.data.context_length
        self.batch, self.group_slots = config.data.train_batch_size, group_slots
        self.dtype = model.dtype if config.activations.dtype == "auto" else _DTYPES[config.activations.dtype]
        self.widths = {hook: model.width(hook) for hook in hooks}
        per_slot = cache_bytes(1, self.T, [max(self.widths.values())], self.dtype)
        needed = config.data.n_train_samples or tokens.n_train_available
        groups = max(1, SHARD_BYTES // (per_slot * group_slots))
        self._needed = None if needed is None else -(-needed // group_slots) * group_slots
        self.shard_slots = groups * group_slots if self._needed is None else min(groups * group_slots, self._needed)
        self.folder = folder / cache_key(config, model, tokens, world, self.dtype, sequences, group_slots)
        self.limit = self._room()
        self._shards: OrderedDict[tuple[str, int], Tensor] = OrderedDict()
        self._reader: Iterator[TokenBatch] | None = None
        self._reader_slot = -1
        self._cursor: dict[str, Any] = {}

    def _room(self) -> int:
        """Slots that may lie on the disk; shards beyond are harvested each time anew."""
        per_slot = cache_bytes(1, self.T, list(self.widths.values()), self.dtype)
        allowed = self.config.activations.cache_max_gb * 2**30
        self.folder.mkdir(parents=True, exist_ok=True)
        have = sum(f.stat().st_size for f in self.folder.rglob("*.safetensors"))
        free = have + shutil.disk_usage(self.folder).free / 2
        slots = int(min(allowed, free) // per_slot) // self.shard_slots * self.shard_slots
        wanted = self._needed
        if wanted is not None and slots < wanted:
            log.info(
                "the activation cache holds %d of %d samples (%.1f GB are allowed, %.1f GB would hold all)",
                slots, wanted, min(allowed, free) / 2**30, wanted * per_slot / 2**30,
            )  # fmt: skip
        return slots if wanted is None else min(slots, wanted)

    def _slots(self, number: int) -> int:
        """Slots of a shard; the last one may be shorter."""
        first = number * self.shard_slots
        return self.shard_slots if self._needed is None else min(self.shard_slots, self._needed - first)

    def covers(self, slot: int) -> bool:
        """Whether the group that begins at a slot may be cached."""
        return slot % self.group_slots == 0 and slot + self.group_slots <= self.limit

    def note(self, cursor: Mapping[str, Any]) -> None:
        """A place from which a streamed data set can be read on, should shards behind it be missing."""
        if cursor:
            self._cursor = dict(cursor)

    def read(self, hooks: Sequence[str], slot: int, n: int, *, pin: bool = False) -> dict[str, Tensor]:
        """x_Nd per hook point of n consecutive slots, as copies on the CPU.

        What is missing is harvested first: only for the thread that may use the language model.
        """
        for number in range(slot // self.shard_slots, (slot + n - 1) // self.shard_slots + 1):
            if any(self._shard(hook, number) is None for hook in hooks):
                self._fill(number)
        x = self.peek(hooks, slot, n, pin=pin)
        if x is None:
            raise UserError(f"{self.folder}: shards cannot be read back right after they were written")
        return x

    def peek(self, hooks: Sequence[str], slot: int, n: int, *, pin: bool = False) -> dict[str, Tensor] | None:
        """As :meth:`read`, but None where something is missing or damaged; never uses the language model."""
        x: dict[str, Tensor] = {}
        for hook in hooks:
            x_nTd = torch.empty(n, self.T, self.widths[hook], dtype=self.dtype, pin_memory=pin)
            if not self._copy(hook, slot, x_nTd):
                return None
            x[hook] = x_nTd.flatten(0, 1)
        return x

    def _copy(self, hook: str, slot: int, out_nTd: Tensor) -> bool:
        """Copy consecutive slots to `out_nTd`; False if a shard is missing.

        By numpy: torch's copy would start a second set of OpenMP threads where this runs beside the training.
        """
        while len(out_nTd):
            number, within = divmod(slot, self.shard_slots)
            shard_nTd = self._shard(hook, number)
            if shard_nTd is None:
                return False
            rows_nTd = shard_nTd[within : within + len(out_nTd)]
            np.copyto(_bytes(out_nTd[: len(rows_nTd)]), _bytes(rows_nTd))
            slot, out_nTd = slot + len(rows_nTd), out_nTd[len(rows_nTd) :]
        return True

    def _path(self, hook: str, number: int) -> Path:
        return self.folder / hook.replace("/", "_") / f"{number:06}.safetensors"

    def _shard(self, hook: str, number: int) -> Tensor | None:
        """A shard, verified once and kept open; None where it is missing or damaged."""
        key = (hook, number)
        if key not in self._shards:
            found = self._open(hook, number)
            if found is None:
                return None
            self._shards[key] = found
            while len(self._shards) > _OPEN_SHARDS * len(self.widths):
                self._shards.popitem(last=False)
        return self._shards[key]

    def _open(self, hook: str, number: int, *, tell: bool = False) -> Tensor | None:
        """A shard, mapped into memory; None where it is missing or, with a warning if asked for, damaged."""
        from safetensors import safe_open

        path = self._path(hook, number)
        if not path.is_file():
            return None
        try:
            verify(path)
            if read_metadata(path).get("slots") != [number * self.shard_slots, self._slots(number)]:
                raise CorruptCheckpoint(f"{path}: holds other samples")
        except CorruptCheckpoint as error:
            if tell:
                log.warning("%s; it is harvested again", error)
            return None
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("x")

    def _fill(self, number: int) -> None:
        """Harvest and write what is missing of a shard; another process may have been faster."""
        from filelock import FileLock

        with FileLock(self.folder / f".{number:06}.lock"):
            missing = [h for h in self.widths if self._open(h, number, tell=True) is None]
            if not missing:
                return
            first, n = number * self.shard_slots, self._slots(number)
            x = self._harvest(first, n, missing)
            for hook in missing:
                metadata = {"hook_point": hook, "slots": [first, n], "model": self.config.model}
                write_tensors(self._path(hook, number), {"x": x[hook]}, metadata)

    def _harvest(self, first: int, n: int, hooks: Sequence[str]) -> dict[str, Tensor]:
        """x_nTd of a shard's slots, in passes of the very same shape as without a cache."""
        x = {h: torch.empty(n, self.T, self.widths[h], dtype=self.dtype) for h in hooks}
        micro = self.batch * self.world
        for group in range(first, first + n, self.group_slots):
            tokens_nT = torch.cat(self._read_tokens(group))
            slots_mrb = torch.arange(self.group_slots).view(self.group_slots // micro, self.world, self.batch)
            for rank in range(self.world):
                for rows in slots_mrb[:, rank].flatten().split(self.sequences):
                    for hook, x_bTd in self.model.activations(tokens_nT[rows], list(hooks)).items():
                        x[hook][group - first + rows] = x_bTd.to("cpu", self.dtype)
        return x

    def _read_tokens(self, slot: int) -> list[Tensor]:
        """The sequences of a group, over all ranks."""
        micro = self.batch * self.world
        if self._reader is None or self._reader_slot != slot:
            self._reader = self.tokens.train(slot, micro, cursor=self._cursor)
        parts = [next(self._reader) for _ in range(self.group_slots // micro)]
        self._reader_slot = slot + self.group_slots
        return [p.tokens_bT for p in parts]


def _bytes(tensor: Tensor) -> np.ndarray:
    """The tensor's memory, whatever its dtype (numpy has no bfloat16)."""
    return tensor.view(torch.uint8).numpy()
