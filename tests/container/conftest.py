"""The image, built once, and the data that the stack trains on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from stack import ROOT, docker, missing_engine, report, wait_for


@pytest.fixture(scope="session")
def engine() -> None:
    """Skips the test where no container engine can be had."""
    if reason := missing_engine():
        pytest.skip(f"container tests need a Docker engine and compose: {reason}")


@pytest.fixture(scope="session")
def image(engine: None) -> Iterator[str]:
    """The image of this checkout, removed afterwards."""
    tag = f"saeopt:test-{os.getpid()}"
    start = time.monotonic()
    arguments = ["--build-arg", f"TORCH_INDEX={os.environ.get('SAEOPT_TEST_TORCH_INDEX', '')}", "--network", "host"]
    # The classic builder where the client has no BuildKit plugin.
    buildkit = subprocess.run(["docker", "buildx", "version"], capture_output=True, check=False).returncode == 0
    done = subprocess.run(
        ["docker", "build", *arguments, "--tag", tag, str(ROOT)],
        env=os.environ | {"DOCKER_BUILDKIT": "1" if buildkit else "0"},
        capture_output=True, text=True, check=False, timeout=2100,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    size = int(docker("image", "inspect", "--format", "{{.Size}}", tag)) / 1e9
    report(f"image: {size:.2f} GB, built in {time.monotonic() - start:.0f} s")
    yield tag

    def removed() -> bool:  # refused while the engine still takes a container down
        docker("image", "rm", "--force", tag, check=False)
        return not docker("images", "--quiet", tag)

    wait_for(removed, 120, "the image is gone")
