"""Runs that go on: damaged and unreadable checkpoints, kills within the end, folders that others have taken."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from test_loop import plan, weights

from saeopt.errors import UserError
from saeopt.runs.folder import RunFolder, resume_point
from saeopt.saes.registry import get_sae
from saeopt.training import Observer, train_pack
from saeopt.training.runtime import Runtime

HOOK = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def runtime():
    return Runtime("cpu")


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(make_config, runtime, tmp_path, caplog):
    config = make_config()
    train_pack([plan(config, tmp_path, "a")], runtime)
    wanted = weights(tmp_path / "a")
    folder = RunFolder(tmp_path / "a")
    damaged = folder.weights_path(256)
    damaged.write_bytes(damaged.read_bytes()[:-7])
    assert resume_point(folder.path) == 192
    result = train_pack([plan(config, tmp_path, "a", resume=True)], runtime)["a"]
    assert result.status == "finished"
    found = weights(tmp_path / "a")
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


def test_a_run_that_starts_over_keeps_its_new_states_beside_damaged_later_ones(make_config, runtime, tmp_path):
    config = make_config()
    train_pack([plan(config, tmp_path, "a")], runtime)
    folder = RunFolder(tmp_path / "a")
    for samples in folder.states():
        folder.state_path(samples).write_bytes(b"damaged")
    (folder.path / ".samples_64.safetensors.1-1.tmp").write_bytes(b"half")

    class Interrupt(Observer):
        def should_interrupt(self) -> bool:
            return True

    train_pack([plan(config, tmp_path, "a", resume=True)], runtime, Interrupt())
    assert resume_point(folder.path) == 16
    assert not list(folder.path.glob(".*.tmp"))


def content(folder):
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_finished_run_that_is_resumed_gives_its_result_and_writes_nothing(make_config, runtime, tmp_path):
    first = train_pack([plan(make_config(), tmp_path, "a")], runtime)["a"]
    before = content(tmp_path / "a")
    again = train_pack([plan(make_config(), tmp_path, "a", resume=True)], runtime)["a"]
    assert content(tmp_path / "a") == before
    assert again == first


@pytest.mark.parametrize("written", ["checkpoint", "evaluation", "a row", "rows"])
def test_a_run_that_was_killed_within_its_end_has_each_row_once(make_config, runtime, tmp_path, written):
    hooks = ["blocks.0.hook_resid_pre", HOOK]
    config = make_config(trackers="tensorboard", **{"saes.sae_positions": hooks})
    whole = train_pack([plan(config, tmp_path, "a")], runtime)["a"]
    folder = RunFolder(tmp_path / "a")
    rows, evaluation = folder.metrics_path.read_text(), folder.evaluation_path.read_text()
    lines = rows.splitlines(keepends=True)
    folder.write_status("running", 0, None)
    if written in ("checkpoint", "evaluation", "a row"):
        folder.metrics_path.write_text("".join(lines[: -1 if written == "a row" else -2]))
    if written == "checkpoint":
        folder.evaluation_path.unlink()
    again = train_pack([plan(config, tmp_path, "a", resume=True)], runtime)["a"]
    assert folder.metrics_path.read_text() == rows
    assert folder.evaluation_path.read_text() == evaluation
    assert (folder.status()["status"], again.evaluation) == ("finished", whole.evaluation)


@pytest.mark.parametrize("kind", ["log", "eval", "diverged"])
def test_a_trial_that_was_killed_after_its_stop_is_still_stopped(make_config, runtime, tmp_path, kind):
    class Stop(Observer):
        def on_log(self, name, samples, metrics):
            return "hopeless" if kind == "log" and samples >= 128 else None

        def on_eval(self, name, samples, metrics):
            return "hopeless" if kind == "eval" and samples >= 128 else None

    changes = {"lr": 1e30, "max_grad_norm": None} if kind == "diverged" else {}
    config = make_config(eval_every_n_samples=96, **changes)
    first = train_pack([plan(config, tmp_path, "a")], runtime, Stop())["a"]
    assert first.status == ("diverged" if kind == "diverged" else "stopped")
    before = content(tmp_path / "a")
    assert train_pack([plan(config, tmp_path, "a", resume=True)], runtime)["a"] == first
    assert content(tmp_path / "a") == before
    RunFolder(tmp_path / "a").write_status("running", 0, None)
    assert train_pack([plan(config, tmp_path, "a", resume=True)], runtime)["a"] == first
    assert RunFolder(tmp_path / "a").status()["reason"] == first.reason


def test_a_trial_that_is_no_longer_its_own_leaves_no_end_in_its_folder(make_config, runtime, tmp_path):
    class Lose(Observer):
        at = 0

        def progress(self, samples, total, tokens_per_s):
            self.at = samples

        def lost(self, name):
            return self.at == 128

    config = make_config(save_every_n_samples=96)
    assert train_pack([plan(config, tmp_path, "a")], runtime, Lose())["a"].status == "lost"
    assert RunFolder(tmp_path / "a").weights() == [96]
    assert RunFolder(tmp_path / "a").status()["status"] == "running"


def test_a_checkpoint_that_cannot_be_read_is_never_replaced(make_config, runtime, tmp_path):
    """It may be whole: neither an older one nor a new start takes its place."""
    mem = Path("/proc/self/mem")  # opens, and gives EIO when it is read
    if not mem.exists():
        pytest.skip("no /proc/self/mem on this system")
    config = make_config(**{"data.n_train_samples": 128})
    train_pack([plan(config, tmp_path, "a")], runtime)
    folder = RunFolder(tmp_path / "a")
    folder.write_status("running", 128, None)  # else there is nothing left to do
    again = plan(config, tmp_path, "a", resume=True)
    for end in (folder.state_path(128), folder.weights_path(128), folder.evaluation_path):
        end.unlink()
    folder.write_status("interrupted", 64, None)
    before = {p.name: p.read_bytes() for p in folder.path.iterdir() if p.is_file()}
    for path in (folder.state_path(64), folder.weights_path(64), folder.metrics_path, folder.status_path):
        content = path.read_bytes()
        path.unlink()
        path.symlink_to(mem)
        read = folder.status if path == folder.status_path else partial(train_pack, [again], runtime)
        with pytest.raises(UserError, match=f"{path.name}: cannot be read: Input/output error"):
            read()
        path.unlink()
        path.write_bytes(content)
    assert {p.name: p.read_bytes() for p in folder.path.iterdir() if p.is_file()} == before
    with pytest.raises(UserError, match="state: cannot be read"):
        _unlistable(folder.path / "state", lambda: resume_point(folder.path))


def _unlistable(folder, action):
    """Run `action` while a folder cannot be listed: as another user if this is root, whom modes do not bind."""
    user = os.geteuid()
    folder.chmod(0)
    try:
        if user == 0:
            for parent in [folder, *folder.parents][1:-2]:
                parent.chmod(parent.stat().st_mode | 0o055)
            os.seteuid(65534)
        action()
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


def test_exhausted_memory_is_no_damaged_checkpoint(make_config, runtime, tmp_path, monkeypatch):
    config = make_config(**{"data.n_train_samples": 128})
    train_pack([plan(config, tmp_path, "a")], runtime)

    def exhausted(*_args, **_kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(get_sae("relu"), "load_state_dict", exhausted)
    with pytest.raises(RuntimeError, match="allocate"):
        train_pack([plan(config, tmp_path, "a", resume=True)], runtime)
