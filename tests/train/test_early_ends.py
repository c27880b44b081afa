"""Runs that end before they train: no empty folder stays, in whatever thread and however they end."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from saeopt import train, training
from saeopt.config import validate_run
from saeopt.training import progress
from saeopt.training.progress import Interrupt
from saeopt.worker import stop_on_signals


def config(tmp_path: Path, data: Path, model: Path) -> Any:
    raw = {
        "tlens_model_path": str(model), "lr_schedule": "constant", "save_dir": str(tmp_path / "out"),
        "legacy_scaling": False,
        "data": {"dataset_name": str(data), "is_tokenized": False, "column_name": "text"},
        "saes": {"sae_type": "relu", "sae_positions": "blocks.1.hook_resid_pre"},
    }  # fmt: skip
    return validate_run(raw, "test")


@pytest.mark.parametrize("error", [RuntimeError("no such kernel"), KeyboardInterrupt()])
def test_an_unexpected_error_leaves_no_empty_run_folder(
    error: BaseException, tmp_path: Path, tiny_text: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def broken(plans: list[Any], *_: object) -> None:
        seen.extend(p for p in (tmp_path / "out").iterdir())
        raise error

    monkeypatch.setattr(training, "train_pack", broken, raising=False)
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(type(error)):
            train._run(config(tmp_path, tiny_text, tiny_model_dir), None, "cpu")
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert len(seen) == 1
    assert not (tmp_path / "out").exists()


def test_a_signal_before_training_leaves_no_empty_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(progress, "leave", codes.append)
    for name in ("empty", "full"):
        interrupt = Interrupt()
        interrupt.unused.append(tmp_path / name)
        (tmp_path / name).mkdir()
        if name == "full":
            (tmp_path / name / "metrics.jsonl").write_text("")
        interrupt.training = True  # a checkpoint is written, and then nothing is unused
        interrupt._handle(signal.SIGTERM, None)
        assert (tmp_path / name).exists()
        interrupt.training, interrupt.signum = False, None
        interrupt._handle(signal.SIGTERM, None)
    assert codes == [143, 143]
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_runs_and_workers_start_in_any_thread() -> None:
    errors: list[BaseException] = []

    def start() -> None:
        try:
            Interrupt().install()
            stop_on_signals()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert errors == []
