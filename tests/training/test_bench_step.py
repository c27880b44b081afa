"""scripts/bench_step.py runs on the CPU and writes what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_step.py"


def test_it_times_both_stacks_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    cases = ["--case", "relu:16:64:64:2", "--case", "topk:16:64:64:1:4:0.25"]
    command = [sys.executable, str(SCRIPT), *cases, "--device", "cpu", "--steps", "2", "--against", "reference"]
    done = subprocess.run([*command, "--json", str(out)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "relu:16:64:64:2 " in done.stdout
    found = json.loads(out.read_text())
    assert [case["sae_type"] for case in found["cases"]] == ["relu", "topk"]
    assert all(case["ms"] > 0 and case["ratio"] > 0 and case["finite"] == 1.0 for case in found["cases"])
    assert found["cases"][0]["sae_tokens_per_s"] == 2 * found["cases"][0]["tokens_per_s"]


@pytest.mark.parametrize(
    ("case", "part"),
    [
        ("relu:1:2", "--case relu:1:2"),
        ("no:1:2:3:4", "unknown architecture 'no'"),
        ("relu:16:64:64:0", "above 0"),
        ("relu:16:64:64:1:5", "k is for topk"),
        ("topk:16:32:64:1:64", "at most h"),
    ],
)
def test_a_case_that_is_none_is_one_line(case: str, part: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--case", case], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert part in done.stderr


@pytest.mark.parametrize("option", [["--against", "no"], ["--compile", "no"], ["--device", "no"]])
def test_an_option_that_is_none_is_one_line(option: list[str]) -> None:
    command = [sys.executable, str(SCRIPT), "--case", "relu:8:16:8:1", *option]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.parametrize("batch", [100, 4])
def test_any_number_of_tokens_can_be_a_batch(batch: int) -> None:
    command = [sys.executable, str(SCRIPT), "--case", f"hard_concrete:16:64:{batch}:1", "--steps", "1"]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f":{batch}:1 " in done.stdout  # no sign for a hundred points
