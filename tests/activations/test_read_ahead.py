"""Reading the cache ahead: threads read and verify, the caller's alone uses the model, nothing is left over."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch
from fake_model import FakeModel
from test_cache import cached, shards, small_shards
from test_stream import HOOKS, file, open_stream, run_config, same, take

from saeopt.activations import cache as cache_module
from saeopt.runs.tensor_file import read_metadata

__all__ = ["file", "small_shards"]
CONSUMER = threading.current_thread().name
READERS = "saeopt-cache"


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Which thread read and verified which file."""
    seen: list[tuple[str, str]] = []
    plain = cache_module.read_tensor

    def read_tensor(path: Path, *rest: object) -> torch.Tensor:
        seen.append((threading.current_thread().name, f"{path.parent.name}/{path.stem}"))
        return plain(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(cache_module, "read_tensor", read_tensor)
    return seen


def test_only_the_first_shard_is_verified_by_the_consumer(file: Path, tmp_path: Path, verified: list[tuple[str, str]]):
    config = cached(run_config(file, n_train_samples=60), tmp_path)
    wanted = take(open_stream(config), 30)
    verified.clear()
    assert all(same(a, b) for a, b in zip(take(open_stream(config), 30), wanted, strict=True))
    assert len({name for _, name in verified}) == len(verified) == 2 * 6
    assert {name for thread, name in verified if thread == CONSUMER} == {"a/000000", "b/000000"}
    assert all(thread.startswith(READERS) for thread, name in verified if not name.endswith("000000"))


def test_the_reader_never_uses_the_model(file: Path, tmp_path: Path):
    config = cached(run_config(file, n_train_samples=60), tmp_path)
    model, threads = FakeModel(), set()
    plain = model.activations
    model.activations = (  # type: ignore[method-assign]
        lambda tokens, hooks, compiled: threads.add(threading.current_thread().name) or plain(tokens, hooks)
    )
    take(open_stream(config, model), 35)
    assert threads == {CONSUMER}
    assert sum(model.sequences) == 60 + 10


@pytest.mark.parametrize("world", [1, 2])
def test_shards_that_vanish_or_break_ahead_are_harvested_once(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, world: int
):
    plain = run_config(file, n_train_samples=80)
    config = cached(plain, tmp_path)
    wanted = take(open_stream(plain, rank=world - 1, world=world), 20)
    take(open_stream(config, rank=world - 1, world=world), 20)
    broken, gone = (p for p in shards(tmp_path) if p.parent.name == "b" and p.stem[-1] in "12")
    samples = sum(read_metadata(p)["slots"][1] for p in (broken, gone))  # type: ignore[index, misc]
    content = bytearray(broken.read_bytes())
    content[-9] ^= 0xFF
    broken.write_bytes(content)
    gone.unlink()
    model = FakeModel()
    with caplog.at_level(logging.WARNING, "saeopt"):
        got = take(open_stream(config, model, rank=world - 1, world=world), 20)
    assert all(same(a, b) for a, b in zip(got, wanted, strict=True))
    assert sum(model.sequences) == samples
    assert sum("harvested again" in record.getMessage() for record in caplog.records) == 1


def test_what_the_reader_fails_at_is_raised_where_it_is_asked_for(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = cached(run_config(file, n_train_samples=60), tmp_path)
    take(open_stream(config), 30)
    plain = cache_module.read_tensor

    def read_tensor(path: Path, *rest: object) -> torch.Tensor:
        if path.stem.endswith("2"):
            raise OSError(5, "Input/output error", str(path))
        return plain(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(cache_module, "read_tensor", read_tensor)
    stream = open_stream(config)
    for _ in range(10):
        next(stream)
    with pytest.raises(OSError, match="Input/output error"):
        next(stream)
    stream.close()


def test_hook_points_that_leave_are_read_ahead_no_longer(file: Path, tmp_path: Path, verified: list[tuple[str, str]]):
    config = cached(run_config(file, n_train_samples=80), tmp_path)
    take(open_stream(config), 40)
    verified.clear()
    stream = open_stream(config)
    first = next(stream)
    stream.keep_only(["a"])
    rest = take(stream, 39)
    assert set(first.x) == set(HOOKS)
    assert all(set(batch.x) == {"a"} for batch in rest)
    assert {name for _, name in verified} >= {f"a/{i:06}" for i in range(8)}
    assert {name for _, name in verified if name.startswith("b")} <= {f"b/{i:06}" for i in range(3)}


def test_closing_leaves_no_thread_behind(file: Path, tmp_path: Path):
    config = cached(run_config(file, n_train_samples=60), tmp_path)
    take(open_stream(config), 30)
    before = set(threading.enumerate())
    stream = open_stream(config)
    for _ in range(7):
        batch = next(stream)
    assert any(thread.name.startswith(READERS) for thread in set(threading.enumerate()) - before)
    copy = batch.x["a"].clone()
    stream.close()
    stream.close()
    assert set(threading.enumerate()) <= before
    assert torch.equal(batch.x["a"], copy)


def test_a_shard_with_any_damaged_byte_is_harvested_again_or_right(file: Path, tmp_path: Path):
    config = cached(run_config(file, n_train_samples=20), tmp_path)
    wanted = take(open_stream(config), 10)
    shard = next(p for p in shards(tmp_path) if p.parent.name == "a")
    content = shard.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for at in range(0, header, 7):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        shard.write_bytes(damaged)
        assert all(same(a, b) for a, b in zip(take(open_stream(config), 3), wanted, strict=False)), at
