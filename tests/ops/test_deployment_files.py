"""Compose files and Kubernetes manifests against their published schemas, and what must hold of them beyond that."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
COMPOSE_FILES = sorted(ROOT.glob("docker-compose*.yml"))
BASE = ROOT / "scripts/kubernetes/base"
OVERLAYS = [BASE, *sorted((ROOT / "scripts/kubernetes/overlays").iterdir())]


def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))


def manifests() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for path in sorted(BASE.glob("*.yaml")):
        if path.name != "kustomization.yaml":
            found += list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_compose_file_follows_the_compose_specification(path: Path) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_file_has_nothing_that_docker_compose_1_29_refuses() -> None:
    for path in COMPOSE_FILES:
        text = path.read_text(encoding="utf-8")
        assert "!reset" not in text
        assert "!override" not in text
        assert not {"name", "include"} & set(yaml.safe_load(text))


def test_only_loopback_and_the_proxy_are_published() -> None:
    published = {name: service["ports"] for name, service in compose()["services"].items() if "ports" in service}
    assert set(published) == {"dashboard", "proxy"}
    assert all(port.startswith("127.0.0.1:") for port in published["dashboard"])
    assert compose()["services"]["proxy"]["profiles"] == ["proxy"]
    assert compose()["services"]["db"]["networks"] == ["backend"]
    assert compose()["networks"]["backend"]["internal"] is True


def test_the_database_password_has_no_default() -> None:
    for service in compose()["services"].values():
        password = service.get("environment", {}).get("POSTGRES_PASSWORD", "${POSTGRES_PASSWORD:?")
        assert password.startswith("${POSTGRES_PASSWORD:?")
    example = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    assert "POSTGRES_PASSWORD=" in example
    assert "DASHBOARD_PASSWORD=" in example


def test_every_variable_of_the_compose_files_is_explained_in_the_example_settings() -> None:
    import re

    used = {name for path in COMPOSE_FILES for name in re.findall(r"\$\{([A-Z_]+)", path.read_text(encoding="utf-8"))}
    offered = re.findall(r"^([A-Z_]+)=", (ROOT / ".env.example").read_text(encoding="utf-8"), re.MULTILINE)
    assert used - set(offered) - {"POSTGRES_IMAGE", "CADDY_IMAGE"} == set()


def test_workers_get_an_init_process_a_grace_period_and_the_lock_folder() -> None:
    workers = compose()["services"]["workers"]
    assert workers["init"] is True
    assert workers["stop_grace_period"] == "20s"
    assert workers["environment"]["SAEOPT_GPU_LOCKS"] == "/data/locks"
    assert workers["environment"]["SAEOPT_FAULT_PAUSE"] == "${SAEOPT_FAULT_PAUSE:-60}"  # restarts without a pause
    assert "locks:/data/locks" in workers["volumes"]


def test_every_service_runs_without_privileges_and_within_limits() -> None:
    services = compose()["services"]
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["pids_limit"] > 0, name
        assert "mem_limit" in service, name
        assert service["image"].startswith("${"), name  # a digest can be pinned
        added = {"db": {"CHOWN", "DAC_OVERRIDE", "FOWNER", "SETGID", "SETUID"}, "proxy": {"NET_BIND_SERVICE"}}
        assert set(service.get("cap_add", [])) == added.get(name, set())
        if name not in added:
            assert service["read_only"] is True, name
            assert [mount.partition(":")[0] for mount in service["tmpfs"]] == ["/tmp"], name


def test_only_the_workers_get_tokens() -> None:
    for name, service in compose()["services"].items():
        tokens = {"HF_TOKEN", "WANDB_API_KEY"} & set(service.get("environment", {}))
        assert tokens == ({"HF_TOKEN", "WANDB_API_KEY"} if name == "workers" else set())


def test_make_env_fills_in_passwords_once_and_keeps_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/make_env.sh", tmp_path / "scripts")
    shutil.copy(ROOT / ".env.example", tmp_path)
    command = ["bash", "scripts/make_env.sh"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    env = tmp_path / ".env"
    first = env.read_text(encoding="utf-8")
    values = dict(line.split("=", 1) for line in first.splitlines() if line and not line.startswith("#"))
    assert len(values["POSTGRES_PASSWORD"]) == 32
    assert values["POSTGRES_PASSWORD"] != values["DASHBOARD_PASSWORD"]
    assert int(values["UID"]) == (os.getuid() or 1000)
    assert env.stat().st_mode & 0o077 == 0
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert env.read_text(encoding="utf-8") == first


@pytest.mark.parametrize("document", manifests(), ids=lambda d: f"{d['kind']}-{d['metadata']['name']}")
def test_manifest_follows_the_schema_of_kubernetes(document: dict[str, Any]) -> None:
    import kubernetes_validate

    kubernetes_validate.validate(document, "1.34", strict=True)


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda path: path.name)
def test_kustomize_builds_what_the_schema_accepts(folder: Path, tmp_path: Path) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    import kubernetes_validate

    copy = tmp_path / "kubernetes"
    shutil.copytree(ROOT / "scripts/kubernetes", copy)
    (copy / "base/secret.env").write_text("POSTGRES_PASSWORD=for-this-test\n", encoding="utf-8")
    target = copy / folder.relative_to(ROOT / "scripts/kubernetes")
    done = subprocess.run(["kubectl", "kustomize", str(target)], capture_output=True, text=True, check=True)
    documents = list(yaml.safe_load_all(done.stdout))
    for document in documents:
        kubernetes_validate.validate(document, "1.34", strict=True)
    kinds = {(document["kind"], document["metadata"]["name"]) for document in documents}
    assert (("StatefulSet", "db") in kinds) == (folder.name != "external-database")
    workers = next(d for d in documents if d["kind"] == "Deployment" and d["metadata"]["name"] == "workers")
    limits = workers["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits.get("nvidia.com/gpu") == (None if folder.name == "cpu" else 1)


def test_a_worker_under_slurm_hands_back_and_queues_again_on_preemption(tmp_path: Path) -> None:
    """The batch script with stand-ins for `saeopt` and `scontrol`; docs/operators.md says what a real one ran."""
    import signal
    import time

    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "saeopt": 'trap "echo handed back; exit 0" TERM; echo "started $*"; for i in $(seq 300); do sleep 0.1; done',
        "scontrol": 'echo "scontrol $*"',
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}", "SAEOPT_VENV": str(tmp_path), "SAEOPT_HOME": str(tmp_path),
        "SAEOPT_STORAGE": "sqlite:///x.db", "SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3",
    }  # fmt: skip
    command = ["bash", str(ROOT / "scripts/slurm/workers.sbatch"), "demo", "--pack", "2"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    started = process.stdout.readline()
    assert started == "started worker --study demo --devices auto --idle-timeout 60 --pack 2\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    rest, _ = process.communicate(timeout=20)
    assert "handed back" in rest
    assert "scontrol requeue 5_3" in rest
    assert process.returncode == 0


def test_the_studys_results_come_to_the_host_and_the_headers_agree() -> None:
    study = compose()["services"]["study"]
    assert "${RESULTS_DIR:-./results}:/results" in study["volumes"]
    assert study["environment"]["SAEOPT_RESULTS"] == "/results"
    assert set(study["volumes"]) >= set(compose()["x-saeopt"]["volumes"])
    head = (ROOT / "docker-compose.yml").read_text(encoding="utf-8").split("x-saeopt")[0]
    readme = (ROOT / "docs" / "operators.md").read_text(encoding="utf-8")
    steps = [line.split("   ")[0].strip("# ") for line in head.splitlines() if line.startswith("#   ")]
    places = [readme.index(step) for step in steps if "--profile" not in step]
    assert places == sorted(places)


def test_make_env_makes_the_folder_of_results(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/make_env.sh", ".env.example"):
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run(["bash", "scripts/make_env.sh"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "results").stat().st_mode & 0o777 == 0o755
    env = (tmp_path / ".env").read_text(encoding="utf-8")
    assert f"UID={(tmp_path / 'results').stat().st_uid}\n" in env
