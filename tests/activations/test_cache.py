"""The activation cache: the same numbers as without, harvested once, mended when damaged, safe for several writers."""

from __future__ import annotations

import errno
import json
import multiprocessing
import random
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_model import FakeModel
from safetensors.torch import save_file
from test_stream import HOOKS, file, open_stream, run_config, same, take, way

from saeopt.activations import cache as cache_module
from saeopt.activations.cache import CACHE_VARIABLE, cache_bytes
from saeopt.activations.stream import ActivationStream
from saeopt.activations.tokens import TokenData
from saeopt.config.io import validate_run
from saeopt.config.run import RunConfig
from saeopt.errors import UserError
from saeopt.runs.tensor_file import verify

__all__ = ["file", "way"]
PER_SAMPLE = 16 * 4 * 4  # bytes of one hook point


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 10 * PER_SAMPLE)


def cached(config: RunConfig, folder: Path, **settings: object) -> RunConfig:
    section = config.activations.model_copy(update={"cache": str(folder), **settings})
    return config.model_copy(update={"activations": section})


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


@pytest.mark.parametrize("settings", [{}, {"lm_batch_size": 5}, {"shuffle_buffer_tokens": 100}])
def test_a_cached_stream_gives_the_same_bits_cold_warm_and_resumed(
    file: Path, tmp_path: Path, way: bool, settings: dict[str, int]
):
    plain = run_config(file, streaming=way, n_train_samples=61, **settings)
    config = cached(plain, tmp_path / "cache")
    wanted = take(open_stream(plain), 40)  # beyond what the cache holds
    cold, warm = FakeModel(), FakeModel()
    assert all(same(a, b) for a, b in zip(take(open_stream(config, cold), 40), wanted, strict=True))
    harvested = sum(cold.sequences)
    assert all(same(a, b) for a, b in zip(take(open_stream(config, warm), 40), wanted, strict=True))
    assert harvested >= 80
    assert sum(warm.sequences) <= 80 - 60 + 10  # only what lies beyond the cache
    stream = open_stream(plain)
    for _ in range(11):
        next(stream)
    resumed = open_stream(config, start=22, cursor=stream.cursor())
    stream.close()
    assert all(same(a, b) for a, b in zip(take(resumed, 20), wanted[11:], strict=False))
    per_sample = cache_bytes(1, 16, [4, 4], torch.float32)
    assert sum(p.stat().st_size for p in shards(tmp_path)) == pytest.approx(61 * per_sample, rel=0.35)


def test_ranks_read_their_own_rows(file: Path, tmp_path: Path):
    plain = run_config(file, n_train_samples=40)
    for rank in range(2):
        wanted = take(open_stream(plain, rank=rank, world=2), 9)
        got = take(open_stream(cached(plain, tmp_path), rank=rank, world=2), 9)
        assert all(same(a, b) for a, b in zip(got, wanted, strict=True))


def test_hook_points_are_added_to_a_cache_without_harvesting_the_others_again(file: Path, tmp_path: Path):
    config = cached(run_config(file, n_train_samples=20), tmp_path)
    model = FakeModel()
    take(ActivationStream(model, TokenData.load(config.data, model), ["a"], config), 10)
    asked: list[list[str]] = []
    plain = model.activations
    model.activations = lambda tokens, hooks, compiled: asked.append(hooks) or plain(tokens, hooks)  # type: ignore[method-assign]
    batches = take(ActivationStream(model, TokenData.load(config.data, model), HOOKS, config), 10)
    assert {tuple(hooks) for hooks in asked} == {("b",)}
    assert all(torch.equal(2 * batch.x["a"], batch.x["b"]) for batch in batches)


class OneWideHook(FakeModel):
    def width(self, hook: str) -> int:
        return 8 if hook == "b" else 4

    def activations(self, tokens_BT: torch.Tensor, hooks: list[str], compiled: bool = False) -> dict:
        found = super().activations(tokens_BT, hooks)
        return {hook: torch.cat([x, x], -1) if hook == "b" else x for hook, x in found.items()}


def test_a_wider_hook_point_beside_it_does_not_make_a_shard_look_damaged(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = cached(run_config(file, n_train_samples=40), tmp_path)
    for again in range(2):
        for hooks in (["a"], HOOKS):  # shards of ten samples and of five
            model = OneWideHook()
            stream = ActivationStream(model, TokenData.load(config.data, model), hooks, config)
            for batch in take(stream, 20):
                assert batch.x["a"].shape == (32, 4)
            assert sum(model.sequences) == (0 if again else 40)
    assert "other samples" not in caplog.text


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_shard_is_harvested_again(file: Path, tmp_path: Path, damage: str):
    config = cached(run_config(file, n_train_samples=40), tmp_path)
    wanted = take(open_stream(config), 15)
    victim = shards(tmp_path)[1]
    content = bytearray(victim.read_bytes())
    content[-9] ^= 0xFF
    victim.write_bytes(content if damage == "flip" else content[:-50])
    assert all(same(a, b) for a, b in zip(take(open_stream(config), 15), wanted, strict=True))
    assert len(victim.read_bytes()) == len(content)


def test_a_disk_that_fills_up_ends_the_cache_and_not_the_run(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    plain = run_config(file, n_train_samples=40)
    wanted = take(open_stream(plain), 20)
    room = [3]  # the first shard of both hook points, and half of the second

    def save(*args: object, **kwargs: object) -> None:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(*args, **kwargs)

    monkeypatch.setattr("safetensors.torch.save_file", save)
    model = FakeModel()
    got = take(open_stream(cached(plain, tmp_path), model), 20)
    assert all(same(a, b) for a, b in zip(got, wanted, strict=True))
    assert sum(model.sequences) <= 40 + 10  # nothing is harvested for both hook points one after the other
    assert caplog.text.count("the disk is full") == 1
    assert len(shards(tmp_path)) == 3


def test_a_cache_that_cannot_be_made_is_one_line_and_leaves_no_thread(file: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    before = threading.active_count()
    with pytest.raises(UserError, match=r"'activations\.cache': .*file"):
        open_stream(cached(run_config(file), tmp_path / "file"))
    assert threading.active_count() == before


def test_other_tokens_and_other_weights_never_share_a_cache(file: Path, tmp_path: Path):
    config = cached(run_config(file, n_train_samples=20), tmp_path)
    take(open_stream(config), 5)
    n = len(shards(tmp_path))
    other = FakeModel()
    other.table = other.table + 1
    old, new = (take(open_stream(config, model), 1)[0].x["a"] for model in (FakeModel(), other))
    assert not torch.equal(old, new)
    file.write_text(file.read_text().replace('"w', '"w5 w'))
    take(open_stream(config), 5)
    assert len(shards(tmp_path)) > 2 * n
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 3


def test_the_size_is_known_beforehand_and_kept(file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    limit = 25 * 2 * PER_SAMPLE
    config = cached(run_config(file, n_train_samples=100), tmp_path, cache_max_gb=limit / 2**30)
    plain = take(open_stream(run_config(file, n_train_samples=100)), 45)
    assert all(same(a, b) for a, b in zip(take(open_stream(config), 45), plain, strict=True))
    stored = sum(p.stat().st_size for p in shards(tmp_path))
    assert 0 < stored <= limit + 1000 * len(shards(tmp_path))
    assert len(shards(tmp_path)) == 2 * 2  # two shards of ten samples, two hook points


def test_hook_points_of_several_runs_share_what_is_allowed(file: Path, tmp_path: Path):
    def read(hooks: list[str], gb: float) -> int:
        config = cached(run_config(file, n_train_samples=60), tmp_path, cache_max_gb=gb)
        model = FakeModel()
        take(ActivationStream(model, TokenData.load(config.data, model), hooks, config), 30)
        return sum(model.sequences)

    limit = 78 * PER_SAMPLE / 2**30
    assert [read(["a"], limit) for _ in range(2)] == [60, 0]
    assert [read(["b"], limit) for _ in range(2)] == [60, 50]  # one shard of ten fits beside them
    assert [read(HOOKS, limit) for _ in range(2)] == [50, 50]
    assert sum(p.stat().st_size for p in shards(tmp_path)) <= 78 * PER_SAMPLE + 1000 * len(shards(tmp_path))
    assert read(HOOKS, 1.0) == 50


def test_what_others_have_cached_is_no_room_for_this_run(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = cached(run_config(file, n_train_samples=60), tmp_path)
    model = FakeModel()
    take(ActivationStream(model, TokenData.load(config.data, model), ["a"], config), 30)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=45 * PER_SAMPLE))
    stream = ActivationStream(model, TokenData.load(config.data, model), ["b"], config)
    take(stream, 30)
    assert len(shards(tmp_path)) == 6 + 2  # half of 45 samples: two shards


def test_a_stored_precision_rounds_and_changes_nothing_else(file: Path, tmp_path: Path):
    plain = run_config(file, n_train_samples=20)
    got = take(open_stream(cached(plain, tmp_path, dtype="bfloat16")), 5)
    for batch, wanted in zip(got, take(open_stream(plain), 5), strict=True):
        assert torch.equal(batch.x["a"], wanted.x["a"].bfloat16())
        assert torch.equal(batch.keep_N, wanted.keep_N)


def test_auto_means_the_folder_that_a_worker_names(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = run_config(file, n_train_samples=20)
    take(open_stream(config), 2)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "study"))
    take(open_stream(config), 2)
    assert shards(tmp_path / "study")
    off = config.model_copy(update={"activations": config.activations.model_copy(update={"cache": "off"})})
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "none"))
    take(open_stream(off), 2)
    assert not (tmp_path / "none").exists()


def _write(raw: dict[str, object], folder: str, out: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    cache_module.SHARD_BYTES = 10 * PER_SAMPLE
    torch.set_num_threads(1)
    model = FakeModel()
    batches = take(open_stream(cached(validate_run(raw, "test"), Path(folder)), model), 20)
    out.put((sum(model.sequences), [b.x["b"].sum().item() for b in batches]))


def test_several_processes_harvest_once_between_them(file: Path, tmp_path: Path):
    config = run_config(file, n_train_samples=40)
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    workers = [
        context.Process(target=_write, args=(config.model_dump(mode="json"), str(tmp_path / "c"), out))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    found = [out.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    wanted = [b.x["b"].sum().item() for b in take(open_stream(config), 20)]
    assert [values for _, values in found] == [wanted, wanted]
    assert sum(n for n, _ in found) == 40
    assert not list((tmp_path / "c").rglob("*.tmp"))


def test_a_writer_that_is_killed_at_any_moment_leaves_no_readable_half(file: Path, tmp_path: Path):
    plain = run_config(file, n_train_samples=400)
    wanted = take(open_stream(plain), 200)
    folder, rng = tmp_path / "c", random.Random(1)
    context = multiprocessing.get_context("fork")
    for _ in range(8):
        writer = context.Process(target=lambda: take(open_stream(cached(plain, folder)), 200))
        before = len(shards(folder))
        writer.start()
        while writer.is_alive() and len(shards(folder)) < before + rng.randrange(1, 12):
            time.sleep(rng.random() / 200)
        writer.kill()
        writer.join()
        for shard in shards(folder):
            verify(shard)
    model = FakeModel()
    written = len(shards(folder)) // 2
    assert 0 < written < 40
    got = take(open_stream(cached(plain, folder), model), 200)
    assert all(same(a, b) for a, b in zip(got, wanted, strict=True))
    assert sum(model.sequences) <= 400 - 10 * (written - 1)  # what was written is not harvested again
    assert not list(folder.rglob("*.tmp"))


def test_a_writer_goes_on_behind_the_shards_of_another_without_beginning_anew(
    file: Path, tmp_path: Path, way: bool, monkeypatch: pytest.MonkeyPatch
):
    plain = run_config(file, streaming=way, n_train_samples=80)
    wanted = take(open_stream(plain), 40)
    one, other = (open_stream(cached(plain, tmp_path)) for _ in range(2))
    begun: list[int] = []
    train = TokenData.train

    def counted(self: TokenData, start: int, *args: Any, **kwargs: Any) -> Any:
        begun.append(start)
        return train(self, start, *args, **kwargs)

    monkeypatch.setattr(TokenData, "train", counted)
    for i in range(40):  # they take turns in harvesting a shard
        pair = (one, other) if i // 5 % 2 else (other, one)
        assert all(same(next(stream), wanted[i]) for stream in pair)
    one.close()
    other.close()
    assert begun == [0, 10]


def test_what_a_killed_writer_left_half_written_goes(file: Path, tmp_path: Path):
    config = cached(run_config(file, n_train_samples=40), tmp_path)
    take(open_stream(config), 5)
    whole = shards(tmp_path)[0]
    left, others = (whole.with_name(f".{number:06}.safetensors.99-0.tmp") for number in (1, 7))
    for path in (left, others):
        path.write_bytes(b"half")
    take(open_stream(config), 20)
    assert not left.exists()
    assert others.exists()  # of a shard that nobody has written yet: its writer may be alive


def test_shards_hold_what_they_say(file: Path, tmp_path: Path):
    from saeopt.runs.tensor_file import read_metadata

    config = cached(run_config(file, n_train_samples=25), tmp_path)
    take(open_stream(config), 13)
    samples = [json.dumps(read_metadata(p)["slots"]) for p in shards(tmp_path) if p.parent.name == "a"]
    assert samples == ["[0, 10]", "[10, 10]", "[20, 6]"]


def test_a_file_that_has_changed_has_a_cache_of_its_own(file: Path, way: bool):
    config = run_config(file, streaming=way, n_train_samples=20)
    before = TokenData.load(config.data, FakeModel()).fingerprint()
    assert TokenData.load(config.data, FakeModel()).fingerprint() == before
    lines = file.read_text().splitlines()
    assert len(lines) > 30
    file.write_text("\n".join([*lines[:-2], lines[-1], lines[-2]]) + "\n")  # neither its length nor its beginning
    assert TokenData.load(config.data, FakeModel()).fingerprint() != before


def test_a_shard_that_cannot_be_read_is_an_error_and_stays(file: Path, tmp_path: Path):
    """Others may be able to read it: to harvest it again would replace it."""
    config = cached(run_config(file, n_train_samples=20), tmp_path / "cache")
    take(open_stream(config), 4)
    first = shards(tmp_path / "cache")[0]
    first.unlink()
    first.mkdir()  # opening it fails as opening another user's file does
    with pytest.raises(UserError, match=r"'activations.cache'.*cannot be read"):
        take(open_stream(config), 4)
    assert first.is_dir()
