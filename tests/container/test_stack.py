"""What operators are promised of the containers: one image, `up`, kills, a restarted database, a page, `down`."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from stack import Stack, docker, report, wait_for

# Whichever test comes first also builds the image: four minutes on two idle cores, more on busy ones.
pytestmark = pytest.mark.timeout(2400)

BUDGET_GB = 2.5
PASSWORD = "p@ss:w/rd%of-the?test"  # whatever a URL would trip over
STUDY = "demo"
STATES = "select t.state, count(*) from trials t join studies s using (study_id) group by 1 order by 1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def new_stack(image: str, folder: Path, name: str, **settings: str) -> Stack:
    """The shipped files with the shipped defaults, but for these settings."""
    own = {
        "POSTGRES_PASSWORD": PASSWORD,
        "SAEOPT_IMAGE": image,
        "BASE_IMAGE": os.environ.get("BASE_IMAGE", "python:3.11-slim-bookworm"),
        "HF_HUB_OFFLINE": "1",
        "DASHBOARD_PORT": str(free_port()),
    }
    results = folder / "results"
    results.mkdir()
    results.chmod(0o777)  # the containers' user is not this one
    own["RESULTS_DIR"] = str(results)
    made = Stack(f"saeopt-test-{name}-{os.getpid()}", folder, own | settings)
    made.write()
    return made


@pytest.fixture(scope="module")
def stack(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack with its demo study of six cells, not yet up. Whatever happens it is taken down."""
    made = new_stack(image, tmp_path_factory.mktemp("stack"), "study")
    try:
        yield made
    finally:
        made.down()
        assert made.leftovers() == []


def states(stack: Stack) -> dict[str, int]:
    return {state: int(count) for state, count in (row.split("|") for row in stack.sql(STATES) if "|" in row)}


def reports(stack: Stack) -> int:
    rows = stack.sql("select count(*) from trial_intermediate_values")
    return int(rows[0]) if rows and rows[0].isdigit() else 0


def get(url: str) -> tuple[int, str]:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer.status, answer.read().decode()


def test_the_image_is_small_and_runs_as_a_user_without_privileges(image: str) -> None:
    assert int(docker("image", "inspect", "--format", "{{.Size}}", image)) / 1e9 < BUDGET_GB
    assert docker("run", "--rm", "--entrypoint", "id", image, "-u").strip() == "1000"
    history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image) + docker("inspect", image)
    assert "PASSWORD=" not in history
    assert "TOKEN=" not in history
    files = docker("run", "--rm", "--entrypoint", "ls", image, "-A", "/app").split()
    assert ".env" not in files
    assert ".git" not in files


def test_the_image_runs_as_any_user(image: str) -> None:
    code = "import getpass, os, saeopt.config; open('/data/output/x', 'w'); print(getpass.getuser(), os.getuid())"
    out = docker("run", "--rm", "--user", "12345:12345", image, "python", "-c", code)
    assert out.split() == ["saeopt", "12345"]


@pytest.mark.slow
def test_a_study_survives_a_killed_worker_and_a_restarted_database(stack: Stack) -> None:
    start = time.monotonic()
    stack.compose("up", "-d", "--no-build", "--scale", "workers=2", "workers")
    report(f"`up` returned after {time.monotonic() - start:.0f} s")
    wait_for(lambda: reports(stack) > 0, 180, "a trial reports", stack.logs)
    report(f"from `up` to the first report of a training: {time.monotonic() - start:.0f} s")
    workers = stack.containers("workers")
    assert len(workers) == 2

    # A stopped container gives its trial back in its grace period; started again, it goes on.
    stopping = time.monotonic()
    docker("stop", "--time", "20", workers[0])
    seconds = time.monotonic() - stopping
    report(f"`docker stop` of a training worker: {seconds:.1f} s")
    assert docker("inspect", "--format", "{{.State.OOMKilled}} {{.State.ExitCode}}", workers[0]).split()[1] != "137"
    docker("start", workers[0])

    docker("kill", "--signal", "KILL", workers[1])
    stack.compose("restart", "--timeout", "5", "db")
    wait_for(
        lambda: states(stack) == {"COMPLETE": 6}, 300, "six finished trials", lambda: f"{states(stack)}\n{stack.logs()}"
    )
    report(f"from `up` to six finished trials, with the kills: {time.monotonic() - start:.0f} s")

    query = "select trial_id, param_name, param_value from trial_params"
    cells: dict[str, list[str]] = {}
    for row in sorted(stack.sql(query)):
        trial, name, value = row.split("|")
        cells.setdefault(trial, []).append(f"{name}={value}")
    assert len(cells) == 6
    assert len({tuple(cell) for cell in cells.values()}) == 6, "each cell exactly once"
    assert f"study {STUDY}" in stack.compose("run", "--rm", "-T", "study", "status", STUDY)
    run = ("run", "--rm", "-T", "study")
    stack.compose(*run, "best", STUDY, "--png", "front.png", "--copy", "best")
    stack.compose(*run, "export", STUDY, "--csv", "tables/all.csv", "--configs", "cells")
    results = Path(stack.settings["RESULTS_DIR"])
    assert (results / "front.png").read_bytes()[:4] == b"\x89PNG"
    assert next((results / "best").glob(f"{STUDY}-*/samples_*.safetensors")).stat().st_size > 1000
    assert len((results / "tables/all.csv").read_text().splitlines()) == 7
    assert len(list((results / "cells").iterdir())) == 6
    listing = stack.compose(
        "run", "--rm", "-T", "--entrypoint", "find", "study", "/data/output", "-name", "evaluation.json"
    )
    assert len(listing.split()) == 6
    assert PASSWORD not in stack.compose("logs", "--no-color")


@pytest.mark.slow
def test_the_dashboard_shows_the_study_through_its_published_port(stack: Stack) -> None:
    stack.compose("up", "-d", "--no-build", "dashboard")
    base = f"http://127.0.0.1:{stack.settings['DASHBOARD_PORT']}"

    def answers() -> bool:
        try:
            return get(f"{base}/dashboard/")[0] == 200
        except OSError:
            return False

    wait_for(answers, 90, "the dashboard answers", stack.logs)
    assert STUDY in get(f"{base}/api/studies")[1]
    address = docker("port", stack.containers("dashboard")[0], "8080").split()
    assert address == [f"127.0.0.1:{stack.settings['DASHBOARD_PORT']}"]
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
                   "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=15000",
                   f"--user-data-dir={stack.folder}/chromium", "--dump-dom", f"{base}/dashboard/"]  # fmt: skip
        page = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120).stdout
        assert STUDY in page


@pytest.mark.slow
def test_the_database_is_reachable_for_the_services_only(stack: Stack, image: str) -> None:
    stack.compose("up", "-d", "--no-build", "db")
    container = stack.containers("db")[0]
    facts = json.loads(docker("inspect", container))[0]["NetworkSettings"]
    assert not any(facts["Ports"].values()), "no port of the database is published"
    (address,) = [network["IPAddress"] for network in facts["Networks"].values()]
    (network,) = facts["Networks"]
    probe = f"import socket; socket.create_connection(({address!r}, 5432), timeout=5); print('reached')"

    def reached(on: str) -> str:
        return docker("run", "--rm", "--network", on, "--entrypoint", "python", image, "-c", probe, check=False)

    assert "reached" in reached(network), "the probe itself must work"
    assert "reached" not in reached("bridge")


@pytest.mark.slow
def test_nothing_is_left_behind(stack: Stack) -> None:
    assert stack.leftovers() != []
    stack.down()
    assert stack.leftovers() == []


LOCK = """
import time
from pathlib import Path
from saeopt.host.gpu_lock import Gpu, take_gpu
lock = take_gpu(Path("/data/locks"), [Gpu(0, "GPU-a"), Gpu(1, "GPU-b")], poll_seconds=0.2)
print("took", lock.device, flush=True)
time.sleep(300)
"""


@pytest.mark.slow
def test_containers_take_different_gpus_and_a_killed_ones_is_free(image: str) -> None:
    """Stand-in GPUs, real containers: the kernel's locks hold across them, in a volume that they share."""
    name = f"saeopt-test-locks-{os.getpid()}"
    start = ("run", "--detach", "--rm", "--init", "--volume", f"{name}:/data/locks", image, "python", "-c", LOCK)
    containers = [docker(*start).strip() for _ in range(3)]
    try:

        def took() -> dict[str, str]:
            logs = {c: docker("logs", c, check=False).split() for c in containers}
            return {c: words[1] for c, words in logs.items() if words[:1] == ["took"]}

        wait_for(lambda: len(took()) == 2, 60, "two containers with a GPU")
        first = took()
        assert set(first.values()) == {"cuda:0", "cuda:1"}
        time.sleep(1)
        assert took() == first, "the third waits"
        killed = next(iter(first))
        (waiting,) = set(containers) - set(first)
        docker("kill", killed)
        wait_for(lambda: took().get(waiting) == first[killed], 20, "the third takes the killed one's GPU")
    finally:
        docker("kill", *containers, check=False)

        def removed() -> bool:
            docker("volume", "rm", name, check=False)
            return not docker("volume", "ls", "--quiet", "--filter", f"name={name}")

        wait_for(removed, 30, "the containers and their volume are gone")


CADDY = "ARG BASE_IMAGE\nFROM ${BASE_IMAGE}\nRUN apt-get update -qq && apt-get install -y -qq caddy >/dev/null\n"


@pytest.fixture
def caddy(engine: None, tmp_path: Path) -> Iterator[str]:
    """The proxy's own image where it can be had, else a stand-in with Debian's Caddy."""
    shipped = "caddy:2.10-alpine"
    if not subprocess.run(["docker", "image", "inspect", shipped], capture_output=True, check=False).returncode:
        yield shipped
        return
    (tmp_path / "Dockerfile").write_text(CADDY, encoding="utf-8")
    tag, base = f"saeopt-test-caddy:{os.getpid()}", os.environ.get("BASE_IMAGE", "python:3.11-slim-bookworm")
    command = ["docker", "build", "--network", "host", "--build-arg", f"BASE_IMAGE={base}", "-t", tag, str(tmp_path)]
    if subprocess.run(command, capture_output=True, check=False, timeout=400).returncode:
        pytest.skip("no image of Caddy, and none can be made from Debian's package")
    yield tag
    docker("image", "rm", tag, check=False)


@pytest.mark.slow
def test_the_proxy_asks_for_the_password_over_tls(image: str, caddy: str, tmp_path: Path) -> None:
    port, secret = free_port(), "a-Password:with@signs"
    made = new_stack(
        image, tmp_path, "proxy", CADDY_IMAGE=caddy, PROXY_PORT=str(port), DASHBOARD_PASSWORD=secret, STUDY_FILE=""
    )
    try:
        made.compose("--profile", "proxy", "up", "-d", "--no-build", "proxy")

        def status(*credentials: str) -> str:
            url = f"https://localhost:{port}/dashboard/"
            command = ["curl", "-sk", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "10", *credentials, url]
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout

        wait_for(lambda: status("-u", f"saeopt:{secret}") == "200", 120, "the page behind the proxy", made.logs)
        assert status() == "401"
        assert status("-u", "saeopt:wrong") == "401"
    finally:
        made.down()
        assert made.leftovers() == []
