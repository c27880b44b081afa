"""scripts/compare_search.py replay: what is counted on a table of curves whose answers are known."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from tabulated import replay, study, table  # noqa: E402
from tabulated.curves import Curve, Log, Tabulated  # noqa: E402
from tabulated.others import Moasha, optuna_asha  # noqa: E402
from tabulated.warm import Narrow  # noqa: E402

from saeopt.search.samplers import n_known  # noqa: E402
from saeopt.search.space import Space, key_of  # noqa: E402
from saeopt.search.starts import first_cells  # noqa: E402

RATIO, NARROW, TOTAL, EVERY = 8, 2, 400, 40
OPTIONS = argparse.Namespace(pack=8, budget=1.0, tpe_trials=20, start_ratios=[NARROW], start_top=5, seeds=[0])
HALVING = {"rungs": [0.1, 0.3], "keep": 0.33}


def curve(about: dict[str, Any]) -> list[tuple[float, float]]:
    """L0 by the sparsity alone; FVU worse by a wrong learning rate, from the first report on."""
    l0 = about["sparsity"] if about["sae_type"] == "topk" else 10 / about["sparsity"]
    worse = {"relu": 1.4, "jumprelu": 1.2, "topk": 1.0}[about["sae_type"]]
    worse *= 1 + abs(math.log(about["lr"] / 2e-3)) / 4
    return [(l0, min(worse * 0.5 / (1 + l0) ** 0.4 * (1 + EVERY / s), 0.99)) for s in range(EVERY, TOTAL + 1, EVERY)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = []
    base = study.base(Path("shared"), TOTAL)
    for cell in [*study.cells(base, RATIO), *study.cells(base, NARROW)]:
        about = study.sae_of(cell.config)
        values = curve(about)
        for i, (l0, fvu) in enumerate(values, 1):
            rows.append({**about, "samples": i * EVERY, "held_out": False, "l0": l0, "fvu": fvu})
        rows.append({**about, "samples": TOTAL, "held_out": True, "l0": values[-1][0], "fvu": values[-1][1]})
    path = tmp_path_factory.mktemp("table") / "table.parquet"
    pq.write_table(pa.Table.from_pylist(rows, table.SCHEMA), path)
    return path


@pytest.fixture(scope="module")
def tabulated(path: Path) -> Tabulated:
    return Tabulated(path, 0, [RATIO])


def test_the_whole_grid_is_the_whole_hypervolume(tabulated: Tabulated) -> None:
    assert len(tabulated.curves) == 3 * 6 * 4
    found = replay.search(tabulated, 1, "random", OPTIONS, None)
    assert found.spent == tabulated.tokens == len(tabulated.curves) * TOTAL
    assert found.volume_at(1.0) == pytest.approx(1.0)
    assert found.volume_at(0.0) == 0.0


def test_the_hypervolume_is_that_of_boxes(tabulated: Tabulated) -> None:
    edge = math.log(RATIO * 64)
    assert tabulated.volume([(math.e, 0.5)]) == pytest.approx((edge - 1) * 0.5)
    assert tabulated.volume([(0.2, 0.5), None]) == pytest.approx(edge * 0.5)  # an L0 under 1 counts as 1
    both = (edge - 1) * 0.5 + (edge - 2) * 0.2
    assert tabulated.volume([(math.e, 0.5), (math.e**2, 0.3), (math.e**2, 0.4)]) == pytest.approx(both)
    assert tabulated.volume([(1e9, 0.1), (2.0, 1.5)]) == 0.0


def test_halving_takes_what_its_rungs_say_and_pauses_nobody_of_the_front(tabulated: Tabulated) -> None:
    found = replay.search(tabulated, 1, "random", OPTIONS, HALVING)
    assert len(found.ended) + len(found.stopped) == len(tabulated.curves)
    assert found.ended
    rungs = {tabulated.total // 10: 0, tabulated.total * 3 // 10: 0}
    rest = found.spent - TOTAL * len(found.ended)
    first = round((len(found.stopped) * 120 - rest) / 80)  # how many stood at the first of the two
    assert 0 < first <= len(found.stopped)
    assert rest == first * min(rungs) + (len(found.stopped) - first) * max(rungs)
    assert found.spent < 0.8 * tabulated.tokens
    assert found.volume_at(1.0) == pytest.approx(1.0)  # the order at the first rung is that of the end here


def test_promotion_goes_on_with_what_was_paused(tabulated: Tabulated) -> None:
    options = argparse.Namespace(pack=8, budget=2.0, tpe_trials=20)
    found = replay.search(tabulated, 1, "random", options, HALVING, promote_after=True)
    assert len(found.ended) == len(tabulated.curves) // 3
    assert found.spent == TOTAL * len(found.ended)


def test_a_sampler_that_learns_never_trains_a_cell_twice(tabulated: Tabulated) -> None:
    found = replay.search(tabulated, 1, "tpe", OPTIONS, None)
    assert len(found.ended) == 20
    assert found.spent == 20 * TOTAL


def test_a_warm_start_begins_with_the_front_of_the_narrow_cells_and_counts_the_wide_ones_alone(
    tabulated: Tabulated, path: Path
) -> None:
    narrow = Tabulated(path, 0, [NARROW])
    finals = {key: (math.log(max(c.final[0], 1.0)), c.final[1]) for key, c in narrow.curves.items() if c.final}
    front = {
        key
        for key, (x, y) in finals.items()
        if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in finals.values())
    }
    options = argparse.Namespace(**{**vars(OPTIONS), "table": path})
    modes = replay.warm_modes(options, HALVING)
    assert list(modes) == ["warm: front", "warm: top 5", "both searched"]
    begun = Narrow(narrow)
    spec = begun.started(replay.spec_of(tabulated, "tpe", 1, 20, HALVING), begun.study("narrow"), front=True)
    first = [cell.params for cell in first_cells(spec, Space(spec), n_known(spec))][: len(front)]
    width = "saes.dict_size_to_input_ratio"
    assert {key_of({**params, width: NARROW}) for params in first} == front  # λ, k and lr as they are
    assert {params[width] for params in first} == {RATIO}
    found = modes["warm: front"](tabulated, 1)
    assert 0 < len(found.ended) <= 20
    assert TOTAL * len(found.ended) <= found.spent < 20 * TOTAL
    cold = replay.search(tabulated, 1, "tpe", OPTIONS, HALVING)
    assert found.shares([0.99])[0] < cold.shares([0.99])[0]  # the narrow front is the wide one on this table
    both = modes["both searched"](tabulated, 1)
    assert min(spent for spent, _ in both.ended) > TOTAL * 5  # a whole search came before


def test_a_level_is_reached_where_the_hypervolume_says(tabulated: Tabulated) -> None:
    finals = [one.final for one in tabulated.curves.values()]
    log = Log(tabulated, 0, [(tabulated.tokens // 2, final) for final in finals])
    assert log.shares([0.5, 1.0]) == [0.5, 0.5]
    assert Log(tabulated, 0, [(1, finals[0])]).shares([0.999]) == [math.inf]


def test_a_value_that_is_not_finite_is_none() -> None:
    there = Curve([10, 20], [(3.0, 0.2), (math.nan, 0.1)])
    assert there.at(15) == (3.0, 0.2)
    assert there.at(20) is None


def test_optunas_asha_stops_what_is_behind(tabulated: Tabulated) -> None:
    found = optuna_asha(tabulated, 1, first_report=1, factor=3, share=0.2)
    assert found.stopped
    assert found.ended
    assert found.spent >= TOTAL * len(found.ended)


def test_moasha_is_syne_tunes(tabulated: Tabulated) -> None:
    python = Path(os.environ.get("INTEROP_DIR", ROOT / ".interop")) / "syne-tune" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{python} is missing: scripts/interop_envs.sh syne-tune makes it")
    found = Moasha(python).run(tabulated, 1, 8, 1, 3, 1.0)
    assert len(found.ended) + len(found.stopped) == len(tabulated.curves)
    assert 0 < len(found.ended) < len(tabulated.curves) // 2
