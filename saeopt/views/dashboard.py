"""optuna-dashboard's own application over all studies of a store, each with its own folder of artifacts.

The dashboard's own command knows one folder of artifacts, shows the database's password in every process list, and its
connections do not outlive a restart of the database.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import BinaryIO
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import bottle
from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna_dashboard import wsgi

from saeopt.config.study import StudySpec
from saeopt.errors import UserError
from saeopt.trials import internals as db
from saeopt.trials.storage import SPEC_KEY, Store
from saeopt.views.monitoring import ARTIFACTS, ARTIFACTS_AT, artifact_dir

_STUDY = re.compile(r"/(?:api/)?(?:artifacts|studies)/(\d+)(?:/|$)")


class ArtifactsOfAllStudies:
    """Optuna's artifact protocol over the folders of all studies: the page's address says which study it is about."""

    def __init__(self, store: Store, asked: Callable[[], str] = lambda: str(bottle.request.path)) -> None:
        self.store, self._asked = store, asked

    def folders(self) -> list[Path]:
        """Where artifacts of the study in question may lie; new ones go to the first that is there."""
        match = _STUDY.match(self._asked())
        known = {}
        if match is not None:
            with self.store.read() as connection:
                known = db.get_attrs(connection, db.study_attrs, int(match[1]), "saeopt:")
        if SPEC_KEY not in known:  # not a study of ours
            return [Path("output") / ARTIFACTS]
        spec = StudySpec.from_json(known[SPEC_KEY])
        own = artifact_dir(spec)
        # By the study's own path, by where a worker wrote them, and where uploads in a browser once went.
        return [own, Path(known.get(ARTIFACTS_AT, own)), spec.runs.parent / ARTIFACTS]

    def _having(self, artifact_id: str) -> FileSystemArtifactStore:
        for folder in self.folders():
            if "/" not in artifact_id and (folder / artifact_id).is_file():
                return FileSystemArtifactStore(folder)
        raise ArtifactNotFound(f"no artifact {artifact_id}")

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """Part of Optuna's artifact protocol; the page gets "not found" instead of an error of the server."""
        try:
            return self._having(artifact_id).open_reader(artifact_id)
        except ArtifactNotFound:
            raise bottle.HTTPError(404, "this file is not on the dashboard's host") from None

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Part of Optuna's artifact protocol: what a person uploads in the browser."""
        folders = self.folders()
        folder = next((folder for folder in folders if folder.is_dir()), folders[0])
        folder.mkdir(parents=True, exist_ok=True)
        FileSystemArtifactStore(folder).write(artifact_id, content_body)

    def remove(self, artifact_id: str) -> None:
        """Part of Optuna's artifact protocol."""
        self._having(artifact_id).remove(artifact_id)


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each request, so that one slow page does not hold up the others."""

    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    """Without a line for each of the page's polling requests."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def server(store: Store, host: str, port: int) -> WSGIServer:
    """The dashboard, bound but not yet serving; port 0 takes a free one.

    Raises:
        UserError: the address cannot be had.
    """
    application = wsgi(store.optuna, artifact_store=ArtifactsOfAllStudies(store))
    try:
        return make_server(host, port, application, _Server, _Quiet)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        reason = "is taken (another dashboard?); give another --port" if taken else f"cannot be had: {error.strerror}"
        raise UserError(f"{host}:{port} {reason}") from None
