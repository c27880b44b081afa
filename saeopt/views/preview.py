"""`study create --dry-run`: cells, packs, and estimates of memory and time, from configs alone; no weights are read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from saeopt.config.run import RunConfig
from saeopt.config.study import LARGEST_PACK, MEMORY_SHARE, StudySpec
from saeopt.console import console, fits, set_up_logging, titled
from saeopt.errors import UserError
from saeopt.search.rounds import proposals_text
from saeopt.search.space import Cell, Space
from saeopt.search.starts import doubles_text
from saeopt.search.stopping import stopping_text
from saeopt.trials.create import planned_cells
from saeopt.views.disk import disk_text
from saeopt.views.notes import dimension_text
from saeopt.views.spending import limits_text
from saeopt.views.status import duration

_SHOWN = 30
_EFFICIENCY = 0.3
"""Share of this machine's plain matrix product that training reaches."""


@dataclass(frozen=True)
class Cost:
    """What one pack needs."""

    n_saes: int
    memory: int
    """Bytes."""
    flops: float


def print_preview(spec: StudySpec) -> None:
    """The tables. :class:`UserError` if the space is invalid."""
    cells, proposed = planned_cells(spec)
    console.print(_space_table(spec))
    console.print(_cells_table(spec, cells, proposed))
    doubles = doubles_text(spec, Space(spec))
    for about in filter(None, (doubles, proposals_text(spec), stopping_text(spec), *limits_text(spec))):
        console.print(about, markup=False)
    set_up_logging()  # before the hub is asked: its library, imported then, sets its own level
    packs = packs_of(spec, cells, max(1, LARGEST_PACK // spec.n_seeds))
    try:
        packs = packs_of(spec, cells, _largest_pack(spec))
        costs = [cost(pack) for pack in packs]
    except (UserError, OSError, ValueError, ImportError) as error:
        console.print(_packs_table(packs, None))
        console.print(f"memory and time: unknown ({' '.join(str(error).split())[:200]})", markup=False)
        return
    console.print(_packs_table(packs, costs))
    for about in disk_text(spec, cells, proposed, hub=True):
        console.print(about, markup=False)
    trials = len(cells) + proposed
    if any(pack[0].config.data.n_train_samples is None for pack in packs):
        console.print(f"{trials} trials, time: unknown (one pass over the data: 'data.n_train_samples' is not given)")
        return
    flops = sum(c.flops for c in costs) * trials / max(len(cells), 1)
    device, rate = measured_rate()
    console.print(
        f"{trials} trials, {flops:.2e} floating-point operations: about {duration(flops / rate / _EFFICIENCY)}"
        f" for one worker on this machine's {device} ({rate / 1e12:.2g} TFLOP/s measured)",
        markup=False,
    )


def _largest_pack(spec: StudySpec) -> int:
    """What `pack: auto` is on this machine's GPU; without one, on a GPU on which everything fits."""
    import torch

    if isinstance(spec.pack, int) or not torch.cuda.is_available():
        return max(1, LARGEST_PACK // spec.n_seeds)
    from saeopt.training.dry_run import fitting

    free = torch.cuda.mem_get_info()[0] * MEMORY_SHARE
    return fitting(Space(spec).largest().config, free, torch.device("cuda"), LARGEST_PACK)


def packs_of(spec: StudySpec, cells: Sequence[Cell], largest: int) -> list[list[Cell]]:
    """The cells in packs as one worker would take them: of one stream, the study's number (`pack`) or `largest`."""
    streams: dict[str, list[Cell]] = {}
    for cell in cells:
        streams.setdefault(cell.stream, []).append(cell)
    size = spec.pack if isinstance(spec.pack, int) else largest
    return [group[i : i + size] for group in streams.values() for i in range(0, len(group), size)]


def cost(pack: Sequence[Cell]) -> Cost:
    """Memory and arithmetic of a pack: the language model runs once for all its members."""
    from saeopt.training.dry_run import shapes, weightless
    from saeopt.training.memory import estimate

    config: RunConfig = pack[0].config
    model, lm = weightless(config)
    members = [shape for cell in pack for shape in shapes(cell.config, model)]
    lm_bytes = {"float32": 4, "auto": 2}.get(config.lm_dtype, 2)
    memory = estimate(config, members, lm, lm_bytes)
    tokens = (config.data.n_train_samples or 0) * config.data.context_length
    flops = tokens * (2.0 * lm.parameters + 6.0 * sum(m.n_parameters for m in members))
    return Cost(len(members), sum(memory.values()), flops)


def measured_rate() -> tuple[str, float]:
    """(device, operations per second) of a matrix product in the precision that training uses."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (768, torch.float32)
    a = torch.ones(n, n, device=device, dtype=dtype)
    rounds, best = 4, float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        float((a @ a)[0, 0])  # reading a value waits for the device
        best = min(best, time.perf_counter() - begin)
    return device.type, 2.0 * n**3 / best


def _space_table(spec: StudySpec) -> Table:
    table = Table(title=f"study {spec.name}: {spec.sampler.type}", title_justify="left")
    table.add_column("parameter")
    table.add_column("values", overflow="fold")
    for name, alternatives in spec.space.items():
        table.add_row(name, "; ".join(dimension_text(d) for d in alternatives))
    return table


def _cells_table(spec: StudySpec, cells: Sequence[Cell], proposed: int) -> RenderableType:
    space = Space(spec)
    rows = [space.values(cell.params) for cell in cells]
    names = list(dict.fromkeys(name for row in rows for name in row))
    title = f"{len(cells)} cells" + (
        f", and {proposed} trials that {spec.sampler.type} will propose" if proposed else ""
    )
    shown = [{name: _shown(row[name]) for name in names if name in row} for row in rows[:_SHOWN]]
    table = Table()
    table.add_column("trial", justify="right")
    for name in names:
        table.add_column(name.removeprefix("saes."))
    for number, row in enumerate(shown):
        table.add_row(str(number), *[row.get(name, "–") for name in names])
    if not fits(table):  # a line per trial, broken between parameters only
        table = Table("trial", "parameters")
        for number, row in enumerate(shown):
            items = [f"{name.removeprefix('saes.')}={value}".replace(" ", "") for name, value in row.items()]
            table.add_row(str(number), Text("  ".join(items), overflow="fold"))
    if len(cells) > _SHOWN:
        table.caption = f"and {len(cells) - _SHOWN} more"
    return titled(title, table)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _packs_table(packs: Sequence[Sequence[Cell]], costs: Sequence[Cost] | None) -> Table:
    table = Table(
        title=f"{len(packs)} pack{'s'[: len(packs) != 1]}: the language model runs once for each", title_justify="left"
    )
    for name in ("pack", "trials", "SAEs", "samples", "estimated memory"):
        table.add_column(name, justify="right")
    for i, pack in enumerate(packs[:_SHOWN]):
        samples = pack[0].config.data.n_train_samples
        found = costs[i] if costs is not None else None
        memory = f"{found.memory / 2**30:.2f} GiB" if found else "–"
        saes = str(found.n_saes) if found else "–"
        table.add_row(str(i), str(len(pack)), saes, f"{samples:,}" if samples else "one pass", memory)
    if len(packs) > _SHOWN:
        table.caption = f"and {len(packs) - _SHOWN} more"
    return table
