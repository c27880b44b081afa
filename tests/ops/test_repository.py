"""The project's own files: scripts parse, pins agree with the declared ranges, no machine or registry is named."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import saeopt

ROOT = Path(__file__).resolve().parents[2]


def tracked_files() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def shell_scripts() -> list[Path]:
    folders = [ROOT / "scripts", ROOT / ".ci"]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sorted(f for f in files if f.suffix in {".sh", ".sbatch"} or f.read_bytes()[:19] == b"#!/usr/bin/env bash")


@pytest.mark.parametrize("script", shell_scripts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_shell_scripts_pass_shellcheck() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    command = ["shellcheck", "-S", "warning", "-x", "-P", str(ROOT), *map(str, shell_scripts())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.]+", line) for line in found), "exact pins only"
    return {normal(line.split("==")[0]): line.split("==")[1] for line in found}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_declared_dependency_is_pinned_inside_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        declared += extra
    pinned = pins()
    for line in declared:
        requirement = Requirement(line)
        version = pinned.get(normal(requirement.name))
        assert version is not None, f"{requirement.name} is not in constraints.txt (scripts/lock.sh --keep)"
        assert requirement.specifier.contains(version), f"{line} does not admit the pinned {version}"


def test_the_image_takes_the_pinned_torch() -> None:
    assert f"ARG TORCH_VERSION={pins()['torch']}\n" in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_one_version_is_named_everywhere_and_the_citation_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["version"] == citation["version"] == saeopt.__version__
    assert project["license"] == citation["license"] == "MIT"
    assert valid("citation-file-format", ROOT / "CITATION.cff")
    assert "\n## Unreleased\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_workflow_is_valid_and_tries_every_python_that_is_admitted() -> None:
    workflow = ROOT / ".github/workflows/ci.yml"
    assert valid("github-workflows", workflow)
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    tried = jobs["tests"]["strategy"]["matrix"]["python"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    classified = [line.rpartition(" ")[2] for line in project["classifiers"] if ":: Python :: 3." in line]
    assert tried == classified
    admitted = SpecifierSet(project["requires-python"])
    assert [version for version in (f"3.{minor}" for minor in range(40)) if admitted.contains(version)] == tried
    wanted = f"not (3, {tried[0][2:]}) <= sys.version_info[:2] <= (3, {tried[-1][2:]})"
    assert wanted in (ROOT / "scripts/lib/venv.sh").read_text(encoding="utf-8")


def valid(schema: str, file: Path) -> bool:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return True


def test_no_registry_host_and_no_machine_path_in_any_file() -> None:
    hosts = ["py" + "pi.org", "python" + "hosted.org", "registry." + "npmjs", "deb.debian" + ".org"]
    places = ["/" + "work/", "/" + "root/.", "/opt/" + "wheels", "/opt/" + "pypi", "--extra-" + "index-url"]
    for path in tracked_files():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found = [word for word in hosts + places if word in text]
        assert not found, f"{path.relative_to(ROOT)} names {found}"


SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), *sorted((ROOT / "scripts").glob("*.py")),
           ROOT / "scripts/container/demo.py"]  # fmt: skip
COMMANDS = [p for p in SCRIPTS if p.suffix == ".sh" or "__main__" in p.read_text(encoding="utf-8")]


@pytest.mark.parametrize("script", COMMANDS, ids=lambda path: path.name)
def test_help_of_a_script_says_something_and_does_nothing(script: Path, tmp_path: Path) -> None:
    def state() -> list[object]:
        status = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, check=False).stdout
        return [status, *((path, path.stat().st_mtime_ns) for path in [ROOT, *sorted((ROOT / "docs").rglob("*"))])]

    before = state()
    command = ["bash" if script.suffix == ".sh" else sys.executable, str(script), "--help"]
    own = {"HOME": str(tmp_path), "SAEOPT_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | own, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 10
    assert not (tmp_path / "cache").exists()
    assert state() == before
