"""Both kinds of store: an SQLite file, and a real PostgreSQL server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from _stores import PASSWORD, Server, new_database


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
        # A test run that is killed takes its server with it.
        watch = f"while kill -0 {os.getpid()}; do sleep 1; done; kill -INT $(head -n 1 {made.data}/postmaster.pid)"
        subprocess.Popen(
            ["sh", "-c", watch], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        yield made
        made.stop("fast")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty store of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/store.db"
    return new_database(request.getfixturevalue("server"), f"db_{os.urandom(6).hex()}")
