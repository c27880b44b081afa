from __future__ import annotations

import logging
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from saeopt.config import validate_run
from saeopt.console import log
from saeopt.errors import UserError
from saeopt.training import loggers
from saeopt.training.loggers import TrackerSink, check_sinks, open_sinks


def config(**top: Any) -> Any:
    return validate_run(
        {
            "tlens_model_name": "m",
            "data": {"dataset_name": "x", "n_train_samples": 100},
            "saes": {"sae_type": "relu", "sae_positions": "hook_embed"},
            **top,
        },
        "test",
    )


@pytest.fixture(autouse=True)
def _plain_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "propagate", True)  # caplog listens at the root


def train(sinks: list[Any]) -> None:
    for sink in sinks:
        sink.log(10, {"hook_embed": {"loss": 1.5, "l0": 3.0}})
        sink.log(20, {"hook_embed": {"loss": 1.0, "l0": 2.0}})
        sink.finish("finished")


def until_it_holds(path: Path, text: bytes) -> bytes:
    """The service's own process writes the file a little later."""
    end = time.monotonic() + 20
    while text not in (content := path.read_bytes()) and time.monotonic() < end:
        time.sleep(0.05)
    return content


def test_there_are_no_sinks_by_default(tmp_path: Path) -> None:
    assert open_sinks(config(), tmp_path, "name") == []


def test_tensorboard_files_hold_every_metric(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(open_sinks(config(trackers=["tensorboard"]), tmp_path, "name"))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("hook_embed/loss")] == [(10, 1.5), (20, 1.0)]


def test_two_trials_of_a_process_have_wandb_runs_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    both = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        both += open_sinks(config(wandb_project="p"), tmp_path / name, name)
    for sink in both:
        sink.log(10, {"hook_embed": {"loss": 1.5}})
    for sink in both:
        sink.finish("finished")
    for name in ("a", "b"):
        run_id = (tmp_path / name / "wandb_run_id").read_text().strip()
        files = list((tmp_path / name / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
        assert len(files) == 1
        content = until_it_holds(files[0], b"hook_embed/loss")
        assert b"hook_embed/loss" in content
        assert name.encode() in content


def test_unreachable_wandb_gives_one_warning_and_an_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as server:  # accepts connections and never answers
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(loggers, "CONNECT_SECONDS", 0.3)
        with caplog.at_level(logging.WARNING):
            train(open_sinks(config(wandb_project="p"), tmp_path, "name"))
    assert [r.levelname for r in caplog.records if "W&B" in r.getMessage()] == ["WARNING"]
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert "k" * 40 not in caplog.text


def test_a_service_that_hangs_does_not_hold_up_training(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loggers, "INTERRUPTED_SECONDS", 0.1)

    def hang() -> Any:
        time.sleep(30)

    start = time.monotonic()
    sink = TrackerSink("slow service", hang)
    sink.log(1, {"h": {"loss": 1.0}})
    sink.finish("interrupted")
    assert time.monotonic() - start < 15
    assert "does not answer" in caplog.text


def test_a_sink_that_fails_warns_once_and_goes_quiet(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def log(self, values: dict[str, float], step: int) -> None:
            raise RuntimeError("quota")

    sink = TrackerSink("service", lambda: Broken())  # type: ignore[arg-type, return-value]
    for i in range(3):
        sink.log(i, {"h": {"loss": 1.0}})
    sink.finish("finished")
    assert caplog.text.count("quota") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wandb_project": "a/b"}, "'wandb_project': W&B refuses it: Invalid project name 'a/b'"),
        ({"wandb_project": "p" * 129}, "'wandb_project'.*exceeded 128 characters"),
        ({"wandb_project": "p", "wandb_tags": ["ok", "t" * 65]}, "'wandb_tags'.*is 65 characters"),
        ({"trackers": "wandb", "wandb_tags": ["t" * 65]}, "'wandb_tags'.*is 65 characters"),
    ],
)
def test_what_wandb_refuses_is_told_before_anything_trains(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_sinks(config(**changes))


@pytest.mark.parametrize("name", ["WANDB_MODE", "WANDB_BASE_URL"])
def test_settings_of_wandb_in_the_environment_are_checked_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "sometimes")
    check_sinks(config(wandb_tags=["t" * 65]))  # no W&B is asked for
    loggers._check_wandb.cache_clear()
    with pytest.raises(UserError, match=f"{name}: W&B refuses it"):
        check_sinks(config(wandb_project="p"))
