"""Secrets come from the environment and go nowhere else."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from saeopt.config.settings import export_tokens, redact, settings
from saeopt.console import _Redacting
from saeopt.errors import UserError
from saeopt.options import run_cli
from saeopt.study import app


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "HF_ACCESS_TOKEN", "SAEOPT_STORAGE", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    settings.cache_clear()
    yield
    settings.cache_clear()


def test_env_file_is_read_and_the_old_name_of_the_token_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("HF_ACCESS_TOKEN=hf_secret_1\nWANDB_API_KEY=wandb_secret\nOTHER=1\n", encoding="utf-8")
    export_tokens()
    import os

    assert os.environ["HF_TOKEN"] == "hf_secret_1"
    assert os.environ["WANDB_API_KEY"] == "wandb_secret"
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.delenv(name)


def test_secrets_never_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "w" * 40)
    monkeypatch.setenv("SAEOPT_STORAGE", "postgresql+psycopg://saeopt:pa:ss@db/saeopt")
    text = redact(f"key {'w' * 40} at {settings().storage.get_secret_value()}")
    assert text == "key *** at postgresql+psycopg://saeopt:***@db/saeopt"
    assert "w" * 40 not in repr(settings())
    assert "pa:ss" not in repr(settings())


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:p%40ss@h/db",
        "postgresql://u:a@b:c/d@h/db",
        "postgresql+psycopg://u:a@b@h:5432/db",
        "https://x:token@host/path?q=1",
    ],
)
def test_passwords_of_urls_are_hidden(url: str) -> None:
    head, _, tail = url.partition("://")
    user = tail.partition(":")[0]
    assert redact(f"cannot reach {url}") == f"cannot reach {head}://{user}:***@{tail.rpartition('@')[2]}"


def test_log_records_are_redacted_after_formatting() -> None:
    record = logging.LogRecord("saeopt", logging.INFO, "f", 1, "at %s", ("postgresql://u:secret@h/db",), None)
    assert _Redacting().filter(record)
    assert "secret" not in record.getMessage()


def test_tracebacks_of_processes_and_threads_are_redacted() -> None:
    script = """
import threading
from saeopt.options import run_cli
def work():
    raise ValueError("postgresql://u:secret@h/db")
def app(**_):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    raise RuntimeError("cannot reach postgresql://u:secret@h/db?sslpassword=secret")
run_cli(app)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "RuntimeError" in done.stderr
    assert "ValueError" in done.stderr
    told = [line for line in done.stderr.splitlines() if not line.lstrip().startswith("raise ")]
    assert "secret" not in "\n".join(told)


@pytest.mark.parametrize("value", ["soon", "nan", "-1"])
def test_a_setting_that_cannot_be_read_is_one_line(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SAEOPT_STORE_PATIENCE", value)
    with pytest.raises(SystemExit) as ended:
        run_cli(app, ["list"])
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("saeopt: error: SAEOPT_STORE_PATIENCE: ")
    assert shown.count("\n") == 1
    Path(".env").write_bytes(b"HF_TOKEN=\xff")
    monkeypatch.delenv("SAEOPT_STORE_PATIENCE")
    with pytest.raises(UserError, match=r"^\.env: "):
        settings()
