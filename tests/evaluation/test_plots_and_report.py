"""Fronts, pictures and tables."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from saeopt.errors import UserError
from saeopt.files import read_metrics
from saeopt.search.pareto import Point, best_in_ranges, pareto_front
from saeopt.views import report
from saeopt.views.plots import CURVES, DENSITY, pareto_plot, plot_run, training_curves

PNG = b"\x89PNG\r\n\x1a\n"


def point(label: str, l0: float, fvu: float, ce: float = math.nan, **more: str) -> Point:
    return Point(label, {"l0": l0, "fvu": fvu, "ce_recovered": ce}, **more)


POINTS = [
    point("a", 10, 0.3, 0.5),
    point("b", 20, 0.1, 0.9),
    point("worse than b", 25, 0.2, 0.7),
    point("c", 40, 0.05, 0.8),
    point("twin of b", 20, 0.1, 0.9),
    point("same L0 as a", 10, 0.4, 0.4),
    point("diverged", math.nan, math.nan),
]


def labels(points: list[Point]) -> list[str]:
    return [p.label for p in points]


def test_the_front_holds_what_nothing_beats() -> None:
    assert labels(pareto_front(POINTS)) == ["a", "b", "c"]
    assert labels(pareto_front(reversed(POINTS))) == ["a", "twin of b", "c"]
    assert pareto_front([]) == []


def test_more_cross_entropy_recovered_is_better() -> None:
    assert labels(pareto_front(POINTS, y="ce_recovered")) == ["a", "b"]


def test_best_per_range_of_l0() -> None:
    found = best_in_ranges(POINTS, [(8, 16), (16, 32), (32, 64), (64, 128)])
    assert [(p.label if p else None, n) for _, p, n in found] == [("a", 2), ("b", 3), ("c", 1), (None, 0)]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = []
    for samples in range(10, 100, 10):
        for hook in ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"):
            speed = 1.0 if samples == 10 else 5000.0
            rows.append(
                {"samples": samples, "hook_point": hook, "loss": 1 / samples, "l0": 30.0, "tokens_per_s": speed}
            )
        rows.append({"samples": samples, "hook_point": hook, "eval_fvu": 0.1, "eval_ce_recovered": None})
    text = "\n".join(json.dumps(row) for row in rows) + '\n{"samples": 100, "hook_po'
    (tmp_path / "metrics.jsonl").write_text(text)
    density = {"edges": [-3.0, -2.0, -1.0, 0.0], "counts": [1.0, 5.0, 2.0]}
    row = {
        "l0": 31.25,
        "fvu": 0.0817,
        "ce_recovered": None,
        "fraction_dead": 0.25,
        "n_tokens": 9,
        "log10_density": density,
    }
    (tmp_path / "evaluation.json").write_text(json.dumps({hook: row}))
    return tmp_path


def test_a_run_is_drawn_and_nothing_half_written_stays(run_dir: Path) -> None:
    assert plot_run(run_dir) == [run_dir / CURVES, run_dir / DENSITY]
    for name in (CURVES, DENSITY):
        assert (run_dir / name).read_bytes().startswith(PNG)
    assert not list(run_dir.glob(".*"))


def test_a_run_that_cannot_be_drawn_is_no_error(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "evaluation.json").write_text("[1")
    assert plot_run(run_dir) == [run_dir / CURVES]
    (run_dir / "evaluation.json").write_text('{"a": 1}')
    plot_run(run_dir)
    assert plot_run(tmp_path / "absent") == []


def test_a_line_cut_short_is_left_out(run_dir: Path) -> None:
    rows = read_metrics(run_dir / "metrics.jsonl")
    assert len(rows) == 27
    assert rows[-1]["samples"] == 90


def test_curves_of_nothing_and_of_zeros_are_drawn(tmp_path: Path) -> None:
    training_curves([], tmp_path / "none.png")
    training_curves([{"samples": 1, "hook_point": "h", "loss": 0.0, "l0": math.nan}], tmp_path / "zeros.png")
    assert (tmp_path / "zeros.png").read_bytes().startswith(PNG)


def test_the_front_is_drawn_per_hook_point(tmp_path: Path) -> None:
    points = [*POINTS, point("other", 5, 0.4, hook_point="blocks.1", group="gated"), point("zero", 0.0, 1.0)]
    assert pareto_plot(points, tmp_path / "front.png").read_bytes().startswith(PNG)
    assert pareto_plot([], tmp_path / "empty.png").exists()
    assert pareto_plot(points, tmp_path / "front.pdf").read_bytes().startswith(b"%PDF")
    assert b"<svg" in pareto_plot(points, tmp_path / "front.SVG").read_bytes()


def test_the_table_of_a_run(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    monkeypatch.setattr(report, "console", Console(file=text, width=120))
    plot_run(run_dir)
    (run_dir / "samples_80.safetensors").touch()
    (run_dir / "samples_90.safetensors").touch()
    report.print_run(run_dir)
    shown = text.getvalue()
    for part in ("blocks.1.hook_resid_pre", "31.2", "0.0817", "25.0%", "5,000", "–", CURVES, "evaluation.json"):
        assert part in shown, part
    assert "samples_90" in shown
    assert "samples_80" not in shown


def test_a_run_without_evaluation_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="saeopt evaluate"):
        report.print_run(tmp_path)


def test_tables_and_fronts_import_no_torch() -> None:
    program = "import sys, saeopt.views.report, saeopt.views.plots; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
