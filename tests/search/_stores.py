"""A real PostgreSQL server from Debian's binaries, and studies that need no model."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saeopt.config.study import StudySpec
from saeopt.config.study_file import study_spec

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


def new_database(server: Server, name: str) -> str:
    """The address of an empty database."""
    import psycopg

    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return server.url(name)


def grid_spec(n: int = 12, **fields: Any) -> StudySpec:
    """A study of `n` cells that needs no model."""
    base = {
        "tlens_model_path": "somewhere",
        "data": {"dataset_name": "x.jsonl", "n_train_samples": 64, "train_batch_size": 4},
        "saes": {"sae_type": "relu", "sae_positions": ["blocks.1.hook_resid_pre"], "sparsity_coeff": 0.1},
    }
    raw = {"name": "s", "base": base, "space": {"lr": [(i + 1) * 1e-3 for i in range(n)]}, **fields}
    return study_spec(raw, "s.yaml")
