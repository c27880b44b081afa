"""Workers of a study of several packs share one activation cache; a study of one pack has none."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from saeopt.workers.on_device import share_activations


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAEOPT_ACTIVATION_CACHE", "")
    monkeypatch.delenv("SAEOPT_ACTIVATION_CACHE")


def spec(**fields: Any) -> Any:
    sampler = SimpleNamespace(type="random")
    given = {"runs": Path("out/s"), "max_trials": None, "sampler": sampler, "space": {}, "start_from": None}
    return SimpleNamespace(**given | fields)


def test_more_trials_than_a_pack_holds_share_a_cache_below_the_study() -> None:
    share_activations(spec(), pack=4, trials=9)
    assert Path(os.environ["SAEOPT_ACTIVATION_CACHE"]) == Path("out/s/activations")


def test_trials_that_a_sampler_has_yet_to_propose_count() -> None:
    share_activations(spec(max_trials=40), pack=8, trials=0)
    assert "SAEOPT_ACTIVATION_CACHE" in os.environ


def test_one_pack_needs_no_cache() -> None:
    share_activations(spec(max_trials=8), pack=8, trials=8)
    assert "SAEOPT_ACTIVATION_CACHE" not in os.environ
