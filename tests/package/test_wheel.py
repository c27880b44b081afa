"""The built wheel, installed into an environment of its own, does the quick start in another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("data.context_length=16", "data.n_train_samples=64", "data.n_eval_samples=8", "warmup_samples=8", "threads=1")
Run = Callable[..., str]


def built(source: Path, target: str, to: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(to)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    return next(to.iterdir())


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A command of a fresh environment that has saeopt from the wheel, its dependencies from this one."""
    home = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home / "venv")], check=True)
    python, folder = home / "venv/bin/python", home / "elsewhere"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    packages = next((home / "venv/lib").glob("python*/site-packages"))
    (packages / "others.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    folder.mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith("SAEOPT_") and k != "PYTHONPATH"}
    environment = kept | {"PATH": f"{python.parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "COLUMNS": "80",
                          "SAEOPT_CACHE_DIR": str(home / "cache")}  # fmt: skip

    def call(*words: object, cwd: str = ".") -> str:
        command = [str(word) for word in words]
        done = subprocess.run(command, cwd=folder / cwd, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return call


def test_sdist_and_wheel_are_whole(wheel: Path, tmp_path: Path) -> None:
    source = built(ROOT, "sdist", tmp_path / "sdist")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / source.name.removesuffix(".tar.gz")
    assert contents(built(unpacked, "wheel", tmp_path / "again")) == contents(wheel)
    for name in (
        "LICENSE",
        "CHANGELOG.md",
        "constraints.txt",
        "tests/conftest.py",
        "docs/python.md",
        "scripts/test.sh",
    ):
        assert (unpacked / name).is_file(), name
    own = {name for name in contents(wheel) if name.startswith("saeopt/")}
    there = {str(p.relative_to(ROOT)) for p in (ROOT / "saeopt").rglob("*.py")}
    assert there <= own
    assert {name for name in own if name.startswith("saeopt/starter/")} == {
        f"saeopt/starter/{name}" for name in ("config.yaml", "study.yaml", "README.md", "gitignore")
    }
    assert not [name for name in own if name.endswith((".db", ".pyc"))]


@pytest.mark.slow
def test_the_quick_start_runs_from_the_wheel(run: Run, tiny_model_dir: Path, tiny_text: Path) -> None:
    code = "import saeopt, saeopt.config.shipped as s; print(saeopt.__file__, s.root(), saeopt.__version__)"
    module, root, version = run("python", "-c", code).split()
    assert str(ROOT) not in module + root
    assert root.endswith("saeopt/_shipped")
    assert run("saeopt", "--version").strip() == version
    assert "tinystories-relu-grid" in run("python", "-m", "saeopt", "configs", "ls")
    run("saeopt", "configs", "cp", "tinystories-relu-grid")

    run("saeopt", "init", "mine", "--model", tiny_model_dir, "--data", tiny_text, "--hook", "blocks.1.hook_resid_pre")
    small = [word for change in SMALL for word in ("--set", change)]
    trained = run("saeopt", "train", "config.yaml", "--set", "wandb_run_name=one", *small, cwd="mine")
    assert "output/one" in trained
    created = run("saeopt", "study", "create", "study.yaml", "--max-trials", 3, *small, cwd="mine")
    assert "saeopt worker mine" in created
    run("saeopt", "worker", "mine", "--devices", "cpu", cwd="mine")  # trains in a child process
    status = json.loads(run("saeopt", "study", "status", "mine", "--json", cwd="mine"))
    assert status["trials"]["complete"] == status["trials"]["all"] == 3, status
    assert "blocks.1.hook_resid_pre" in run("saeopt", "study", "best", "mine", "--png", "front.png", cwd="mine")
