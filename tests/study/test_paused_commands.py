"""What people see of paused trials, and what they can do with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml

from saeopt.trials import claims, endings, paused
from saeopt.trials.storage import Store
from saeopt.trials.waiting import Merging

Cli = Callable[..., CompletedProcess[str]]
REASON = "paused by halving at 304 of 1000 samples: place 5 of 6, of which 2 go on: trial 0 is ahead (l0 9 against 12)"


@pytest.fixture
def study(cli: Cli, study_file: Path, store_url: str) -> str:
    raw: dict[str, Any] = yaml.safe_load(study_file.read_text())
    study_file.write_text(yaml.safe_dump(raw | {"early_stopping": {"type": "halving", "rungs": [0.1, 0.3]}}))
    cli("create", study_file)
    store = Store.open(store_url)
    study_id = store.study_id("six")
    pack = claims.claim(store, study_id, 6, {"worker": "test"})
    assert endings.pause(store, pack[1], 304, REASON)
    assert endings.pause(store, pack[2], 104, REASON.replace("304", "104"))
    assert endings.finish(store, pack[0], "COMPLETE", [9.0, 0.5])
    assert endings.fail(store, pack[3], "CUDA error") == "failed"
    for claim in pack[4:]:
        assert endings.release(store, claim)
    store.close()
    return "six"


def test_status_list_why_and_logs_say_who_is_paused_and_behind_whom(cli: Cli, study: str) -> None:
    text = cli("status", study).stdout
    head, counts = text.splitlines()[1:3]
    assert dict(zip(head.split(), counts.split(), strict=True)) == {
        "waiting": "2", "running": "0", "paused": "2", "complete": "1", "pruned": "0", "failed": "1", "all": "6",
    }  # fmt: skip
    assert f"trial 1: {REASON}" in text
    assert "study promote six 2" in text
    found = json.loads(cli("status", study, "--json").stdout)
    assert (found["trials"]["paused"], found["trials"]["waiting"]) == (2, 2)
    assert found["paused"][0] == {"trial": 1, "state": "PAUSED", "reason": REASON, "samples": 304}
    listed = cli("list").stdout.splitlines()
    assert dict(zip(listed[1].split(), listed[2].split(), strict=True))["paused"] == "2"
    assert json.loads(cli("list", "--json").stdout)[0]["paused"] == 2
    assert f"trial 1 (paused): {REASON}" in cli("why", study).stdout
    assert "trial 1: PAUSED" in cli("logs", study, 1).stdout


def test_promoted_trials_wait_again_and_what_is_not_paused_is_refused(cli: Cli, study: str, store_url: str) -> None:
    said = cli("promote", study, 0, code=2).stderr
    assert "trial 0 of study 'six' is not paused: it is COMPLETE (paused are 1, 2)" in said
    assert "no trial in study 'six': '9'" in cli("promote", study, 1, 9, code=2).stderr
    assert "study promote six 1' lets it go on" in cli("retry", study, 1, code=2).stderr
    assert json.loads(cli("status", study, "--json").stdout)["trials"]["paused"] == 2, "nothing is half done"
    assert "2 trials of study six wait again: 1, 2" in cli("promote", study, 1, 2).stdout
    assert json.loads(cli("status", study, "--json").stdout)["trials"]["waiting"] == 4
    assert "(none is)" in cli("promote", study, 1, code=2).stderr


def test_what_was_paused_when_the_study_ended_can_still_be_promoted(cli: Cli, study: str, store_url: str) -> None:
    store = Store.open(store_url)
    study_id = store.study_id(study)
    for claim in claims.claim(store, study_id, 6, {"worker": "test"}, merging=Merging(6)):
        endings.finish(store, claim, "COMPLETE", [10.0, 0.5])
    assert paused.finish(store, study_id, None) == [1, 2]
    store.close()
    assert f"trial 1 (pruned): {REASON}" in cli("why", study).stdout
    assert "study promote six 1 2" in cli("resume", study).stdout, "nothing else waits"
    assert "1 trial of study six waits again: 2" in cli("promote", study, 2).stdout
    assert json.loads(cli("status", study, "--json").stdout)["trials"]["pruned"] == 1


def test_a_stopped_study_leaves_what_is_paused_as_it_is(cli: Cli, study: str, store_url: str) -> None:
    cli("stop", study)
    cli("resume", study)
    assert json.loads(cli("status", study, "--json").stdout)["trials"]["paused"] == 2
    assert "1 trial of study six waits again: 3" in cli("retry", study).stdout


def test_more_budget_after_the_end_pauses_again_what_was_paused_and_workers_promote_it(
    cli: Cli, study: str, store_url: str
) -> None:
    store = Store.open(store_url)
    study_id = store.study_id(study)
    for claim in claims.claim(store, study_id, 6, {"worker": "test"}, merging=Merging(6)):
        endings.finish(store, claim, "COMPLETE", [10.0, 0.5])
    assert paused.finish(store, study_id, None) == [1, 2]
    assert "study promote six 2" in cli("status", study).stdout, "what was paused can go on"
    said = cli("resume", study, "--budget", "trials=5").stdout
    assert "goes on, and 2 paused trials go on while the budget lasts, the best first" in said
    assert "worker six" in said
    found = json.loads(cli("status", study, "--json").stdout)
    assert (found["trials"]["paused"], found["trials"]["pruned"]) == (2, 0)
    assert f"trial 1 (paused): {REASON}" in cli("why", study).stdout
    ending = paused.Ending(store, study_id, store.spec(study), None)
    assert ending.step(1)
    assert json.loads(cli("status", study, "--json").stdout)["trials"]["waiting"] == 1
    assert "trial 1 (waiting): it waits for a worker" in cli("why", study, 1).stdout, "the one at the higher rung"
    (claim,) = claims.claim(store, study_id, 6, {"worker": "test"}, merging=Merging(6))
    assert endings.finish(store, claim, "COMPLETE", [10.0, 0.4])
    assert ending.step(1), "the budget is used up: the rest end"
    assert json.loads(cli("status", study, "--json").stdout)["trials"]["pruned"] == 1
    said = cli("promote", study, 2).stdout
    assert "1 trial of study six waits again: 2" in said
    assert "ended: the budget is used up: 5 of 5 trials; go on: " in said
    store.close()
