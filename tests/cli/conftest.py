"""The whole command line, in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from saeopt.cli import app
from saeopt.config.settings import settings
from saeopt.options import run_cli

Call = Callable[..., SimpleNamespace]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """`saeopt …` in this process, in an empty folder and 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("SAEOPT_STORAGE", "SAEOPT_STUDY"):
        monkeypatch.delenv(name, raising=False)
    settings.cache_clear()

    def run(*args: object) -> SimpleNamespace:
        with pytest.raises(SystemExit) as ended:
            run_cli(app, [str(a) for a in args])
        shown = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code or 0, out=shown.out, err=shown.err)

    return run
