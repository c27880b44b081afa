"""Train every cell of the study once, in packs, and store all their curves in one parquet file."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from saeopt.config import RunConfig
from saeopt.console import log
from saeopt.training import Metrics, Observer, Runtime, TrialPlan, train_pack
from saeopt.training.launch import make_runtime
from tabulated.study import cells, sae_of

MEASURED = ("l0", "fvu", "fraction_dead", "ce_recovered")
"""Columns; training measures the first three, the evaluation at the end all."""
SCHEMA = pa.schema(
    [("seed", pa.int8()), ("sae_type", pa.string()), ("sparsity", pa.float64()), ("lr", pa.float64())]
    + [("ratio", pa.float32()), ("samples", pa.int32()), ("held_out", pa.bool_())]
    + [(name, pa.float32()) for name in MEASURED]
)


@dataclass(frozen=True)
class Job:
    """A pack: the cells of one architecture and width, and where their rows go."""

    base: dict[str, Any]
    sae_type: str
    ratio: int
    part: Path
    device: str

    @property
    def configs(self) -> list[RunConfig]:
        """Those of its cells (made where they train: their classes cannot be sent to another process)."""
        return [c.config for c in cells(self.base, self.ratio) if c.config.saes.sae_type == self.sae_type]


class Curves(Observer):
    """Rows of all log steps, and of the evaluation at the end."""

    def __init__(self, configs: dict[str, RunConfig]) -> None:
        self.keys = {name: sae_of(config) for name, config in configs.items()}
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, samples: int, metrics: Metrics, *, held_out: bool) -> None:
        """One row: the table's hook point is one."""
        (row,) = metrics.values()
        measured = {metric: row.get(metric) for metric in MEASURED}
        self.rows.append({**self.keys[name], "samples": samples, "held_out": held_out, **measured})

    def on_log(self, name: str, samples: int, metrics: Metrics) -> None:
        self.add(name, samples, metrics, held_out=False)


@cache
def runtime(device: str) -> Runtime:
    """This process's: it trains pack after pack on one language model."""
    return make_runtime(device)


def train(job: Job) -> float:
    """Train a pack and write its rows; the seconds that it took."""
    started = time.perf_counter()
    configs = {str(i): config for i, config in enumerate(job.configs)}
    curves = Curves(configs)
    with tempfile.TemporaryDirectory() as folder:
        plans = [TrialPlan(name, config, Path(folder) / name) for name, config in configs.items()]
        results = train_pack(plans, runtime(job.device), curves)
    for name, result in results.items():
        if result.evaluation:
            curves.add(name, result.samples, result.evaluation, held_out=True)
    job.part.parent.mkdir(parents=True, exist_ok=True)
    fresh = job.part.with_suffix(".new")
    pq.write_table(pa.Table.from_pylist(curves.rows, SCHEMA), fresh)
    fresh.replace(job.part)
    return time.perf_counter() - started


def make(jobs: list[Job], out: Path, n_at_once: int) -> None:
    """The whole table, `n_at_once` packs at a time; `out` is written after each.

    Packs that lie there from an earlier call are not trained again.
    """
    todo = [job for job in jobs if not job.part.exists()]
    log.info("%d packs, %d to train", len(jobs), len(todo))
    started, context = time.perf_counter(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_at_once, mp_context=context) as pool:
        running = {pool.submit(train, job): job for job in todo}
        for future in as_completed(running):
            name, took = running[future].part.stem, future.result()
            log.info("%s: %.0f s (%.0f s since the start)", name, took, time.perf_counter() - started)
            join(jobs, out)
    join(jobs, out)


def join(jobs: list[Job], out: Path) -> None:
    """One file of all packs that are there."""
    table = pa.concat_tables([pq.read_table(job.part, schema=SCHEMA) for job in jobs if job.part.exists()])
    table = table.sort_by([(name, "ascending") for name in ("seed", "sae_type", "ratio", "sparsity", "lr", "samples")])
    keys, fresh = [name for name in SCHEMA.names if name not in MEASURED], out.with_name(out.name + ".new")
    pq.write_table(
        table, fresh, compression="zstd", compression_level=19, use_dictionary=keys, use_byte_stream_split=[*MEASURED]
    )
    fresh.replace(out)
    log.info("%s: %d rows, %.2f MB", out, len(table), out.stat().st_size / 1e6)
