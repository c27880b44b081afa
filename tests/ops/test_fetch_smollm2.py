"""The model directory appears complete or not at all, and is made once."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/fetch_smollm2.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_smollm2", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "download_gguf", lambda folder: folder / "model.gguf")
    return module


def test_the_directory_is_made_once(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Path] = []

    def convert(gguf: Path, target: Path) -> None:
        calls.append(target)
        target.mkdir()
        (target / "config.json").write_text("{}", encoding="utf-8")

    monkeypatch.setattr(script, "convert", convert)
    target = tmp_path / "models" / "m"
    assert script.fetch(target) == target
    assert script.fetch(target) == target
    assert len(calls) == 1
    assert (target / "config.json").exists()


def test_an_interrupted_conversion_leaves_no_directory(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(gguf: Path, target: Path) -> None:
        target.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "convert", convert)
    with pytest.raises(KeyboardInterrupt):
        script.fetch(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m.lock"]


def test_the_cache_folder_can_be_chosen(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEOPT_CACHE_DIR", str(tmp_path))
    assert script.default_directory() == tmp_path / "models" / "SmolLM2-135M-Instruct"
    monkeypatch.delenv("SAEOPT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert script.default_directory() == tmp_path / "x" / "saeopt" / "models" / "SmolLM2-135M-Instruct"
