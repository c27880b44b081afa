"""`python -m saeopt.evaluation` on run folders of a real (random) and of a real (trained) language model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_model import PlainModel

from saeopt.activations.language_model import LanguageModel
from saeopt.activations.tokens import TokenData
from saeopt.config import RunConfig, dump_yaml, validate_run
from saeopt.errors import UserError
from saeopt.evaluation.evaluate import evaluate
from saeopt.evaluation.metrics import scalars
from saeopt.evaluator import app
from saeopt.runs.weights import save_weights, weights_path
from saeopt.saes.base import SAE

MakeSAE = Callable[..., SAE]
HOOKS = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]
WANTED = "l0 l1 mse fvu explained_variance cosine fraction_dead ce_clean ce_sae ce_zero ce_recovered kl n_tokens"


@pytest.fixture
def config(tiny_model_dir: Path, tiny_text: Path) -> RunConfig:
    data = {"dataset_name": str(tiny_text), "is_tokenized": False, "column_name": "text", "streaming": False}
    raw = {
        "tlens_model_path": str(tiny_model_dir),
        "lr_schedule": "constant",
        "legacy_scaling": False,
        "data": {**data, "context_length": 16, "n_eval_samples": 11, "eval_batch_size": 4},
        "saes": {"sae_type": "relu", "sae_positions": HOOKS},
    }
    return validate_run(raw, "test")


@pytest.fixture
def run_dir(tmp_path: Path, config: RunConfig, make_sae: MakeSAE) -> Path:
    (tmp_path / "final_config.yaml").write_text(dump_yaml(config))
    for samples in (50, 100):
        saes = {hook: make_sae(16, 32, seed=i + samples, scale=0.5) for i, hook in enumerate(HOOKS)}
        save_weights(weights_path(tmp_path, samples), config, saes, samples)
    return tmp_path


def command(*args: object) -> None:
    app(args=[*map(str, args), "--device", "cpu"], standalone_mode=False)


def evaluation(run_dir: Path, name: str = "evaluation.json") -> dict[str, dict[str, Any]]:
    return json.loads((run_dir / name).read_text())


def test_the_file_holds_every_metric_and_agrees_with_plain_transformers(
    run_dir: Path, config: RunConfig, tiny_model_dir: Path, make_sae: MakeSAE, capsys: pytest.CaptureFixture[str]
) -> None:
    command(run_dir)
    found = evaluation(run_dir)
    assert list(found) == HOOKS
    lm = LanguageModel.load(config, "cpu")
    tokens = torch.cat(list(TokenData.load(config.data, lm).eval_batches(4)))
    assert tokens.shape == (11, 16)
    saes = {hook: make_sae(16, 32, seed=i + 100, scale=0.5) for i, hook in enumerate(HOOKS)}
    expected = evaluate(saes, PlainModel(tiny_model_dir), [tokens], data=config.data)
    for hook in HOOKS:
        assert set(WANTED.split()) <= set(found[hook])
        assert found[hook]["samples"] == 100
        for name, value in scalars(expected[hook]).items():
            assert found[hook][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert HOOKS[0] in capsys.readouterr().out
    assert (run_dir / "feature_density.png").exists()


def test_an_older_checkpoint_leaves_the_result_of_the_run_alone(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(run_dir)
    before = (run_dir / "evaluation.json").read_bytes()
    command(run_dir, "--checkpoint", 50)
    assert evaluation(run_dir, "evaluation_50.json")[HOOKS[0]]["samples"] == 50
    command(run_dir, "--checkpoint", 50, "--no-cross-entropy")
    assert (run_dir / "evaluation.json").read_bytes() == before
    older = evaluation(run_dir, "evaluation_no-ce_50.json")
    assert older[HOOKS[0]]["samples"] == 50
    assert "ce_sae" not in older[HOOKS[0]]
    assert older[HOOKS[0]]["fvu"] != evaluation(run_dir)[HOOKS[0]]["fvu"]


def test_json_is_all_that_is_printed(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(run_dir, "--json", "--no-cross-entropy", "--n-eval-samples", 3)
    assert json.loads(capsys.readouterr().out) == evaluation(run_dir, "evaluation_3-samples_no-ce.json")


def test_fewer_samples_are_the_first_of_the_held_out_ones(run_dir: Path, config: RunConfig) -> None:
    command(run_dir, "--n-eval-samples", 3, "--no-cross-entropy")
    lm = LanguageModel.load(config, "cpu")
    tokens = next(TokenData.load(config.data, lm).eval_batches(3))
    found = evaluation(run_dir, "evaluation_3-samples_no-ce.json")
    assert found[HOOKS[0]]["n_tokens"] == int((tokens > 1).sum())


def test_a_weights_file_alone_is_enough(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "final_config.yaml").unlink()
    command(weights_path(run_dir, 100), "--set", "data.n_eval_samples=2", "--no-cross-entropy")
    assert evaluation(run_dir, "evaluation_2-samples_no-ce.json")[HOOKS[1]]["n_tokens"] <= 2 * 16


def test_all_of_another_file_is_evaluated_without_the_data_of_the_run(
    run_dir: Path, tmp_path: Path, tiny_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(run_dir)
    before = (run_dir / "evaluation.json").read_bytes()
    other = tmp_path / "other.txt"
    other.write_text("w5 w6 w7\n\n" * 41)  # 41 documents with their separators are 164 tokens: ten samples of 16
    gone = ["--set", "data.dataset_name=gone.jsonl", "--no-cross-entropy", "--data", other]
    command(run_dir, *gone, "--all")
    assert evaluation(run_dir, "evaluation_other.json")[HOOKS[0]]["n_tokens"] == 120
    assert (run_dir / "evaluation.json").read_bytes() == before
    command(run_dir, *gone, "--n-eval-samples", 2)
    assert evaluation(run_dir, "evaluation_other_2-samples.json")[HOOKS[0]]["n_tokens"] == 24
    assert evaluation(run_dir, "evaluation_other.json")[HOOKS[0]]["n_tokens"] == 120
    with pytest.raises(UserError, match="--all needs --data FILE"):
        command(run_dir, "--all")
    with pytest.raises(UserError, match=r"'data.eval_dataset_name': .*none.txt: no such file"):
        command(run_dir, "--all", "--data", tmp_path / "none.txt")


def test_an_evaluation_says_what_it_was_made_of(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(run_dir)
    told = evaluation(run_dir)[HOOKS[0]]["evaluated"]
    wanted = {"n_samples": 11, "context_length": 16, "mask_special_tokens": True, "cross_entropy": True}
    assert wanted | {"lm_dtype": "float32", "split": "train", "ce_ablation": "unmasked"} == {
        key: told[key] for key in (*wanted, "lm_dtype", "split", "ce_ablation")
    }
    assert told["data"].endswith("tiny.jsonl")
    assert len(told["tokens"]) == len(told["weights"]) == 16
    assert "tiny.jsonl: 11 samples of 16 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (["--n-eval-samples", "3"], "evaluation_3-samples.json"),
        (["--set", "data.mask_special_tokens=false"], "evaluation_mask-special-tokens-False.json"),
        (["--set", "ce_ablation=all"], "evaluation_ce-ablation-all.json"),
        (["--set", "data.context_length=8"], "evaluation_context-length-8.json"),
        (["--set", "data.dataset_name=DIR/other.jsonl"], "evaluation_other.json"),
        (["--set", "data.dataset_name=DIR/more/tiny.jsonl"], "evaluation_tokens-*.json"),
        (["--output", "DIR/there.json", "--n-eval-samples", "3"], "there.json"),
    ],
)
def test_other_data_and_other_settings_leave_the_result_and_the_plots_of_the_run_alone(
    change: list[str], name: str, run_dir: Path, tiny_text: Path
) -> None:
    lines = tiny_text.read_text().splitlines()
    (run_dir / "more").mkdir()
    for file in ("other.jsonl", "more/tiny.jsonl"):
        (run_dir / file).write_text("\n".join(lines[200:]))
    command(run_dir)
    before = {p: p.read_bytes() for p in run_dir.iterdir() if p.is_file()}
    command(run_dir, *[text.replace("DIR", str(run_dir)) for text in change])
    assert {p: p.read_bytes() for p in before} == before
    (made,) = set(run_dir.iterdir()) - set(before) - {run_dir / "more"}
    assert made.match(name)
    assert json.loads(made.read_text())[HOOKS[0]] != evaluation(run_dir)[HOOKS[0]]


def test_the_same_tokens_from_another_place_are_the_same_evaluation(run_dir: Path, tiny_text: Path) -> None:
    command(run_dir)
    before = {p.name for p in run_dir.iterdir()}
    moved = run_dir.parent / "moved.jsonl"
    moved.write_bytes(tiny_text.read_bytes())
    command(run_dir, "--set", f"data.dataset_name={moved}")
    assert {p.name for p in run_dir.iterdir()} == before
    assert evaluation(run_dir)[HOOKS[0]]["evaluated"]["data"] == str(moved)


def test_an_evaluation_of_before_is_replaced_by_its_like_only(run_dir: Path) -> None:
    (run_dir / "evaluation.json").write_text('{"blocks.0.hook_resid_pre": {"l0": 3.0}}')
    command(run_dir, "--n-eval-samples", 3)
    assert evaluation(run_dir) == {"blocks.0.hook_resid_pre": {"l0": 3.0}}
    command(run_dir)
    assert evaluation(run_dir)[HOOKS[0]]["evaluated"]["n_samples"] == 11


def test_an_sae_of_another_model_is_refused(
    run_dir: Path, config: RunConfig, make_sae: MakeSAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_weights(weights_path(run_dir, 200), config, {HOOKS[0]: make_sae(8, 32)}, 200)
    with pytest.raises(UserError, match="has width 8, the model 16"):
        command(run_dir)
    save_weights(weights_path(run_dir, 300), config, {"blocks.7.hook_resid_pre": make_sae(16, 32)}, 300)
    with pytest.raises(UserError, match=r"no hook point 'blocks\.7\.hook_resid_pre'"):
        command(run_dir)


def test_a_run_that_held_nothing_out_says_so(run_dir: Path) -> None:
    with pytest.raises(UserError, match="nothing was held out"):
        command(run_dir, "--set", "data.n_eval_samples=0")


def test_cross_entropy_of_a_trained_model(stories: Path, tinystories: list[str], make_sae: MakeSAE) -> None:
    """stories260K on stories 900 to 999, BOS before each, nothing masked: 1.587 nats, 6.238 with layer 2 zeroed.

    The first 15,360 of the 71,680 tokens, within what so few can differ.
    """
    raw = {
        "tlens_model_path": str(stories),
        "lr_schedule": "constant",
        "data": {"dataset_name": "unused", "context_length": 128},
        "saes": {"sae_type": "relu", "sae_positions": "blocks.2.hook_resid_pre"},
    }
    lm = LanguageModel.load(validate_run(raw, "test"), "cpu")
    assert lm.tokenizer is not None
    packed = torch.cat([torch.tensor(lm.tokenizer(story)["input_ids"]) for story in tinystories[900:]])
    tokens = packed[: 120 * 128].view(-1, 128)
    sae = make_sae(64, 64)
    sae.W_dec.zero_()
    hook = "blocks.2.hook_resid_pre"
    got = evaluate({hook: sae}, lm, tokens.split(40), keep=lambda t, x: torch.ones_like(t, dtype=torch.bool))[hook]
    assert got["ce_clean"] == pytest.approx(1.587, abs=0.05)
    assert got["ce_zero"] == pytest.approx(6.238, abs=0.1)
    assert got["n_predictions"] == 120 * 127


def test_a_second_evaluation_says_what_l0_was_aimed_at_and_where_lambda_ended(
    tmp_path: Path, config: RunConfig, make_sae: MakeSAE
) -> None:
    aiming = config.model_copy(update={"saes": config.saes.model_copy(update={"target_l0": 8.0})})
    (tmp_path / "final_config.yaml").write_text(dump_yaml(aiming))
    saes = {hook: make_sae(16, 32, seed=i, scale=0.5) for i, hook in enumerate(HOOKS)}
    save_weights(weights_path(tmp_path, 50), aiming, saes, 50)
    logged = [(40, {"sparsity_coeff": 0.5}), (50, {"eval_sparsity_coeff": 0.25}), (60, {"sparsity_coeff": 9.0})]
    rows = [{"samples": samples, "hook_point": HOOKS[0], **row} for samples, row in logged]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command(tmp_path)
    found = [[row.get(key) for key in ("target_l0", "sparsity_coeff")] for row in evaluation(tmp_path).values()]
    assert found == [[8.0, 0.25], [8.0, None]]
