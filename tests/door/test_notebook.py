"""The notebook in docs runs from its first cell to its last, on a real small model, as a newcomer would run it.

Its cells are executed in one process; a line that begins with ! is a command, which must succeed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "from-study-to-steering.ipynb"


def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def as_python(source: str) -> str:
    lines = []
    for line in source.splitlines():
        lines.append(f"_shell({line[1:]!r})" if line.startswith("!") else line)
    return "\n".join(lines)


def test_the_notebook_holds_no_outputs() -> None:
    for cell in cells():
        assert not cell.get("outputs"), cell["id"]
        assert cell.get("execution_count") is None


def test_the_notebook_runs(
    stories: Path, tinystories_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL", str(stories))
    monkeypatch.setenv("TEXT", str(tinystories_text))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "100")

    def shell(command: str) -> None:
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        said.append(done.stdout)
        assert done.returncode == 0, done.stderr

    said: list[str] = []
    there: dict[str, Any] = {"_shell": shell}
    with contextlib.redirect_stdout(io.StringIO()):
        for cell in cells():
            if cell["cell_type"] == "code":
                exec(compile(as_python("".join(cell["source"])), cell["id"], "exec"), there)
    assert 0.5 < there["best"]["metrics"]["ce_recovered"] < 1
    assert there["with_sae"] < there["clean"] + 1
    assert len(there["useful"]) == 5
    assert there["HOOK"] in said[2]  # study best
