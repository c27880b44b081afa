"""The stream: the same bits from any start, whatever is read ahead; only what was consumed is in the cursor."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import pytest
import torch
from fake_model import BOS, EOS, FakeModel, data_config

from saeopt.activations import packing, sources
from saeopt.activations.masks import keep_mask, norm_limit
from saeopt.activations.stream import ActivationStream, Batch
from saeopt.activations.tokens import TokenData
from saeopt.config.io import validate_run
from saeopt.config.run import RunConfig
from saeopt.errors import UserError

HOOKS = ["a", "b"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": " ".join(f"w{3 + (7 * i + k) % 900}" for k in range(i % 23))})
                              for i in range(80)))  # fmt: skip
    return path


@pytest.fixture(params=["table", "stream"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(packing, "UNIT_DOCUMENTS", 16)
    monkeypatch.setattr(sources, "SMALL_FILES", 0)
    return request.param == "stream"


def run_config(file: Path, lm_batch_size: int | None = None, **data: object) -> RunConfig:
    section = data_config(file, **{"train_batch_size": 2, **data}).model_dump()
    saes = {"sae_type": "relu", "sae_positions": HOOKS}
    raw = {"tlens_model_path": "x", "lr_schedule": "constant", "data": section, "saes": saes}
    return validate_run({**raw, "lm_batch_size": lm_batch_size}, "test")


def open_stream(config: RunConfig, model: FakeModel | None = None, **where: object) -> ActivationStream:
    model = model or FakeModel()
    return ActivationStream(model, TokenData.load(config.data, model), HOOKS, config, **where)


def take(stream: ActivationStream, n: int) -> list[Batch]:
    found = [next(stream) for _ in range(n)]
    stream.close()
    return found


def same(one: Batch, other: Batch) -> bool:
    fields = [(b.first_sample, b.n_samples, b.tokens_per_sample) for b in (one, other)]
    tensors = [(*(b.x[h] for h in HOOKS), b.keep_N) for b in (one, other)]
    return fields[0] == fields[1] and all(torch.equal(s, t) for s, t in zip(*tensors, strict=True))


@pytest.mark.parametrize("settings", [{}, {"lm_batch_size": 7}, {"lm_batch_size": 1}, {"shuffle_buffer_tokens": 150}])
def test_a_stream_that_resumes_anywhere_gives_the_same_bits(file: Path, way: bool, settings: dict[str, int]):
    config = run_config(file, streaming=way, **settings)
    whole = open_stream(config)
    batches, cursors = [], []
    for _ in range(40):
        batches.append(next(whole))
        cursors.append(json.loads(json.dumps(whole.cursor())))
    whole.close()
    for consumed in (1, 4, 5, 9, 31):
        resumed = open_stream(config, start=2 * consumed, cursor=cursors[consumed - 1])
        assert all(same(a, b) for a, b in zip(take(resumed, 6), batches[consumed:], strict=False))


def test_the_language_models_batch_does_not_change_what_comes_out(file: Path):
    model = FakeModel()
    small, large = (run_config(file, lm_batch_size=n, train_batch_size=3) for n in (2, 12))
    batches = take(open_stream(small), 9)
    assert all(same(a, b) for a, b in zip(take(open_stream(large, model), 9), batches, strict=True))
    assert model.sequences[:2] == [12, 12]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_each_micro_batch_in_order(file: Path, way: bool, world: int):
    alone = take(open_stream(run_config(file, streaming=way, train_batch_size=2 * world)), 5)
    config = run_config(file, streaming=way, train_batch_size=2)
    ranks = [take(open_stream(config, rank=r, world=world), 5) for r in range(world)]
    for i, batch in enumerate(alone):
        parts = [rank[i] for rank in ranks]
        assert torch.equal(torch.cat([p.x["b"] for p in parts]), batch.x["b"])
        assert torch.equal(torch.cat([p.keep_N for p in parts]), batch.keep_N)
        assert [p.first_sample for p in parts] == [batch.first_sample + 2 * r for r in range(world)]


def test_rows_belong_to_their_samples_and_tokens(file: Path):
    config, model = run_config(file), FakeModel()
    stream = open_stream(config, model)
    tokens = TokenData.load(config.data, model).calibration(20)
    for batch in take(stream, 10):
        rows_bT = tokens[batch.first_sample : batch.first_sample + batch.n_samples]
        assert torch.equal(batch.x["a"], model.activations(rows_bT, ["a"])["a"].flatten(0, 1))
        assert torch.equal(batch.keep_N, keep_mask(rows_bT, model.special_ids))
        assert batch.keep_N.sum() < rows_bT.numel()


def test_the_shuffle_buffer_holds_the_same_tokens_in_another_order(file: Path):
    plain = take(open_stream(run_config(file)), 10)
    shuffled = take(open_stream(run_config(file, shuffle_buffer_tokens=5 * 2 * 16)), 10)
    for block in (slice(0, 5), slice(5, 10)):
        a, b = (torch.cat([x.x["a"] for x in s[block]]) for s in (plain, shuffled))
        assert not torch.equal(a, b)
        assert torch.equal(a.sort(0).values, b.sort(0).values)
        x, keep = (torch.cat([s.x["a"] if f == "x" else s.keep_N for s in shuffled[block]]) for f in "xk")
        y, kept = (torch.cat([s.x["a"] if f == "x" else s.keep_N for s in plain[block]]) for f in "xk")
        assert torch.equal(x[keep].sort(0).values, y[kept].sort(0).values)  # the mask moves with its tokens


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("world", "buffer"), [(1, 150), (1, 10_000), (2, 150), (2, 10_000)])
def test_a_shuffled_run_trains_on_each_of_its_own_tokens_once(
    file: Path, way: bool, tmp_path: Path, world: int, buffer: int, cached: bool
):
    """18 micro-batches, of which the groups hold 5 or all; also when it is resumed inside the last group."""
    end = 18 * 2 * world
    plain = run_config(file, streaming=way, n_train_samples=end)
    config = run_config(file, streaming=way, n_train_samples=end, shuffle_buffer_tokens=buffer)
    if cached:
        config = config.model_copy(
            update={"activations": plain.activations.model_copy(update={"cache": str(tmp_path)})}
        )
    wanted, found, through = [], [], 0
    for rank in range(world):
        wanted += take(open_stream(plain, rank=rank, world=world, end=end), 18)
        model, where = FakeModel(), {"rank": rank, "world": world, "end": end}
        stream = open_stream(config, model, **where)
        batches = list(stream)
        found += batches
        through += sum(model.sequences)
        stream.close()
        resumed = open_stream(config, start=16 * 2 * world, cursor={}, **where)
        assert all(same(a, b) for a, b in zip(resumed, batches[16:], strict=True))
        resumed.close()
    rows, own = (torch.cat([b.x["a"][b.keep_N] for b in batches]) for batches in (found, wanted))
    assert sorted(rows.tolist()) == sorted(own.tolist())
    assert not torch.equal(rows, own)
    assert through == end


def test_a_run_that_ends_does_not_read_the_next_pass_ahead(file: Path, caplog: pytest.LogCaptureFixture):
    data = TokenData.load(run_config(file).data, FakeModel())
    end = (data.n_train_available or 0) // 2 * 2
    caplog.set_level("INFO")
    stream = open_stream(run_config(file, lm_batch_size=4), end=end)
    assert len(list(stream)) - end // 2 in (0, 1)  # whole passes of the language model
    stream.close()
    assert "repeated" not in caplog.text


def test_norm_outliers_are_masked_at_their_hook_point_alone(file: Path):
    batch = take(open_stream(run_config(file)), 1)[0]
    batch.x["b"][3] *= 100
    limit = batch.x["a"].norm(dim=1).max().item()
    assert not batch.keep(("b",), 3 * limit)[3]
    assert torch.equal(batch.keep(("a",), limit), batch.keep_N)
    assert torch.equal(batch.keep(("b",), math.inf), batch.keep_N)


def test_one_rule_says_which_tokens_count():
    tokens_bT = torch.tensor([[BOS, 5, EOS, 6], [7, 8, 9, BOS]])
    data = data_config("x")
    keep = [False, True, False, True, True, True, True, False]
    assert keep_mask(tokens_bT, {BOS, EOS}, data).tolist() == keep
    assert keep_mask(tokens_bT, {BOS, EOS}).tolist() == keep
    assert keep_mask(tokens_bT, {BOS, EOS}, data_config("x", mask_special_tokens=False)).all()
    x_Nd = torch.ones(8, 2)
    x_Nd[0], x_Nd[5] = 1000.0, 10.0
    outliers = data_config("x", mask_norm_outliers=5)
    limit = norm_limit(x_Nd, torch.tensor(keep), outliers.mask_norm_outliers)
    assert limit == pytest.approx(5 * 2**0.5)
    assert keep_mask(tokens_bT, {BOS, EOS}, outliers, x_Nd, limit).tolist() == [*keep[:5], False, *keep[6:]]
    assert keep_mask(tokens_bT, {BOS, EOS}, data, x_Nd, limit).tolist() == keep
    x_Nd[5] = 4.9
    assert keep_mask(tokens_bT, {BOS, EOS}, outliers, x_Nd, limit).tolist() == keep
    assert norm_limit(x_Nd, torch.tensor(keep), None) == math.inf


def test_errors_of_the_reading_thread_come_out_and_closing_stops_it(file: Path, tmp_path: Path, way: bool):
    before = threading.active_count()
    path = tmp_path / "late.jsonl"
    rows = [{"input_ids": [5] * (10 + i % 3)} for i in range(200)] + [{"input_ids": [5000]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = {"is_tokenized": True, "column_name": "input_ids", "streaming": way, "shuffle_documents": False}
    stream = open_stream(run_config(path, **data))
    with pytest.raises(UserError, match="token id 5000"):
        [next(stream) for _ in range(200)]
    stream.close()
    stream.close()
    assert threading.active_count() == before
