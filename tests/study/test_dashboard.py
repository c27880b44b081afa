"""optuna-dashboard on a study of ours, in headless Chromium: front, intermediate values, notes, an artifact."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., subprocess.CompletedProcess[str]]
Finish = Callable[..., None]
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def dashboard(cli: Cli, study_file: Path, finish: Finish, store_url: str, tmp_path: Path) -> Iterator[str]:
    """URL of a dashboard over two studies, of three complete trials and of one, with their fronts."""
    from saeopt.trials.storage import Store
    from saeopt.views.monitoring import on_study_progress

    cli("create", study_file)
    cli("create", study_file, "--name", "other", "--output-dir", tmp_path / "elsewhere")
    for outcome in ((40.0, 0.05), (20.0, 0.1), (10.0, 0.2)):
        finish("six", outcome)
    finish("other", (15.0, 0.15))
    store = Store.open(store_url)
    for name in ("six", "other"):
        store.study(name).set_user_attr("intermediate_values", "fvu (mean over hook points)")
        on_study_progress(store, store.study_id(name), store.spec(name), force=True)
    store.close()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "saeopt", "dashboard", "--storage", store_url]
    with (tmp_path / "dashboard.log").open("w") as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log, cwd=REPOSITORY)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(lambda: bool(_json(f"{url}/api/studies")), 60)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=20)


def _json(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.loads(answer.read())
    except OSError:
        return None


def _wait(done: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)


def test_the_dashboards_interface_has_names_values_notes_and_artifacts(dashboard: str) -> None:
    study = _json(f"{dashboard}/api/studies/1?after=0")
    assert study["objective_names"] == ["l0", "explained_variance"]
    assert "run folders" in study["note"]["body"]
    assert {a["filename"] for a in study["artifacts"]} == {"pareto_front.png"}
    first = study["trials"][0]
    assert "final_config.yaml" in first["note"]["body"]
    assert 0 < len(first["intermediate_values"]) <= 50
    assert [a["filename"] for a in first["artifacts"]] == ["training_curves.png"]
    attributes = {a["key"]: a["value"] for a in first["user_attrs"]}
    assert attributes.keys() >= {"eval/blocks.0.hook_resid_pre", "run_dir", "ce_recovered", "kl"}
    assert float(attributes["fvu"]) == 0.055  # the mean of 0.05 and 0.06
    assert float(attributes["fvu@blocks.1.hook_resid_pre"]) == 0.06
    assert "| blocks.1.hook_resid_pre | 40.0 | 0.0600 | 0.975 |" in first["note"]["body"]
    assert all(len(a["value"]) <= 1024 for a in first["user_attrs"])
    for number in (1, 2):
        study = _json(f"{dashboard}/api/studies/{number}?after=0")
        trial = study["trials"][0]
        ids = [study["artifacts"][0]["artifact_id"], f"{trial['trial_id']}/{trial['artifacts'][0]['artifact_id']}"]
        for path in ids:
            with urllib.request.urlopen(f"{dashboard}/artifacts/{number}/{path}", timeout=10) as answer:
                assert answer.read(8) == b"\x89PNG\r\n\x1a\n"


def test_a_missing_artifact_is_not_found_and_the_page_lives_on(dashboard: str, tmp_path: Path) -> None:
    artifact = _json(f"{dashboard}/api/studies/2?after=0")["artifacts"][0]["artifact_id"]
    (tmp_path / "elsewhere/other/artifacts" / artifact).unlink()
    with pytest.raises(urllib.error.HTTPError) as answer:
        urllib.request.urlopen(f"{dashboard}/artifacts/2/{artifact}", timeout=10)
    assert answer.value.code == 404
    assert len(_json(f"{dashboard}/api/studies")["study_summaries"]) == 2


@pytest.mark.slow
def test_the_dashboard_in_chromium_shows_front_curves_notes_and_an_artifact(dashboard: str, tmp_path: Path) -> None:
    # A browser starts, loads 5 MB of scripts and draws with plotly: half a minute on a busy machine.
    browser = _browser(tmp_path)
    try:
        pages = {
            "": [
                "Pareto Front",
                "explained_variance",
                "Sparsity against fidelity",
                "pareto_front.png",
                "fvu (mean over hook points) while training",
                "relu · blocks.1.hook_resid_pre",
            ],
            "/trials?numbers=0": [
                "final_config.yaml",
                "Intermediate Values",
                "eval/blocks.0.hook_resid_pre",
                "training_curves.png",
                "CE recovered",
                "fvu@blocks.1.hook_resid_pre",
            ],
            "/note": ["run folders"],
        }
        for page, texts in pages.items():
            browser.get(f"{dashboard}/dashboard/studies/1{page}")
            for text in texts:
                _wait(lambda text=text: text in _text(browser), 60)
        browser.get(f"{dashboard}/dashboard/studies/1")
        _wait(lambda: len(browser.find_elements("css selector", ".js-plotly-plot .trace")) >= 2, 60)
        pictures = (
            "return [...document.images].filter(i => i.src.includes('/artifacts/') && i.naturalWidth > 100).length"
        )
        for page in ("1/trials?numbers=0", "2/trials?numbers=0", "2"):
            browser.get(f"{dashboard}/dashboard/studies/{page}")
            _wait(lambda: browser.execute_script(pictures) >= 1, 60)
        errors = [e for e in browser.get_log("browser") if e["level"] == "SEVERE" and "favicon" not in e["message"]]
        assert not errors
    finally:
        browser.quit()


def _text(browser: Any) -> str:
    return str(browser.execute_script("return document.body.innerText"))


def _browser(folder: Path) -> Any:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1600,2400"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={folder / 'chromium'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
