"""Paths as people type them, and as they are found from another folder or host."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from saeopt.config import RunConfig, dump_yaml, load_run_config, stream_key, validate_run
from saeopt.config.places import as_typed
from saeopt.config.study_file import study_spec
from saeopt.errors import UserError
from saeopt.options import run_cli
from saeopt.trials.storage import Store, store_url


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA", str(tmp_path / "home" / "data"))
    (tmp_path / "home" / "data").mkdir(parents=True)
    (tmp_path / "home" / "data" / "x.txt").write_text("x")
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def config(dataset: str = "roneneldan/TinyStories", model: str = "model", **top: Any) -> RunConfig:
    raw = {
        "tlens_model_path": model, "lr_schedule": "constant", "data": {"dataset_name": dataset},
        "saes": {"sae_type": "relu", "sae_positions": "hook_embed"}, **top,
    }  # fmt: skip
    return validate_run(raw, "test")


@pytest.mark.parametrize(
    "typed", ["~/data/x.txt", "$DATA/x.txt", "${DATA}/x.txt", "home/data/x.txt", "./home/data/x.txt"]
)
def test_a_path_that_exists_is_stored_absolute_beside_what_was_typed(typed: str, home: Path):
    found = config(typed)
    assert found.data.dataset_name == str(home / "data" / "x.txt")
    assert found.as_typed[found.data.dataset_name] == typed
    assert as_typed(found.model_dump(mode="json"))["data"]["dataset_name"] == typed
    assert as_typed(found.model_dump(mode="json"))["tlens_model_path"] == "model"


def test_every_path_field_knows_home_and_variables(home: Path):
    found = config(
        "~/data/*.txt", "~/m", save_dir="~/out", activations={"cache": "$DATA/cache"},
        data={"dataset_name": "~/data/*.txt", "eval_dataset_name": "~/e.txt", "tokenizer_name": "~/t"},
        saes={"sae_type": "relu", "sae_positions": "hook_embed", "pretrained_sae_paths": ["~/a", "$DATA/b"]},
    )  # fmt: skip
    assert found.data.dataset_name == str(home / "data" / "*.txt")
    assert (found.data.eval_dataset_name, found.data.tokenizer_name) == (str(home / "e.txt"), str(home / "t"))
    assert (found.save_dir, found.tlens_model_path) == (str(home / "out"), str(home / "m"))
    assert found.activations.cache == str(home / "data" / "cache")
    assert found.saes.pretrained_sae_paths == [str(home / "a"), str(home / "data" / "b")]
    assert store_url("sqlite:///~/x.db").database == str(home / "x.db")
    assert store_url("sqlite:///$DATA/x.db").database == str(home / "data" / "x.db")
    spec = study_spec({"name": "s", "base": config().model_dump(mode="json"), "output_dir": "~/runs"}, "test")
    assert spec.runs == home / "runs" / "s"


def test_names_of_a_hub_and_words_stay_as_they_are():
    found = config("roneneldan/TinyStories")
    assert found.data.dataset_name == "roneneldan/TinyStories"
    assert (found.save_dir, found.activations.cache) == ("output", "auto")
    assert "roneneldan/TinyStories" not in found.as_typed.values()


@pytest.mark.parametrize("typed", ["$NO_SUCH_VARIABLE/x", "${NO_SUCH_VARIABLE}/x", "~no_such_user/x"])
def test_a_variable_or_user_that_does_not_exist_is_named(typed: str):
    with pytest.raises(UserError, match=r"test: 'save_dir': .*(NO_SUCH_VARIABLE|no_such_user)"):
        config(save_dir=typed)
    with pytest.raises(UserError, match=r"'output_dir': .*(NO_SUCH_VARIABLE|no_such_user)"):
        study_spec({"name": "s", "base": config().model_dump(mode="json"), "output_dir": typed}, "test")
    with pytest.raises(UserError, match=r"test: 'base': .*(NO_SUCH_VARIABLE|no_such_user)"):
        study_spec({"name": "s", "base": typed}, "test")
    with pytest.raises(UserError, match=r"--storage .*(NO_SUCH_VARIABLE|no_such_user)"):
        store_url(f"sqlite:///{typed}.db")


def test_a_stored_config_is_found_from_another_folder_and_on_another_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    here = config("home/data/x.txt")
    (tmp_path / "final.yaml").write_text(dump_yaml(here))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_run_config(tmp_path / "final.yaml") == here
    (elsewhere / "home" / "data").mkdir(parents=True)
    (elsewhere / "home" / "data" / "x.txt").write_text("x")
    (tmp_path / "home").rename(tmp_path / "gone")
    there = load_run_config(tmp_path / "final.yaml")
    assert there.data.dataset_name == str(elsewhere / "home" / "data" / "x.txt")
    assert stream_key(there) == stream_key(here)
    (elsewhere / "home").rename(elsewhere / "gone")
    assert load_run_config(tmp_path / "final.yaml").data.dataset_name == here.data.dataset_name


def test_a_study_is_found_from_another_folder_once_its_folder_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = study_spec({"name": "s", "base": config("home/data/x.txt").model_dump(mode="json")}, "test")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert spec.runs == Path("output/s")
    assert spec.run_config({}).data.dataset_name == str(tmp_path / "home" / "data" / "x.txt")
    (tmp_path / "output" / "s").mkdir(parents=True)
    assert spec.runs == tmp_path / "output" / "s"


def test_creating_a_study_makes_the_folder_that_workers_look_for(
    tiny_model_dir: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from saeopt.study import app

    data = {"dataset_name": str(tiny_text), "is_tokenized": False, "column_name": "text", "context_length": 16}
    saes = {"sae_type": "relu", "sae_positions": "blocks.1.hook_resid_pre"}
    (tmp_path / "base.yaml").write_text(dump_yaml(config(model=str(tiny_model_dir), data=data, saes=saes)))
    (tmp_path / "s.yaml").write_text("base: base.yaml")
    with pytest.raises(SystemExit, match="0"):
        run_cli(app, ["create", "s.yaml", "--storage", "sqlite:///~/s.db"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store = Store.open("sqlite:///~/s.db", create=False)
    assert store.spec("s").runs == tmp_path / "output" / "s"
    store.close()


def test_a_study_that_is_created_again_from_another_folder_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from saeopt.trials.create import create_study

    raw = {"name": "s", "base": {
        "tlens_model_path": "model", "lr_schedule": "constant", "data": {"dataset_name": "home/data/x.txt"},
        "saes": {"sae_type": "relu", "sae_positions": "hook_embed"},
    }}  # fmt: skip
    store = Store.open(f"sqlite:///{tmp_path}/s.db")
    assert create_study(store, study_spec(raw, "test")).is_new
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert not create_study(store, study_spec(raw, "test")).is_new
    with pytest.raises(UserError, match=r"different 'base.lr'"):
        create_study(store, study_spec({**raw, "base": {**raw["base"], "lr": 0.5}}, "test"))
    store.close()


def test_the_command_line_knows_home_behind_an_equals_sign(home: Path):
    seen: list[str] = []

    def app(args: list[str], standalone_mode: bool) -> None:
        seen.extend(args)

    with pytest.raises(SystemExit):
        run_cli(app, ["--config=~/a.yaml", "~/b", "--set", "x=~/c", "a~b"])
    assert seen == [f"--config={home}/a.yaml", f"{home}/b", "--set", "x=~/c", "a~b"]
    assert os.environ["HOME"] == str(home)
