"""Fronts of a comparison: interpolation between points, the choice of the learning rate, the verdict, and its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from peers.fronts import LEVELS, Point, chosen_lrs, interpolated, summary, verdict, write


def point(
    l0: float, fvu: float, *, system: str = "saeopt", lr: float = 1e-3, seed: int = 0, other: float = 0.0
) -> Point:
    """FVU on the half that is reported; `other` on the one that is chosen on (the same unless told)."""
    halves = {"chosen_on": other or fvu, "reported_on": fvu}
    rows = {
        h: {"l0": l0, "fvu": v, "ce_recovered": 1 - v, "fraction_dead": 0.1, "dead": 0.2} for h, v in halves.items()
    }
    return Point(system, "relu", lr, seed, 1.0, rows)


def line(scale: float, **fields: object) -> list[Point]:
    """FVU = scale / L0 at three L0."""
    return [point(l0, scale / l0, **fields) for l0 in (4.0, 20.0, 64.0)]  # type: ignore[arg-type]


def test_a_front_is_linear_in_logarithms_and_ends_with_its_points() -> None:
    found = interpolated(line(1.0)[:2], "reported_on", "fvu")
    expected = [1 / level if level <= 20 else np.nan for level in LEVELS]
    np.testing.assert_allclose(found, expected)
    assert np.isnan(interpolated(line(1.0)[:1], "reported_on", "fvu")).all()


def test_the_learning_rate_is_chosen_on_the_other_half() -> None:
    good_there = [point(l0, 2 / l0, lr=1e-2, other=0.5 / l0) for l0 in (4.0, 64.0)]
    assert set(chosen_lrs([*line(1.0), *good_there])) == {1e-2}


def test_each_l0_has_the_learning_rate_that_is_best_there() -> None:
    steep = [point(l0, 4 / l0**1.5, lr=1e-2) for l0 in (4.0, 20.0, 64.0)]  # worse below 16, better above
    expected = [1e-3 if level < 16 else 1e-2 for level in LEVELS]
    assert [lr for lr, level in zip(chosen_lrs([*line(1.0), *steep]), LEVELS, strict=True) if level != 16] == [
        lr for lr, level in zip(expected, LEVELS, strict=True) if level != 16
    ]
    entry = summary([*line(1.0), *steep])["relu"]["saeopt"]
    np.testing.assert_allclose(entry["fvu"], [min(1 / level, 4 / level**1.5) for level in LEVELS])
    assert entry["dead"] == pytest.approx([0.2] * len(LEVELS))


def test_the_verdict_counts_the_spread_of_both() -> None:
    points = [p for seed in range(3) for p in line(1.0 + 0.01 * seed, seed=seed)]
    points += [p for seed in range(3) for p in line(1.005 + 0.01 * seed, seed=seed, system="peer")]
    points += [p for seed in range(3) for p in line(2.0 + 0.01 * seed, seed=seed, system="worse")]
    entries = summary(points)["relu"]
    assert entries["saeopt"]["fvu"][0] == pytest.approx(1.01 / 4)
    assert set(verdict(entries["saeopt"], [entries["peer"], entries["worse"]], "fvu")) == {"+"}
    assert set(verdict(entries["saeopt"], [entries["worse"]], "fvu")) == {"++"}
    assert set(verdict(entries["peer"], [entries["saeopt"]], "fvu")) == {"="}
    assert set(verdict(entries["worse"], [entries["saeopt"]], "fvu")) == {"−"}


def test_the_table_can_be_made_again_from_the_result(tmp_path: Path) -> None:
    points = [*line(1.0), *line(2.0, system="peer"), *line(3.0, system="saeopt, no clipping")]
    text = write(tmp_path, points)
    assert "## Ablations" in text
    assert "no clipping" not in text.split("## Ablations")[0]
    again = [Point(**row) for row in json.loads((tmp_path / "result.json").read_text())["points"]]
    (tmp_path / "again").mkdir()
    assert write(tmp_path / "again", again) == text
    assert (tmp_path / "again" / "fronts.png").stat().st_size > 1000


def test_a_comparison_in_which_nobody_reaches_an_l0_of_the_table_is_written_all_the_same(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    far = [Point("saeopt", "jumprelu", 1e-3, 0, 1.0, point(l0, 0.1).metrics) for l0 in (200.0, 300.0)]
    write(tmp_path, line(1.0) + far)
    assert (tmp_path / "fronts.png").exists()
