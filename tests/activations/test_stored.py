"""Activations from files in place of a language model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from saeopt.activations.stored import StoredActivations, StoredRows
from saeopt.config import validate_run
from saeopt.config.study_file import study_spec
from saeopt.errors import UserError
from saeopt.evaluation.held_out import config_of, measure, on_other_data
from saeopt.runs.weights import load_checkpoint
from saeopt.search.space import Space
from saeopt.training import TrialPlan, train_pack
from saeopt.training.dry_run import print_dry_run
from saeopt.training.launch import resolve
from saeopt.training.runtime import Runtime

ROWS, HELD_OUT = 1000, 10


def config(path, positions=("here",), **data):
    fields = {"context_length": 8, "n_train_samples": 128, "n_eval_samples": HELD_OUT, "train_batch_size": 4}
    saes = {
        "sae_type": "relu", "sae_positions": list(positions), "dict_size_to_input_ratio": 4, "sparsity_coeff": 0.1,
    }  # fmt: skip
    raw = {"data": {"activations": str(path), **fields, **data}, "saes": saes, "threads": 1, "lr": 3e-3}
    return validate_run({**raw, "save_every_n_samples": 32}, "the test")


def file(path, **tensors):
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
    return path


@pytest.fixture
def runtime():
    return Runtime("cpu")


def test_a_run_on_a_file_learns_it_and_never_sees_the_held_out_rows(runtime, tmp_path):
    x = torch.randn(ROWS, 6)
    x[-HELD_OUT * 8 :] += 100  # whoever trained on these would know
    given = config(file(tmp_path / "a.safetensors", x=x))
    result = train_pack([TrialPlan("a", given, tmp_path / "run")], runtime)["a"]
    (row,) = result.evaluation.values()
    assert "ce_recovered" not in row
    assert row["n_tokens"] == HELD_OUT * 8
    loaded = load_checkpoint(tmp_path / "run")
    sae = loaded.saes["here"]
    assert sae.scale.item() == pytest.approx(6**0.5 / x[: -HELD_OUT * 8].norm(dim=-1).mean().item(), rel=0.05)
    held = x[-HELD_OUT * 8 :]
    fvu = (held - sae(held)).square().sum() / (held - held.mean(0)).square().sum()
    assert row["fvu"] == pytest.approx(fvu.item(), rel=1e-3)
    again, told = measure(loaded, given, torch.device("cpu"), None, True)
    assert again["here"]["fvu"] == pytest.approx(row["fvu"], rel=1e-5)
    assert told["cross_entropy"] is False


def test_a_folder_holds_a_file_for_each_site_and_a_cut_run_goes_on_bit_for_bit(runtime, tmp_path):
    (tmp_path / "files").mkdir()
    x, y = torch.randn(ROWS, 6), torch.randn(ROWS, 4)
    file(tmp_path / "files" / "in-%3Eout.safetensors", x=x, y=y)
    file(tmp_path / "files" / "blocks.1.safetensors", x=x + 1)
    given = config(tmp_path / "files", ["blocks.*", {"read": "in", "write": "out"}])
    result = train_pack([TrialPlan("a", given, tmp_path / "whole")], runtime)["a"]
    assert list(result.evaluation) == ["blocks.1", "in->out"]
    train_pack([TrialPlan("a", given, tmp_path / "cut")], runtime)
    for path in (tmp_path / "cut").rglob("*128*"):
        path.unlink()
    train_pack([TrialPlan("a", given, tmp_path / "cut", resume=True)], runtime)
    whole, cut = (load_checkpoint(tmp_path / name).saes for name in ("whole", "cut"))
    assert (whole["in->out"].d, whole["in->out"].e) == (6, 4)
    for key, sae in whole.items():
        for name, tensor in sae.state_dict().items():
            assert torch.equal(tensor, cut[key].state_dict()[name]), name


def test_two_files_do_not_hold_different_rows_of_one_hook_point(runtime, tmp_path):
    x, y = torch.randn(ROWS, 6), torch.randn(ROWS, 4)
    (tmp_path / "files").mkdir()
    file(tmp_path / "files" / "t.safetensors", x=x, y=y)
    given = config(tmp_path / "files", ["in", {"read": "in", "write": "out", "name": "t"}])
    file(tmp_path / "files" / "in.safetensors", x=x)
    train_pack([TrialPlan("a", given, tmp_path / "same")], runtime)
    file(tmp_path / "files" / "in.safetensors", x=50 * x)
    with pytest.raises(UserError, match="hold different rows of in"):
        train_pack([TrialPlan("a", given, tmp_path / "other")], Runtime("cpu"))


def test_a_run_does_not_go_on_with_other_rows(runtime, tmp_path):
    x = torch.randn(ROWS, 6)
    given = config(file(tmp_path / "a.safetensors", x=x))
    train_pack([TrialPlan("a", given, tmp_path / "run")], runtime)
    file(tmp_path / "a.safetensors", x=x.flip(0))
    with pytest.raises(UserError, match=r"data\.activations.*does not hold the rows of here that"):
        train_pack([TrialPlan("a", given, tmp_path / "run", resume=True)], Runtime("cpu"))


def test_files_that_have_moved_are_named_once(runtime, tmp_path):
    x = torch.randn(ROWS, 6)
    given = config(file(tmp_path / "a.safetensors", x=x))
    train_pack([TrialPlan("a", given, tmp_path / "run")], runtime)
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    folder, moved = tmp_path / "run", f"data.activations={tmp_path}/b.safetensors"
    resumed, _ = resolve(None, [moved], folder)
    assert resumed.data.activations == resumed.data.dataset_name == f"{tmp_path}/b.safetensors"
    assert train_pack([TrialPlan("a", resumed, folder, resume=True)], Runtime("cpu"))["a"].status == "finished"
    loaded = load_checkpoint(folder)
    measured, _ = measure(loaded, config_of(folder, loaded, [moved]), torch.device("cpu"), None, True)
    assert measured["here"]["n_tokens"] == HELD_OUT * 8
    with pytest.raises(UserError, match=r"other: the run was trained on stored activations; data\.activations"):
        on_other_data(loaded, "other")


def test_a_study_may_vary_the_files(tmp_path):
    paths = [str(file(tmp_path / f"{name}.safetensors", x=torch.randn(ROWS, 6))) for name in "ab"]
    base = config(paths[0]).model_dump(mode="json")
    spec = study_spec({"name": "s", "base": base, "space": {"data.activations": paths}}, "s.yaml")
    assert [cell.config.data.activations for cell in Space(spec).grid()] == paths


def test_every_pass_gives_each_sample_once_in_an_order_of_its_own(tmp_path):
    given = config(file(tmp_path / "a.safetensors", x=torch.randn(105, 2)), n_eval_samples=3)
    rows = StoredRows(given.data, StoredActivations.load(given))
    batches = rows.train(0, 5, 1, 2)
    second = [next(batches).tokens_bT for _ in range(2)][1]
    assert torch.equal(second, next(rows.train(10, 5, 1, 2)).tokens_bT)
    firsts = torch.stack([next(rows.train(sample, 1)).tokens_bT[0, 0] for sample in range(20)]).view(2, 10)
    assert [sorted(order.tolist()) for order in firsts] == [list(range(0, 80, 8))] * 2
    assert firsts[0].tolist() != firsts[1].tolist()
    assert torch.cat(list(rows.eval_batches(2))).flatten().tolist() == list(range(80, 104))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"z": torch.ones(ROWS, 2)}, "holds no tensor 'x'"),
        ({"x": torch.ones(ROWS)}, r"has shape \[1000\]"),
        ({"x": torch.ones(ROWS, 2).long()}, "16 to 64 bit floats"),
        ({"x": torch.ones(ROWS, 2).to(torch.float8_e4m3fn)}, "16 to 64 bit floats"),
        ({"x": torch.ones(0, 2)}, "is empty"),
        ({"x": torch.full((ROWS, 2), float("nan"))}, "NaN"),
        ({"x": torch.randn(ROWS, 2), "y": torch.randn(9, 2)}, "9 rows"),
        ({"x": torch.randn(80, 2)}, "too few where"),
    ],
)
def test_files_that_cannot_be_trained_on_are_refused_in_one_line(runtime, tmp_path, tensors, message):
    given = config(file(tmp_path / "a.safetensors", **tensors))
    with pytest.raises(UserError, match=message) as refused:
        train_pack([TrialPlan("a", given, tmp_path / "run")], runtime)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_what_speaks_of_a_language_model_or_of_text_is_refused_beside_them(tmp_path):
    path = file(tmp_path / "a.safetensors", x=torch.randn(ROWS, 2))
    with pytest.raises(UserError, match="'tokenizer_name' is about text"):
        config(path, tokenizer_name="gpt2")
    with pytest.raises(UserError, match="give one of them"):
        config(path, dataset_name="other.txt")
    raw = config(path).model_dump(mode="json")
    assert validate_run(raw, "again").data == config(path).data
    with pytest.raises(UserError, match="stand in for a language model"):
        validate_run({**raw, "tlens_model_name": "gpt2"}, "the test")


def test_a_plan_is_made_without_a_language_model(tmp_path, capsys):
    print_dry_run(config(file(tmp_path / "a.safetensors", x=torch.randn(ROWS, 6))), "cpu")
    assert "language model" in capsys.readouterr().out
