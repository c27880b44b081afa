"""A folder to start in, the configs and studies that come with saeopt, and files that are checked without training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from saeopt.config import load_run_config
from saeopt.config.shipped import names, root, title
from saeopt.config.study_file import load_study_spec

Call = Callable[..., SimpleNamespace]
ROOT = Path(__file__).resolve().parents[2]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_every_config_and_study_of_the_repository_is_shipped_and_says_what_it_is() -> None:
    there = [path for folder in ("configs", "studies") for path in (ROOT / folder).rglob("*.yaml")]
    assert names() == sorted(str(path.relative_to(ROOT)) for path in there)
    assert all(len(title(name)) > 5 for name in names())
    assert title("studies/tinystories-relu-grid.yaml") == "A grid: every cell once"


def test_ls_names_files_that_show_and_cp_take(call: Call, tmp_path: Path) -> None:
    shown = call("configs", "ls").out
    assert all(len(line.rstrip()) <= 80 for line in shown.splitlines())
    assert "tinystories-architectures" in shown
    assert call("configs", "ls", "studies").out.count("\n") < shown.count("\n")
    text = (root() / "configs/gpt2/gpt2-relu.yaml").read_text()
    for word in ("gpt2-relu", "gpt2-relu.yaml", "gpt2/gpt2-relu", "configs/gpt2/gpt2-relu.yaml"):
        assert call("configs", "show", word).out == text


def test_a_study_is_copied_with_its_base_and_what_is_there_stays(call: Call, tmp_path: Path) -> None:
    call("configs", "cp", "tinystories-relu-grid", "stories260k/sweep-relu")
    own = ["configs/stories260k/stories260k-relu.yaml", "configs/stories260k/sweep-relu.yaml",
           "configs/tinystories/tinystories-relu.yaml", "studies/tinystories-relu-grid.yaml"]  # fmt: skip
    assert files(tmp_path) == own
    assert load_study_spec(tmp_path / own[3]).base["tlens_model_name"] == "roneneldan/TinyStories-1M"
    (tmp_path / own[2]).write_text("changed")
    again = call("configs", "cp", "tinystories-relu-grid")
    assert (again.code, "overwrites nothing" in again.err) == (2, True)
    call("configs", "cp", "tinystories-architectures")  # of the same base
    assert (tmp_path / own[2]).read_text() == "changed"
    assert call("configs", "cp", "quickstart", "--to", "sub").code == 0
    assert files(tmp_path / "sub") == ["configs/quickstart/smollm2-topk.yaml"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["configs", "cp", "gpt2-rely"], "did you mean 'gpt2-relu'"),
        (["configs", "show", "sweep-topk"], "configs/gpt2/sweep-topk.yaml or configs/tinystories/sweep-topk.yaml"),
        (["configs", "ls", "zzz"], "nothing that comes with saeopt is called 'zzz'"),
        (["train", "configs/gpt2/gpt2-relu.yaml"], "no such file (it comes with saeopt: saeopt configs cp gpt2-relu)"),
        (["init", "there"], "there: is there already"),
        (["init", "new", "--hook", "blocks.0.hook\x07"], "init: 'saes.sae_positions"),
        (["init", "my sweep"], "init: 'name': must begin with a letter or digit and hold no others but"),
        (["init", "sub/a b/c" + "x" * 300], "init: 'name': "),
    ],
)
def test_a_mistake_is_one_line_and_makes_nothing(call: Call, tmp_path: Path, words: list[str], told: str) -> None:
    (tmp_path / "there").mkdir()
    done = call(*words)
    assert done.code == 2
    assert told in done.err
    assert len(done.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_init_makes_files_that_are_valid(call: Call, tmp_path: Path, tiny_model_dir: Path, tiny_text: Path) -> None:
    made = call("init", "my-sweep", "--model", tiny_model_dir, "--data", tiny_text, "--hook", "blocks.1.hook_resid_pre")
    assert made.code == 0, made.err
    folder = tmp_path / "my-sweep"
    assert files(folder) == [".gitignore", "README.md", "config.yaml", "study.yaml"]
    assert "{" not in (folder / "README.md").read_text()
    config = load_run_config(folder / "config.yaml")
    assert config.tlens_model_path == str(tiny_model_dir)
    assert config.data.dataset_name == str(tiny_text)
    assert load_study_spec(folder / "study.yaml").name == "my-sweep"
    context = "  context_length: 32"
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace("  context_length: 128", context))
    checked = call("study", "validate", folder / "config.yaml", folder / "study.yaml")
    assert checked.out.splitlines() == [
        f"{folder / 'config.yaml'}: run config, topk", f"{folder / 'study.yaml'}: study my-sweep, 9 trials",
    ]  # fmt: skip
    assert not (tmp_path / "studies").exists()


def test_init_without_a_name_fills_the_folder_one_is_in(call: Call, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert call("init").code == 0
    config = load_run_config(tmp_path / "config.yaml")
    assert (config.tlens_model_name, config.recipe) == ("roneneldan/TinyStories-1M", 3)
    assert yaml.safe_load((tmp_path / "study.yaml").read_text())["name"] == tmp_path.name
    checked = call("study", "validate", "config.yaml", "study.yaml")
    assert (checked.code, checked.out.count("not looked at, the model is one of the hub")) == (0, 2)
    before = {name: (tmp_path / name).read_text() for name in files(tmp_path)}
    again = call("init")
    assert (again.code, "config.yaml: is there already" in again.err) == (2, True)
    assert {name: (tmp_path / name).read_text() for name in files(tmp_path)} == before


def test_validate_tells_one_line_for_each_mistake_of_each_file(call: Call, tmp_path: Path) -> None:
    data = {"dataset_name": "nowhere.txt", "batch_size": 3, "context_length": 0, "is_tokenized": False}
    saes = {"sae_type": "topk", "k": "many", "sae_positions": ["blocks.0.hook_resid_pre"]}
    run = {"tlens_model_name": "gpt2", "learning_rate": 1, "seed": "x", "data": data, "saes": saes}
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    study = {"base": "good.yaml", "max_trial": 3, "retries": -1, "objectives": ["l0", "l9"]}
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    good = {**run, "data": {**data, "context_length": 8}, "saes": {**saes, "k": 4}, "seed": 1}
    del good["learning_rate"], good["data"]["batch_size"]
    (tmp_path / "good.yaml").write_text(json.dumps(good))
    done = call("study", "validate", "run.yaml", "none.yaml", "study.yaml", "good.yaml")
    assert done.code == 2
    wanted = ["run.yaml: unknown key 'data.batch_size'; did you mean 'data.train_batch_size'?",
              "run.yaml: unknown key 'learning_rate'; did you mean 'lr'?",
              "run.yaml: 'seed': must be a valid integer", "run.yaml: 'data.context_length': must be greater than 0",
              "run.yaml: 'saes.k': must be a valid integer", "none.yaml: no such file",
              "study.yaml: unknown key 'max_trial'; did you mean 'max_trials'",
              "study.yaml: 'retries': must be greater", "study.yaml: 'objectives.1.metric': unknown metric",
              "good.yaml: 'data.dataset_name': nowhere.txt: no such"]  # fmt: skip
    lines = [line.removeprefix("saeopt: error: ") for line in done.err.splitlines()]
    assert len(lines) == len(wanted)
    assert all(line.startswith(start) for line, start in zip(sorted(lines), sorted(wanted), strict=True)), lines
    elsewhere = call("study", "validate", "good.yaml", "--elsewhere")
    assert (elsewhere.code, elsewhere.out) == (0, "good.yaml: run config, topk\n")
    sweep = call("study", "validate", root() / "configs/gpt2/sweep-relu.yaml")
    assert (sweep.code, "neither a study file" in sweep.err) == (2, True)


@pytest.mark.parametrize("name", [name for name in names() if "/sweep-" not in name])
def test_what_comes_with_saeopt_is_valid(name: str, call: Call) -> None:
    done = call("study", "validate", "--elsewhere", root() / name)
    if "auto" in name:  # asks for the width of the model
        assert "needs the model's width, which --elsewhere leaves out" in done.err
    else:
        assert done.code == 0, done.err
