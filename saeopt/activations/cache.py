"""Activations on disk, so that several runs on one host push the same text through the language model once.

A shard holds the activations of some consecutive samples at one hook point, in the language model's own dtype (or
`activations.dtype`), as a checksummed file that appears whole or not at all. Whoever needs a shard that is not there
harvests it under a lock and goes on; whoever comes meanwhile waits and reads. Threads read and verify the next shards
while one is trained on; they never use the language model.

Suffixes: n samples, T positions, N = n·T tokens, d width.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saeopt.activations.language_model import compiles
from saeopt.activations.shard_lock import Turn, turn
from saeopt.console import log
from saeopt.errors import UserError
from saeopt.runs.tensor_file import CorruptCheckpoint, MissingFile, read_metadata, read_tensor, write_tensors

if TYPE_CHECKING:
    from saeopt.activations.source import Samples, Source
    from saeopt.activations.tokens import TokenBatch
    from saeopt.config.run import RunConfig

CACHE_VARIABLE = "SAEOPT_ACTIVATION_CACHE"
"""A worker names the folder of its study's cache in this variable; `activations.cache: auto` uses it."""

SHARD_BYTES = 16 * 2**20
"""A shard is harvested in one go, during which nothing else happens: small enough for some seconds on a CPU."""
_READERS = 4
"""Threads: a reader waits for Python's lock far longer than for the disk while the training thread is busy."""
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
_NOT_IN_KEY = {
    "eval_batch_size", "eval_dataset_name", "eval_column_name", "eval_split", "skip_first_positions",
    "mask_special_tokens", "mask_norm_outliers", "shuffle_buffer_tokens", "activations",
}  # fmt: skip


def cache_folder(config: RunConfig) -> Path | None:
    """Where a run's cache lies; None without one."""
    choice = config.activations.cache
    if choice == "off" or config.data.activations is not None:
        return None
    root = os.environ.get(CACHE_VARIABLE) if choice == "auto" else choice
    return Path(root).expanduser() if root else None


def cache_key(config: RunConfig, model: Source, tokens: Samples, world: int, *layout: object) -> str:
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
        group_samples: samples over all ranks that are harvested together (a shard holds whole groups).
        sequences: of a rank's sequences in such a group so many go through the model at once.
        end: samples of the whole run where its last group is cut there; None: groups are whole.
    """

    def __init__(
        self, folder: Path, config: RunConfig, model: Source, tokens: Samples, hooks: Sequence[str],
        *, world: int, group_samples: int, sequences: int, end: int | None = None,
    ):  # fmt: skip
        self.model, self.tokens, self.config, self.world = model, tokens, config, world
        self.sequences = sequences
        self.T = config.data.context_length
        self.batch, self.group_samples = config.data.train_batch_size, group_samples
        self.dtype = model.dtype if config.activations.dtype == "auto" else _DTYPES[config.activations.dtype]
        self.widths = {hook: model.width(hook) for hook in hooks}
        per_sample = cache_bytes(1, self.T, [max(self.widths.values())], self.dtype)
        needed = config.data.n_train_samples or tokens.n_train_available
        groups = max(1, SHARD_BYTES // (per_sample * group_samples))
        self._needed = end if needed is None or end is not None else -(-needed // group_samples) * group_samples
        whole = groups * group_samples
        self.shard_samples = whole if self._needed is None else min(whole, self._needed)
        # A wider hook point makes shorter shards: without their length here two sets of hook points would take each
        # other's shards for damaged and overwrite them for ever.
        layout = (self.dtype, sequences, group_samples, self.shard_samples, *([] if end is None else [end]))
        self.folder = folder / cache_key(config, model, tokens, world, *layout)
        self.limit = self._room()
        self._pin = model.device.type == "cuda"
        self._compiled = compiles(config, model.device)
        self._shards: dict[tuple[str, int], Tensor] = {}
        self._coming: dict[tuple[str, int], Future[Tensor | None]] = {}
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="saeopt-cache")
        self._reader: Iterator[TokenBatch] | None = None
        self._reader_sample = -1
        self._cursor: dict[str, Any] = {}

    def _room(self) -> int:
        """Samples that may lie on the disk; shards beyond are harvested each time anew."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"'activations.cache': {self.folder} cannot be made: {error.strerror}") from None
        if not os.access(self.folder, os.W_OK):
            raise UserError(f"'activations.cache': {self.folder} cannot be written")
        allowed = int(self.config.activations.cache_max_gb * 2**30)
        have: dict[str, int] = {}  # also of hook points that others have asked for
        for file in self.folder.glob("*/*.safetensors"):
            have[file.parent.name] = have.get(file.parent.name, 0) + file.stat().st_size
        room = max(0, min(allowed - sum(have.values()), shutil.disk_usage(self.folder).free // 2))
        size = {self._path(h, 0).parent.name: cache_bytes(1, self.T, [w], self.dtype) for h, w in self.widths.items()}
        wanted = self._needed
        most = allowed // sum(size.values()) if wanted is None else wanted

        def missing(shards: int) -> int:
            """Bytes still to be written for so many shards."""
            samples = min(shards * self.shard_samples, most)
            return sum(max(0, samples * bytes_ - have.get(name, 0)) for name, bytes_ in size.items())

        shards = bisect_right(range(-(-most // self.shard_samples) + 1), room, key=missing) - 1
        samples = min(shards * self.shard_samples, most)
        if wanted is not None and samples < wanted:
            log.info(
                "the activation cache holds %d of %d samples (room for %.1f GB more, %.1f GB would hold all)",
                samples, wanted, room / 2**30, wanted * sum(size.values()) / 2**30,
            )  # fmt: skip
        return samples if wanted is not None else samples // self.shard_samples * self.shard_samples

    def _samples(self, number: int) -> int:
        """Samples of a shard; the last one may be shorter."""
        first = number * self.shard_samples
        return self.shard_samples if self._needed is None else min(self.shard_samples, self._needed - first)

    def covers(self, sample: int) -> bool:
        """Whether the group that begins at a sample may be cached."""
        n = self._group(sample)
        return sample % self.group_samples == 0 and n > 0 and sample + n <= self.limit

    def _group(self, sample: int) -> int:
        """Samples of the group that begins at a sample; the last one may be cut."""
        return self.group_samples if self._needed is None else min(self.group_samples, self._needed - sample)

    def note(self, cursor: Mapping[str, Any]) -> None:
        """A place from which a streamed data set can be read on, should shards behind it be missing."""
        if cursor:
            self._cursor = dict(cursor)

    def read(self, hook: str, first_sample: int, n: int) -> Tensor:
        """x_Nd of n consecutive samples, on the CPU (pinned for a GPU); not to be written to."""
        parts = []
        while n > 0:
            number, within = divmod(first_sample, self.shard_samples)
            rows_nTd = self._shard(hook, number)[within : within + n]
            parts.append(rows_nTd)
            first_sample, n = first_sample + len(rows_nTd), n - len(rows_nTd)
        x_nTd = parts[0] if len(parts) == 1 else torch.cat(parts)
        return x_nTd.flatten(0, 1)

    def close(self) -> None:
        """Stop the readers after what they are reading; safe to call again."""
        self._pool.shutdown(cancel_futures=True)

    def _path(self, hook: str, number: int) -> Path:
        return self.folder / hook.replace("/", "_") / f"{number:06}.safetensors"

    def _shard(self, hook: str, number: int) -> Tensor:
        """A shard in memory: read ahead, or read now, or harvested first."""
        key = (hook, number)
        if key not in self._shards:
            self._shards = {k: x for k, x in self._shards.items() if k[0] != hook and k[1] >= number - 1}
            coming = self._coming.pop(key, None)
            found = None if coming is None else coming.result()
            if found is None:
                found = self._open(hook, number)
            if found is None:
                unstored = self._fill(number)
                self._shards |= {(h, number): x_nTd for h, x_nTd in unstored.items()}
                found = unstored.get(hook)
            if found is None:
                found = self._open(hook, number)
            if found is None:
                raise UserError(f"{self._path(hook, number)}: cannot be read back right after it was written")
            self._shards[key] = found
            self._read_ahead(hook, number)
        return self._shards[key]

    def _read_ahead(self, hook: str, number: int) -> None:
        """Have the shards behind one read, as far as they are there; forget those that nobody came for."""
        self._coming = {k: f for k, f in self._coming.items() if k[1] >= number}
        shard = cache_bytes(self.shard_samples, self.T, [self.widths[hook]], self.dtype)
        for following in range(number + 1, number + (2 if shard > SHARD_BYTES else 3)):
            key = (hook, following)
            if key not in self._coming and self._path(*key).is_file():
                self._coming[key] = self._pool.submit(self._open, *key)

    def _open(self, hook: str, number: int, *, tell: bool = False) -> Tensor | None:
        """A shard, read and verified; None where it is missing or, with a warning if asked for, damaged.

        Raises:
            UserError: it is there and cannot be read; replacing it would take it from those who can.
        """
        path = self._path(hook, number)
        try:
            if read_metadata(path).get("slots") != [number * self.shard_samples, self._samples(number)]:
                raise CorruptCheckpoint(f"{path}: holds other samples")
            return read_tensor(path, "x", self.dtype, self._pin)
        except CorruptCheckpoint as error:
            if tell:
                log.warning("%s; it is harvested again", error)
        except MissingFile:
            pass
        except UserError as error:
            raise UserError(f"'activations.cache': {error}") from None
        return None

    def _fill(self, number: int) -> dict[str, Tensor]:
        """Harvest and write what is missing of a shard; another process may have been faster.

        Gives what could not be written: no run ends because its cache has found no room.
        """
        with turn(self.folder / f".{number:06}.lock") as mine:
            missing = [h for h in self.widths if self._open(h, number, tell=True) is None]
            if not missing:
                return {}
            for hook in missing if mine else []:  # under the lock nobody else writes it: its writer was killed
                for leftover in self._path(hook, number).parent.glob(f".{number:06}.safetensors.*.tmp"):
                    leftover.unlink(missing_ok=True)
            first, n = number * self.shard_samples, self._samples(number)
            x = self._harvest(first, n, missing, mine)
            try:
                for hook in missing:
                    metadata = {"hook_point": hook, "slots": [first, n], "model": self.config.model}
                    write_tensors(self._path(hook, number), {"x": x[hook]}, metadata)
            except UserError as error:
                self.limit = min(self.limit, first)
                log.warning("the activation cache ends at sample %d, the rest is harvested each time: %s", first, error)
                return x
        return {}

    def _harvest(self, first: int, n: int, hooks: Sequence[str], mine: Turn | None) -> dict[str, Tensor]:
        """x_nTd of a shard's samples, in the very same passes as without a cache."""
        x = {h: torch.empty(n, self.T, self.widths[h], dtype=self.dtype) for h in hooks}
        micro = self.batch * self.world
        for group in range(first, first + n, self.group_samples):
            size = self._group(group)
            tokens_nT = torch.cat(self._read_tokens(group, size))
            samples_mrb = torch.arange(size).view(size // micro, self.world, self.batch)
            for rank in range(self.world):
                for rows in samples_mrb[:, rank].flatten().split(self.sequences):
                    for hook, x_bTd in self.model.activations(tokens_nT[rows], list(hooks), self._compiled).items():
                        x[hook][group - first + rows] = x_bTd.to("cpu", self.dtype)
                    if mine is not None:
                        mine.progress()
        return x

    def _read_tokens(self, sample: int, n: int) -> list[Tensor]:
        """The n sequences of a group, over all ranks."""
        micro = self.batch * self.world
        if self._reader is None or self._reader_sample > sample:
            self._reader, self._reader_sample = self.tokens.train(sample, micro, cursor=self._cursor), sample
        while self._reader_sample < sample:  # another process has harvested these; to begin anew would cost all before
            next(self._reader)
            self._reader_sample += micro
        parts = [next(self._reader) for _ in range(n // micro)]
        self._reader_sample = sample + n
        return [p.tokens_bT for p in parts]
