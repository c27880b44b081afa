"""The container's dashboard: one artifact store over the artifacts of all studies."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from types import ModuleType

import pytest
from optuna.artifacts.exceptions import ArtifactNotFound

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/container/dashboard.py"


@pytest.fixture
def dashboard() -> ModuleType:
    spec = importlib.util.spec_from_file_location("container_dashboard", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_artifacts_of_every_study_are_found(dashboard: ModuleType, tmp_path: Path) -> None:
    for study in ("one", "two"):
        (tmp_path / study / "artifacts").mkdir(parents=True)
        (tmp_path / study / "artifacts" / f"id-{study}").write_text(study, encoding="utf-8")
    store = dashboard.ArtifactsOfAllStudies(tmp_path)
    assert store.open_reader("id-one").read() == b"one"
    assert store.open_reader("id-two").read() == b"two"
    store.write("uploaded", io.BytesIO(b"three"))
    assert store.open_reader("uploaded").read() == b"three"
    store.remove("id-one")
    with pytest.raises(ArtifactNotFound):
        store.open_reader("id-one")


def test_an_artifact_id_leads_nowhere_else(dashboard: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x", encoding="utf-8")
    (tmp_path / "study" / "artifacts").mkdir(parents=True)
    store = dashboard.ArtifactsOfAllStudies(tmp_path)
    with pytest.raises((ArtifactNotFound, ValueError, OSError)):
        store.open_reader("../../secret")
