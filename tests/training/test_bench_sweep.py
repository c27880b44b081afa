"""scripts/bench_sweep.py runs on the CPU and writes every round and the medians over them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_sweep.py"


@pytest.mark.slow
def test_it_measures_a_pack_against_its_parts_in_rounds(tmp_path: Path) -> None:
    out = tmp_path / "sweep.json"
    command = [sys.executable, str(SCRIPT), "--trials", "2", "--ratio", "2", "--steps", "12", "--repeats", "2"]
    command += ["--rounds", "3", "--context", "16", "--cache", "--device", "cpu", "--seeds", "2", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert len(found["rounds"]) == 3
    for row in found["rounds"]:
        assert row["limit"] == pytest.approx(1 / (1 / row["language_model"] + 1 / row["step"]))
        assert row["share_of_limit"] == pytest.approx(row["pack"] / row["limit"])
        assert row["cost_of_seeds"] == pytest.approx(row["one_seed"] / row["pack"])
        assert row["cached_share_of_step"] == pytest.approx(row["pack_cached"] / row["step"])
    shares = sorted(row["cached_share_of_step"] for row in found["rounds"])
    assert found["cached_share_of_step"] == shares[1]
