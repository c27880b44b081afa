"""One dashboard over the artifacts of all studies of a store."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bottle
import pytest
from optuna.artifacts.exceptions import ArtifactNotFound

from saeopt.trials.storage import Store
from saeopt.views.dashboard import ArtifactsOfAllStudies
from saeopt.views.monitoring import artifact_dir, on_study_progress

Cli = Callable[..., Any]


@pytest.fixture
def store(cli: Cli, study_file: Path, store_url: str, tmp_path: Path, finish: Callable[..., None]) -> Store:
    """Studies `six` and `other`, of different output folders and with a front each, and a third that is not ours."""
    cli("create", study_file)
    cli("create", study_file, "--name", "other", "--output-dir", tmp_path / "elsewhere")
    opened = Store.open(store_url)
    for name in ("six", "other"):
        finish(name, (20.0, 0.1))
        on_study_progress(opened, opened.study_id(name), opened.spec(name), force=True)
    return opened


def only_file(store: Store, name: str) -> Path:
    return next(p for p in artifact_dir(store.spec(name)).iterdir() if p.read_bytes()[:4] == b"\x89PNG")


def asked(store: Store, path: str) -> ArtifactsOfAllStudies:
    return ArtifactsOfAllStudies(store, lambda: path)


def test_artifacts_of_every_study_are_found_from_any_working_directory(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    for number, name in enumerate(("six", "other"), 1):
        file = only_file(store, name)
        for path in (f"/artifacts/{number}/{file.name}", f"/artifacts/{number}/1/{file.name}"):
            with asked(store, path).open_reader(file.name) as reader:
                assert reader.read() == file.read_bytes()
    with pytest.raises(bottle.HTTPError) as missing:
        asked(store, "/artifacts/1/0").open_reader(only_file(store, "other").name)
    assert missing.value.status_code == 404


def test_a_study_with_a_relative_output_folder_is_found_from_elsewhere(
    cli: Cli, study_file: Path, store_url: str, tmp_path: Path, finish: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    cli("create", study_file, "--output-dir", "runs")  # relative to where the workers are
    finish("six", (20.0, 0.1))
    store = Store.open(store_url)
    file = only_file(store, "six")
    name, content = file.name, file.read_bytes()
    monkeypatch.chdir("/")
    assert asked(store, f"/artifacts/1/1/{name}").open_reader(name).read() == content


def test_uploads_go_to_the_folder_of_their_study_and_can_be_removed(store: Store) -> None:
    files = asked(store, "/api/artifacts/2")
    files.write("uploaded", io.BytesIO(b"three"))
    assert (artifact_dir(store.spec("other")) / "uploaded").read_bytes() == b"three"
    assert files.open_reader("uploaded").read() == b"three"
    asked(store, "/api/studies/2").remove("uploaded")
    with pytest.raises(ArtifactNotFound):
        files.remove("uploaded")


def test_an_artifact_id_leads_nowhere_else(store: Store, tmp_path: Path) -> None:
    (artifact_dir(store.spec("six")).parent / "secret").write_text("x", encoding="utf-8")
    with pytest.raises(bottle.HTTPError):
        asked(store, "/artifacts/1/x").open_reader("../secret")
