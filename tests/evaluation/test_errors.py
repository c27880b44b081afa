"""Whatever is wrong with a command: one line on stderr, exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "saeopt.evaluation", *args], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["{tmp}/absent"], "no such run folder"),
        (["{tmp}"], "no checkpoint"),
        ([], "run_dir"),
        (["{tmp}", "--n-eval-samples", "0"], "greater than or equal to 1"),
        (["{tmp}", "--n-eval-sample", "3"], "No such option"),
        (["{tmp}", "--device", "abacus"], "--device abacus: unknown device"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, args: list[str], said: str) -> None:
    done = run(*(a.replace("{tmp}", str(tmp_path)) for a in args))
    assert done.returncode == 2
    assert done.stderr.startswith("saeopt: error: ")
    assert len(done.stderr.splitlines()) == 1
    assert said.lower() in done.stderr.lower()
    assert done.stdout == ""


def test_help_exits_0() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "--n-eval-samples" in done.stdout
