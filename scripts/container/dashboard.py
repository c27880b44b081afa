"""Serve optuna-dashboard at `DASHBOARD_ADDRESS`:`DASHBOARD_PORT` for the storage that `SAEOPT_STORAGE` names.

The dashboard's own command takes the URL, and so the database's password, on its command line, where every process list
shows it, and its connections do not outlive a restart of the database.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import BinaryIO
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import RDBStorage
from optuna_dashboard import wsgi

from saeopt.config.settings import settings


class ThreadedServer(ThreadingMixIn, WSGIServer):
    """A thread for each request, so that one slow page does not hold up the others."""

    daemon_threads = True


class QuietHandler(WSGIRequestHandler):
    """Without a line for each of the page's polling requests."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class ArtifactsOfAllStudies:
    """Each study keeps its artifacts in `<output>/<study>/artifacts`; the dashboard knows one store."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.uploads = output / "artifacts"  # what a person uploads in the browser

    def _stores(self) -> list[FileSystemArtifactStore]:
        folders = [folder for folder in (self.uploads, *self.output.glob("*/artifacts")) if folder.is_dir()]
        return [FileSystemArtifactStore(str(folder)) for folder in folders]

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """Part of Optuna's artifact protocol."""
        for store in self._stores():
            try:
                return store.open_reader(artifact_id)
            except ArtifactNotFound:
                continue
        raise ArtifactNotFound(f"no artifact {artifact_id}")

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Part of Optuna's artifact protocol."""
        self.uploads.mkdir(parents=True, exist_ok=True)
        FileSystemArtifactStore(str(self.uploads)).write(artifact_id, content_body)

    def remove(self, artifact_id: str) -> None:
        """Part of Optuna's artifact protocol."""
        for store in self._stores():
            try:
                return store.remove(artifact_id)
            except ArtifactNotFound:
                continue
        raise ArtifactNotFound(f"no artifact {artifact_id}")


def main() -> None:
    """Serve until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    url = settings().storage.get_secret_value()
    pool = {"pool_pre_ping": True, "pool_size": 4, "max_overflow": 4} if url.startswith("postgresql") else {}
    storage = RDBStorage(url, engine_kwargs=pool)
    application = wsgi(storage, artifact_store=ArtifactsOfAllStudies(Path(os.environ.get("OUTPUT_DIR", "output"))))
    address, port = os.environ.get("DASHBOARD_ADDRESS", "127.0.0.1"), int(os.environ.get("DASHBOARD_PORT", "8080"))
    with make_server(address, port, application, ThreadedServer, QuietHandler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
