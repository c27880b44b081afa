"""scripts/bench_step.py runs on the CPU and writes what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_step.py"


def test_it_times_both_stacks_and_writes_json(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    cases = ["--case", "relu:16:64:64:2", "--case", "topk:16:64:64:1:4:0.25"]
    command = [sys.executable, str(SCRIPT), *cases, "--device", "cpu", "--steps", "2", "--settle", "3"]
    command += ["--against", "reference", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
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
        ("relu:16:64:64:1:5", "k is for those that select"),
        ("topk:16:32:64:1:64", "at most h"),
    ],
)
def test_a_case_that_is_none_is_one_line(case: str, part: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--case", case], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert part in done.stderr


@pytest.mark.parametrize(
    "option", [["--against", "no"], ["--compile", "no"], ["--device", "no"], ["--peers", "no"], ["--peers", "sae-lens"]]
)
def test_an_option_that_is_none_is_one_line(option: list[str]) -> None:
    where = ["--env", "no/{}/python"]
    command = [sys.executable, str(SCRIPT), "--case", "relu:8:16:8:1", *where, *option]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.parametrize("batch", [100, 4])
def test_any_number_of_tokens_can_be_a_batch(batch: int) -> None:
    command = [sys.executable, str(SCRIPT), "--case", f"hard_concrete:16:64:{batch}:1", "--steps", "1", "--settle", "1"]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f":{batch}:1 " in done.stdout  # no sign for a hundred points


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--steps", "1", "--settle", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_activations_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"x": torch.randn(100, 24).bfloat16() + 1}, file)
    done = bench("--data", str(file), "--case", "topk:24:64:48:1:4", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    assert "data: x.safetensors" in done.stdout
    case = json.loads((tmp_path / "out.json").read_text())["cases"][0]
    assert 0 < case["densest_latent"] <= 1
    assert 0 < case["top_percent_share"] <= 1
    wrong = bench("--data", str(file), "--case", "topk:32:64:48:1:4")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "its d is 32" in wrong.stderr


@pytest.mark.parametrize(
    "tensors", [{"y": torch.ones(3, 4)}, {"x": torch.ones(3)}, {"x": torch.full((3, 4), torch.nan)}]
)
def test_a_file_without_activations_is_one_line(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    done = bench("--data", str(tmp_path / "x.safetensors"))
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "`x`" in done.stderr


def test_skewed_activations_are_seeded_and_have_frequent_directions() -> None:
    sys.path.insert(0, str(SCRIPT.parent))
    from bench_data import Activations

    one, other = (Activations.of("skewed").batches(32, 64, torch.device("cpu"), torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.cat(one).norm(dim=-1).mean().item() == pytest.approx(32**0.5, rel=1e-3)
    spectrum = torch.linalg.svdvals(torch.cat(one))
    noise = torch.linalg.svdvals(torch.cat(Activations.of("noise").batches(32, 64, torch.device("cpu"), torch.float32)))
    assert spectrum[0] / spectrum[-1] > 2 * noise[0] / noise[-1]
