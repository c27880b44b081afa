"""A store that an older version wrote goes on working: everything that reads it, and a worker that ends its studies."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest
from optuna_dashboard import wsgi

from saeopt.trials import claims
from saeopt.trials.storage import Store
from saeopt.views.dashboard import ArtifactsOfAllStudies
from saeopt.workers.local import LocalTraining
from saeopt.workers.loop import Options, Worker

STORED = Path(__file__).with_name("store_2026_11.sql")
HOOK = "blocks.1.hook_resid_pre"
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def old(tmp_path: Path, store_url: str) -> Store:
    """The store, opened where its model and data are not at first."""
    with sqlite3.connect(tmp_path / "store.db") as connection:
        connection.executescript(STORED.read_text(encoding="utf-8"))
    connection.close()
    return Store.open(store_url)


def test_status_counts_what_an_older_version_stored(old: Store, cli: Cli) -> None:
    found = json.loads(cli("status", "old", "--json").stdout)
    counts = {"waiting": 3, "running": 1, "complete": 5, "pruned": 2, "failed": 1, "paused": 0, "all": 12}
    assert found["trials"] == counts
    assert found["failed"] == [{"trial": 7, "reason": "ValueError: the loss is not a number"}]
    assert [p["trial"] for p in found["front"][HOOK]] == [1, 6, 3]
    shown = cli("status", "old").stdout
    assert "the loss is not a number" in shown
    assert [s["state"] for s in json.loads(cli("list", "--json").stdout)] == ["open", "stopped"]


def test_best_and_exports_of_an_older_version(old: Store, cli: Cli, tmp_path: Path) -> None:
    every = json.loads(cli("best", "old", "--json").stdout)
    assert [(found["saes"], found["collapsed"]) for found in every.values()] == [(6, 1)] * 2  # by the study's own rule
    found = every[HOOK]
    assert found["front"][0]["metrics"]["fvu"] == 0.57228
    assert found["front"][0]["params"] == {"saes.sae_type": "topk", "saes.k": 2, "lr": 0.0011632365482546708}
    assert "Pareto front" in cli("best", "old", "--png", tmp_path / "front.png").stdout
    assert cli("export", "old", "--csv", tmp_path / "t.csv", "--configs", tmp_path / "c").stdout.startswith("8 configs")
    assert "objective:ce_recovered" in (tmp_path / "t.csv").read_text().splitlines()[0]
    assert "trial 9: WAITING" in (said := cli("logs", "old", "9").stdout)
    assert "reason: the disk is full" in said
    assert "sampler: tpe" not in cli("show", "old").stdout  # the spec itself, not a note
    assert "type: tpe" in cli("show", "old").stdout


def test_the_dashboard_shows_what_an_older_version_stored(old: Store) -> None:
    application = wsgi(old.optuna, artifact_store=ArtifactsOfAllStudies(old, lambda: "/api/studies/1"))
    said = [_get(application, path) for path in ("/api/studies", "/api/studies/1", "/api/studies/2")]
    assert [s["study_name"] for s in said[0]["study_summaries"]] == ["old", "cells"]
    states = [t["state"] for t in said[1]["trials"]]
    assert (len(states), states.count("Complete"), states.count("Running")) == (12, 5, 1)
    assert "# old" in said[1]["note"]["body"]
    assert len(said[2]["trials"]) == 2


def _get(application: Any, path: str) -> Any:
    environment = {"PATH_INFO": path, "QUERY_STRING": "after=0"}
    setup_testing_defaults(environment)
    status: list[str] = []
    body = b"".join(application(environment, lambda said, headers, *rest: status.append(said)))
    assert status == ["200 OK"], (path, body[:300])
    return json.loads(body)


def test_a_worker_ends_the_studies_of_an_older_version(
    old: Store, cli: Cli, tmp_path: Path, tiny_model_dir: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.symlink(tiny_model_dir, tmp_path / "model")
    os.symlink(tiny_text, tmp_path / "text.jsonl")
    cli("resume", "cells")
    assert "1 trial of study old waits again: 7" in cli("retry", "old").stdout
    monkeypatch.chdir(tmp_path)
    training = LocalTraining("cpu")
    for name in ("old", "cells"):
        Worker(old, name, Options(poll=0.1), training, lambda space: 2, threading.Event()).run()
        counts = claims.counts(old, old.study_id(name))
        assert counts["WAITING"] == counts["RUNNING"] == counts["FAIL"] == 0
    trials = old.study("old").trials
    assert [t.number for t in trials] == list(range(12))
    assert [trials[0].values[0], trials[6].values] == [15.794820717131474, [3.35, 0.5, 0.3, 0.8]]
    assert all(t.params for t in trials)
    ended = json.loads(cli("best", "old", "--json").stdout)[HOOK]
    assert ended["saes"] > 6
