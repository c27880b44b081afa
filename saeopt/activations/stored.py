"""Activations that lie in safetensors files, in place of a language model.

A sample is `data.context_length` consecutive rows of the files; what the stream calls tokens are row numbers. A file
holds one site: `x` [N, d], what is read, and `y` [N, e], what is to be given, where that is not x; several hook points
of equal width lie side by side. In a folder each site has a file, called by its key (`Site.file_name`).

Suffixes: B batch, T rows of a sample, N rows, d width.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saeopt.activations.tokens import TokenBatch
from saeopt.config.sites import Site, hooks_of, is_pattern, resolved
from saeopt.console import log
from saeopt.errors import UserError
from saeopt.saes.noise import derived_seed

if TYPE_CHECKING:
    from saeopt.config.run import DataConfig, RunConfig
    from saeopt.config.saes import SAEConfig

_CHECKED_AT_ONCE = 2**16
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FIELD = "'data.activations'"


class _Part(NamedTuple):
    """The columns of a tensor that are one hook point's."""

    x_Nd: Tensor
    file: Path


class StoredActivations:
    """The files of a run, read where rows are asked for. Build one with :meth:`load`."""

    predicts = False
    n_parameters = 0

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device
        self.special_ids: set[int] = set()
        self.dtype = torch.float32
        self.n_rows = 0
        self._parts: dict[str, _Part] = {}
        self._hashes: dict[str, str] = {}
        self._files: dict[Path, dict[str, Tensor]] = {}

    @classmethod
    def load(cls, config: RunConfig, device: torch.device | str = "cpu") -> StoredActivations:
        """The files of a config's sites.

        Raises:
            UserError: a file or tensor that is missing, empty, of another shape or not finite.
        """
        path = Path(config.data.activations or "")
        if not path.exists():
            raise UserError(f"{_FIELD}: {path}: no such file or folder")
        found = cls(path, torch.device(device))
        found.sites(config.saes)
        log.info("%s: there is no language model beside stored activations: no cross-entropies", path)
        return found

    # ---- sites
    def sites(self, saes: SAEConfig) -> list[Site]:
        """The sites of a config; their files are opened and looked at."""
        positions = saes.sae_positions
        if self.path.is_file() and (len(positions) > 1 or any(map(is_pattern, hooks_of(positions)))):
            raise UserError(f"{_FIELD}: {self.path} holds one site: name it, or give a folder with a file for each")
        found = resolved(positions, self._named)
        for site in found:
            self._open(site)
        return found

    def _named(self, patterns: Sequence[str]) -> list[str]:
        if self.path.is_file():
            return list(patterns)
        known = sorted(unquote(file.stem) for file in self.path.glob("*.safetensors"))
        found: list[str] = []
        for pattern in patterns:
            matched = fnmatch.filter(known, pattern) if is_pattern(pattern) else [pattern]
            if not matched:
                raise UserError(f"'saes.sae_positions': {self.path} has no file for '{pattern}'")
            found += matched
        return list(dict.fromkeys(found))

    def resolve(self, patterns: Sequence[str] | str) -> list[str]:
        """Hook points of sites that were opened."""
        names = [patterns] if isinstance(patterns, str) else list(patterns)
        for name in names:
            if name not in self._parts:
                raise UserError(f"'saes.sae_positions': {self.path} has nothing of '{name}'")
        return names

    def _open(self, site: Site) -> None:
        file = self.path if self.path.is_file() else self.path / f"{site.file_name}.safetensors"
        tensors = self._read(file)
        wanted = {"x": site.reads} if site.reads == site.writes else {"x": site.reads, "y": site.writes}
        for name, hooks in wanted.items():
            if name not in tensors:
                held = ", ".join(sorted(tensors)) or "nothing"
                raise UserError(f"{_FIELD}: {file}: holds no tensor '{name}' (but {held}), which '{site.key}' needs")
            width = tensors[name].shape[1]
            if width % len(hooks):
                raise UserError(f"{_FIELD}: {file}: '{name}' has width {width}: no {len(hooks)} equal hook points")
            for hook, part in zip(hooks, tensors[name].split(width // len(hooks), dim=1), strict=True):
                had = self._parts.setdefault(hook, _Part(part, file))
                if had.x_Nd.shape[1] != part.shape[1]:
                    raise UserError(
                        f"{_FIELD}: {file}: {hook} has width {part.shape[1]}, and {had.x_Nd.shape[1]} in {had.file}"
                    )
                if had.file != file and not torch.equal(had.x_Nd, part):
                    raise UserError(f"{_FIELD}: {file} and {had.file} hold different rows of {hook}")

    def _read(self, file: Path) -> dict[str, Tensor]:
        """x and y of a file, looked at once."""
        if file in self._files:
            return self._files[file]
        try:
            with safe_open(file, "pt") as opened:
                held = list(opened.keys())
                tensors = {name: opened.get_tensor(name) for name in ("x", "y") if name in held}
        except FileNotFoundError:
            raise UserError(f"{_FIELD}: {file}: no such file") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{_FIELD}: {file}: cannot be read: {' '.join(str(error).split())[:150]}") from None
        if "x" not in held:
            raise UserError(f"{_FIELD}: {file}: holds no tensor 'x' (but {', '.join(sorted(held)) or 'nothing'})")
        for name, x_Nd in tensors.items():
            self._check(file, name, x_Nd)
        self._files[file] = tensors
        return tensors

    def _check(self, file: Path, name: str, x_Nd: Tensor) -> None:
        problem = None
        if x_Nd.dim() != 2 or x_Nd.dtype not in _DTYPES:
            problem = f"has shape {list(x_Nd.shape)} and type {x_Nd.dtype}: it must be [N, width], 16 to 64 bit floats"
        elif x_Nd.numel() == 0:
            problem = "is empty"
        elif self.n_rows not in (0, len(x_Nd)):
            problem = f"has {len(x_Nd):,} rows, another tensor {self.n_rows:,}: they must be of the same tokens"
        elif not all(torch.isfinite(part).all() for part in x_Nd.split(_CHECKED_AT_ONCE)):
            problem = "holds NaN or infinite numbers"
        if problem is not None:
            raise UserError(f"{_FIELD}: {file}: '{name}' {problem}")
        if self.n_rows == 0:
            self.n_rows, self.dtype = len(x_Nd), x_Nd.dtype

    # ---- what a source gives
    def width(self, hook: str) -> int:
        """The width at a hook point."""
        self.resolve(hook)
        return self._parts[hook].x_Nd.shape[1]

    def activations(self, tokens_BT: Tensor, hooks: Sequence[str], compiled: bool = False) -> dict[str, Tensor]:
        """x_BTd at each hook point, of the rows that are named."""
        rows_BT = tokens_BT.cpu()
        return {hook: self._parts[hook].x_Nd[rows_BT].to(self.device) for hook in hooks}

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """There are none."""
        raise UserError(f"{_FIELD}: files hold no language model: there is no cross-entropy")

    def spliced_logits(self, tokens_BT: Tensor, splices: Any) -> Tensor:
        """There are none."""
        return self.logits(tokens_BT)

    @property
    def identity(self) -> str:
        """The same for the same rows at the same hook points."""
        return self.fingerprint()

    def fingerprint(self) -> str:
        """Changes with any row."""
        return hashlib.sha256(json.dumps(self.identities(), sort_keys=True).encode()).hexdigest()[:16]

    def identities(self) -> dict[str, str]:
        """Of each hook point: the same for the same rows."""
        for hook, part in self._parts.items():
            if hook not in self._hashes:
                found = hashlib.sha256()
                for rows_nd in part.x_Nd.split(_CHECKED_AT_ONCE):
                    found.update(rows_nd.contiguous().view(torch.uint8).numpy().data)
                self._hashes[hook] = found.hexdigest()[:16]
        return dict(self._hashes)


class StoredRows:
    """Samples of row numbers: the last `data.n_held_out` are held out (those of the evaluation behind those that
    thresholds are set on), the others shuffled by the data seed."""

    def __init__(self, data: DataConfig, source: StoredActivations) -> None:
        self.data, self.n_rows = data, source.n_rows
        samples = self.n_rows // data.context_length
        self.n_train = samples - data.n_held_out
        if self.n_train < 1:
            raise UserError(
                f"{_FIELD}: {source.path}: {self.n_rows:,} rows are {samples} samples of {data.context_length}"
                f" ('data.context_length'), too few where {data.n_held_out} of them are held out"
                f" ('data.n_{'threshold' if data.n_threshold_samples else 'eval'}_samples')"
            )
        asked = data.n_train_samples
        if asked is not None and asked > self.n_train:
            log.info("%s holds %d training samples; %d are asked for: it is repeated", source.path, self.n_train, asked)

    @property
    def n_train_available(self) -> int:
        """Samples of one pass."""
        return self.n_train

    def train(
        self, start: int, batch: int, rank: int = 0, world: int = 1, cursor: dict[str, Any] | None = None
    ) -> Iterator[TokenBatch]:
        """Micro-batches without end, ranks in order, every pass in an order of its own."""
        sample, pass_, order = start, -1, torch.empty(0)
        while True:
            numbers = []
            for s in range(sample + rank * batch, sample + (rank + 1) * batch):
                if s // self.n_train != pass_:
                    pass_ = s // self.n_train
                    order = self._order(pass_)
                numbers.append(int(order[s % self.n_train]))
            sample += world * batch
            yield TokenBatch(self._rows(torch.tensor(numbers)), sample - (world - rank) * batch, {"slot": sample})

    def _order(self, pass_: int) -> Tensor:
        if not self.data.shuffle_documents:
            return torch.arange(self.n_train)
        seed = derived_seed("order of rows", self.data.seed or 0, pass_)
        return torch.randperm(self.n_train, generator=torch.Generator().manual_seed(seed))

    def _rows(self, samples_n: Tensor) -> Tensor:
        return samples_n[:, None] * self.data.context_length + torch.arange(self.data.context_length)

    def calibration(self, n: int) -> Tensor:
        """The first n training samples; fewer where a pass has not so many."""
        return self._rows(self._order(0)[:n])

    def eval_batches(self, batch: int) -> Iterator[Tensor]:
        """The held-out samples, in their order."""
        yield from self._held_out(self.data.n_threshold_samples or 0, self.data.n_eval_samples, batch)

    def threshold_batches(self, batch: int) -> Iterator[Tensor]:
        """Those before them, which thresholds are set on."""
        yield from self._held_out(0, self.data.n_threshold_samples or 0, batch)

    def _held_out(self, first: int, n: int, batch: int) -> tuple[Tensor, ...]:
        return self._rows(self.n_train + first + torch.arange(n)).split(batch) if n else ()

    def identity(self) -> str:
        """The same for as many rows, cut and ordered alike."""
        told = [self.n_rows, self.data.context_length, self._order(0)[:8].tolist()]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    fingerprint = identity
