"""The shipped compose stack, brought up for a test on whatever engine there is, and taken down without a trace."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Only for tests: on some hosts a build reaches the package index through the host's network alone.
OVERRIDE = "services:\n" + "".join(
    f"  {service}: {{build: {{network: host}}}}\n" for service in ("migrate", "workers", "dashboard", "study")
)


def compose_command() -> list[str] | None:
    """`docker compose`, or docker-compose 1.29, or None."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) is None:
            continue
        if subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0:
            return command
    return None


def missing_engine() -> str | None:
    """Why no stack can be brought up here, or None."""
    if not shutil.which("docker"):
        return "docker is not installed"
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        return "no container engine answers `docker info`"
    return None if compose_command() else "neither `docker compose` nor docker-compose is installed"


def docker(*arguments: str, check: bool = True, timeout: float = 300) -> str:
    """Run `docker …`; its standard output."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False, timeout=timeout)
    if check and done.returncode:
        raise AssertionError(f"docker {' '.join(arguments)}: {done.stderr or done.stdout}")
    return done.stdout


def report(text: str) -> None:
    """A figure (size, seconds), appended to the file that SAEOPT_FIGURES names."""
    if path := os.environ.get("SAEOPT_FIGURES"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")


def wait_for(
    condition: Callable[[], bool], seconds: float, what: str, explain: Callable[[], str] = lambda: ""
) -> float:
    """Poll until `condition()`; the seconds it took."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds:
            raise AssertionError(f"not within {seconds:.0f} s: {what}\n{explain()}")
        time.sleep(0.5)
    return time.monotonic() - start


@dataclass
class Stack:
    """One project of the compose file with its own names, ports, volumes and settings."""

    project: str
    folder: Path
    settings: dict[str, str]
    command: list[str] = field(default_factory=lambda: compose_command() or ["docker-compose"])

    def write(self) -> None:
        """The settings file and the override: nothing else adapts the shipped files."""
        lines = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
        values = dict(line.split("=", 1) for line in lines if line and not line.startswith("#")) | self.settings
        text = "".join(f"{name}={value}\n" for name, value in values.items())
        (self.folder / "env").write_text(text, encoding="utf-8")
        (self.folder / "override.yml").write_text(OVERRIDE, encoding="utf-8")

    def compose(self, *arguments: str, check: bool = True, timeout: float = 600) -> str:
        """Run `docker compose …` on this project; its standard output."""
        files = ["-f", str(ROOT / "docker-compose.yml"), "-f", str(self.folder / "override.yml")]
        head = [*self.command, "-p", self.project, "--env-file", str(self.folder / "env"), *files]
        # The caller's shell would take precedence over the file.
        hidden = {
            *self.settings,
            "UID",
            "GID",
            "SAEOPT_STORAGE",
            "STUDY",
            "STUDY_FILE",
            "CADDY_IMAGE",
            "HF_TOKEN",
            "WANDB_API_KEY",
        }
        done = subprocess.run(
            [*head, *arguments], capture_output=True, text=True, check=False, timeout=timeout, cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name not in hidden}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"compose {' '.join(arguments)}: {(done.stderr or done.stdout)[-3000:]}")
        return done.stdout

    def containers(self, service: str, *, running: bool = True) -> list[str]:
        """Ids of a service's containers."""
        labels = [f"label=com.docker.compose.project={self.project}", f"label=com.docker.compose.service={service}"]
        filters = [word for label in labels for word in ("--filter", label)]
        return docker("ps", "--quiet", *([] if running else ["--all"]), *filters).split()

    def sql(self, query: str) -> list[str]:
        """Rows of a query, asked inside the database's container; none while the database is not there."""
        asked = ("exec", "-T", "db", "psql", "-U", "saeopt", "-d", "saeopt", "-Atc", query)
        return self.compose(*asked, check=False).splitlines()

    def logs(self) -> str:
        """The end of all logs, for a failure's message."""
        return self.compose("logs", "--no-color", "--tail", "60", check=False)[-12000:]

    def down(self) -> None:
        """Containers, networks and volumes go."""
        profiles = ("--profile", "proxy", "--profile", "tools")
        self.compose(*profiles, "down", "--volumes", "--remove-orphans", "--timeout", "5")

    def leftovers(self) -> list[str]:
        """What still bears the project's name."""
        label = f"label=com.docker.compose.project={self.project}"
        found = docker("ps", "--all", "--quiet", "--filter", label).split()
        for kind in ("volume", "network"):
            found += docker(kind, "ls", "--quiet", "--filter", label).split()
        return found
