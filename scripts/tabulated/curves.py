"""A table read back: one seed's cells with their curves, and the hypervolume of what has been trained in full."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from optuna._hypervolume import compute_hypervolume

from saeopt.errors import UserError
from saeopt.search.space import Space, key_of
from tabulated.study import WIDTH, base, sae_of, table_spec

CELL = ("sae_type", "sparsity", "lr", "ratio")
Pair = tuple[float, float]


@dataclass
class Curve:
    """L0 and FVU as training measured them, and on the held-out text at the end (None: it diverged)."""

    samples: list[int] = field(default_factory=list)
    values: list[Pair] = field(default_factory=list)
    final: Pair | None = None

    def at(self, samples: int) -> Pair | None:
        """The last that was measured up to there; None where it is not finite."""
        i = bisect.bisect_right(self.samples, samples) - 1
        found = self.values[max(i, 0)]
        return found if all(map(math.isfinite, found)) else None


class Tabulated:
    """One seed of a table, at some widths: the study's space, and the curve of every cell."""

    def __init__(self, path: Path, seed: int, ratios: list[int]) -> None:
        self.seed = seed
        rows = pq.read_table(path, filters=[("seed", "=", seed), ("ratio", "in", [float(r) for r in ratios])])
        curves: dict[tuple[Any, ...], Curve] = {}
        columns = {name: rows.column(name).to_pylist() for name in (*CELL, "samples", "held_out", "l0", "fvu")}
        for row in zip(*columns.values(), strict=True):
            *key, samples, held_out, l0, fvu = row
            curve = curves.setdefault(tuple(key), Curve())
            pair = (math.nan if l0 is None else l0, math.nan if fvu is None else fvu)
            if held_out:
                curve.final = pair if all(map(math.isfinite, pair)) else None
            else:
                curve.samples.append(samples)
                curve.values.append(pair)
        if not curves:
            raise UserError(f"{path}: holds nothing of seed {seed} at the ratios {ratios}")
        self.total = max(samples for curve in curves.values() for samples in curve.samples)
        self.spec = table_spec(base(Path("shared"), self.total), ratios)
        self.curves: dict[str, Curve] = {}
        for cell in Space(self.spec).grid():
            about = sae_of(cell.config)
            found = curves.get(tuple(about[name] for name in CELL))
            if found is None:
                raise UserError(f"{path}: holds no curve of {json.dumps(cell.params)} (seed {seed}): see --ratios")
            self.curves[key_of(cell.params)] = found
        self.reference = (math.log(max(ratios) * WIDTH), 1.0)
        self.full = self.volume([curve.final for curve in self.curves.values()])

    def curve(self, params: dict[str, Any]) -> Curve:
        """The curve of a cell."""
        return self.curves[key_of(params)]

    def volume(self, pairs: Iterable[Pair | None]) -> float:
        """Hypervolume over (log L0, FVU) up to the reference (log h, 1); an L0 under 1 counts as 1."""
        points = [(math.log(max(p[0], 1.0)), p[1]) for p in pairs if p is not None]
        inside = [p for p in points if p[0] < self.reference[0] and p[1] < self.reference[1]]
        return float(compute_hypervolume(np.array(inside), np.array(self.reference))) if inside else 0.0

    @property
    def tokens(self) -> int:
        """Training samples of the full grid."""
        return self.total * len(self.curves)


@dataclass
class Log:
    """What was trained in full, and how many samples all trials had taken by then."""

    table: Tabulated
    spent: int = 0
    ended: list[tuple[int, Pair | None]] = field(default_factory=list)
    stopped: list[tuple[int, Pair | None]] = field(default_factory=list)
    """What training measured of those that were stopped or paused, where they were."""

    def counted(self, *, stopped: bool) -> Log:
        """The same, with SAEs that were not trained to the end counting for what they are."""
        return Log(self.table, self.spent, [*self.ended, *self.stopped]) if stopped else self

    def shares(self, levels: list[float]) -> list[float]:
        """Per level: the share of the grid's tokens after which so much of its hypervolume is reached."""
        found, reached = [math.inf] * len(levels), list[Pair | None]()
        for spent, pair in sorted(self.ended, key=lambda e: e[0]):
            reached.append(pair)
            volume = self.table.volume(reached) / self.table.full
            for i, level in enumerate(levels):
                if volume >= level and math.isinf(found[i]):
                    found[i] = spent / self.table.tokens
        return found

    def volume_at(self, share: float) -> float:
        """The share of the full grid's hypervolume that is reached for a share of its tokens."""
        return self.table.volume(p for s, p in self.ended if s <= share * self.table.tokens) / self.table.full
