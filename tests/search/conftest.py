"""Both kinds of store: an SQLite file, and a real PostgreSQL server started from Debian's binaries."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from saeopt.config.study import StudySpec, study_spec

PASSWORD = "open-sesame-9431"


@dataclass
class Server:
    """A PostgreSQL server of our own on a loopback port."""

    binaries: Path
    data: Path
    port: int

    def run(self, program: str, *arguments: str) -> None:
        """Run one of its programs as a user that the server accepts."""
        command = [str(self.binaries / program), *arguments]
        if os.geteuid() == 0:
            command = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *command]
        done = subprocess.run(command, cwd=self.data.parent, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"

    def start(self) -> None:
        """Start and wait until it answers."""
        options = (
            f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.data.parent} -c fsync=off -c max_connections=200"
        )
        log = str(self.data.parent / "log")
        # pg_ctl's pipes must not be inherited by the server, or waiting for their end would take for ever.
        self.run("pg_ctl", "-D", str(self.data), "-w", "-t", "60", "-l", log, "-o", options, "start")

    def stop(self, mode: str = "immediate") -> None:
        """Stop it; `immediate` is a crash."""
        self.run("pg_ctl", "-D", str(self.data), "-w", "-m", mode, "stop")

    def restart(self, pause: float = 0.0) -> None:
        """A crash and a recovery, with some time between."""
        self.stop()
        time.sleep(pause)
        self.start()

    def url(self, database: str) -> str:
        """The address of a database."""
        return f"postgresql://saeopt:{PASSWORD}@127.0.0.1:{self.port}/{database}"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server; skips where PostgreSQL is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("PostgreSQL's server is not installed (apt-get install postgresql)")
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("PostgreSQL does not run as root, and there is no setpriv")
    folder = Path("/tmp") / f"saeopt-pg-{os.getpid()}"
    folder.mkdir(mode=0o700)
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = Server(found[-1].parent, folder / "data", port)
    password = folder / "password"
    password.write_text(PASSWORD)
    password.chmod(0o644)
    try:
        made.run(
            "initdb", "-D", str(made.data), "-U", "saeopt", f"--pwfile={password}", "-A", "scram-sha-256", "-N"
        )  # fmt: skip
        made.start()
        yield made
        made.stop("fast")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def new_database(server: Server, name: str) -> str:
    """The address of an empty database."""
    import psycopg

    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return server.url(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty store of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/store.db"
    return new_database(request.getfixturevalue("server"), f"db_{os.urandom(6).hex()}")


def grid_spec(n: int = 12, **fields: Any) -> StudySpec:
    """A study of `n` cells that needs no model."""
    base = {
        "tlens_model_path": "somewhere",
        "data": {"dataset_name": "x.jsonl", "n_train_samples": 64, "train_batch_size": 4},
        "saes": {"sae_type": "relu", "sae_positions": ["blocks.1.hook_resid_pre"], "sparsity_coeff": 0.1},
    }
    raw = {"name": "s", "base": base, "space": {"lr": [(i + 1) * 1e-3 for i in range(n)]}, **fields}
    return study_spec(raw, "s.yaml")
