"""The container's entry point: storage URL, roles and errors, with stand-ins for the programs that it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

ROOT = Path(__file__).resolve().parents[2]
SECRET = "p@ss:w/rd%of the?test#$"


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    said = {"arguments": "$*", "storage": "$SAEOPT_STORAGE", "token": "${HF_TOKEN-unset}", "study": "$SAEOPT_STUDY"}
    program = "#!/bin/sh\n" + "".join(f'echo "{name}: {text}"\n' for name, text in said.items())
    (folder / "saeopt").write_text(program, encoding="utf-8")
    (folder / "saeopt").chmod(0o755)
    (folder / "python").symlink_to(sys.executable)
    return folder


def run(tools: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tools), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["sh", str(ROOT / "scripts/container/entrypoint"), *arguments]
    return subprocess.run(command, env=environment | settings, capture_output=True, text=True, check=False, cwd=ROOT)


def line(done: subprocess.CompletedProcess[str], name: str) -> str:
    assert done.returncode == 0, done.stderr
    return next(text for text in done.stdout.splitlines() if text.startswith(f"{name}: ")).split(": ", 1)[1]


def test_any_password_survives_the_storage_url_and_stays_off_the_command_line(tools: Path) -> None:
    done = run(tools, "worker", POSTGRES_PASSWORD=SECRET, STUDY="s")
    url = sa.make_url(line(done, "storage"))
    assert (url.drivername, url.username, url.password) == ("postgresql+psycopg", "saeopt", SECRET)
    assert (url.host, url.port, url.database) == ("db", 5432, "saeopt")
    assert SECRET not in line(done, "arguments")


def test_a_given_storage_wins_over_the_service(tools: Path) -> None:
    given = "postgresql+psycopg://u:p@elsewhere/d"
    done = run(tools, "worker", POSTGRES_PASSWORD=SECRET, SAEOPT_STORAGE=given, STUDY="s")
    assert line(done, "storage") == given


def test_the_worker_serves_the_study_of_the_study_file(tools: Path) -> None:
    done = run(tools, "worker", "--pack", "2", STUDY_FILE="studies/demo.yaml", SAEOPT_DEVICES="cpu")
    assert line(done, "arguments") == "worker --pack 2"
    assert line(done, "study") == "demo"


@pytest.mark.parametrize("command", ["train", "study", "evaluate", "dashboard", "worker"])
def test_every_command_takes_the_flags_that_it_has_outside(tools: Path, command: str) -> None:
    assert line(run(tools, command, "a", "--flag", "b"), "arguments") == f"{command} a --flag b"


def test_migrate_creates_the_study_or_the_tables_alone(tools: Path, tmp_path: Path) -> None:
    study = tmp_path / "mine.yaml"
    study.write_text("name: mine\n", encoding="utf-8")
    done = run(tools, "migrate", POSTGRES_PASSWORD=SECRET, STUDY_FILE=str(study))
    assert line(done, "arguments") == f"study create {study}"
    assert line(run(tools, "migrate", POSTGRES_PASSWORD=SECRET), "arguments") == "study list"


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (("worker",), {"POSTGRES_PASSWORD": "x"}, "set STUDY"),
        (("migrate",), {"STUDY_FILE": "studies/other.yaml"}, "no database: set POSTGRES_PASSWORD"),
    ],
)
def test_a_missing_setting_is_one_line(
    tools: Path, arguments: tuple[str, ...], settings: dict[str, str], message: str
) -> None:
    done = run(tools, *arguments, **settings)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_empty_variables_are_unset(tools: Path) -> None:
    assert line(run(tools, "worker", STUDY="s", HF_TOKEN=""), "token") == "unset"


def test_anything_else_is_run_as_it_stands(tools: Path) -> None:
    assert run(tools, "echo", "hello").stdout == "hello\n"
