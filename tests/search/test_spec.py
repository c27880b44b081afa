"""Study files and the replaced system's sweep files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from saeopt.config.study import StudySpec
from saeopt.config.study_file import load_study_spec, study_spec
from saeopt.config.sweep import sweep_spec
from saeopt.errors import UserError
from saeopt.trials import internals as db
from saeopt.trials.create import create_study
from saeopt.trials.storage import SPEC_KEY, Store

BASE: dict[str, Any] = {
    "tlens_model_path": "somewhere",
    "lr": "1e-3",
    "data": {"dataset_name": "x.jsonl", "n_train_samples": 64, "train_batch_size": 4},
    "saes": {"sae_type": "relu", "sae_positions": "blocks.1.hook_resid_pre", "sparsity_coeff": 0.1},
}


WARM = {
    "space": {"lr": {"low": 1e-4, "high": 1e-2}}, "sampler": "tpe", "max_trials": 9,
    "start_from": {"study": "x", "top": 3, "from_weights": True},
}  # fmt: skip


def spec(**fields: Any) -> StudySpec:
    return study_spec({"name": "s", "base": BASE, **fields}, "s.yaml")


def test_a_spec_survives_json() -> None:
    made = spec(
        space={"saes.sparsity_coeff": {"low": "5e-2", "high": 10, "log": True}, "lr": ["1e-3", 0.001, 2e-3]},
        sampler="tpe", max_trials=40, objectives=["l0", {"metric": "ce_recovered", "hook_points": "all"}],
        early_stopping="pareto",
    )  # fmt: skip
    assert StudySpec.from_json(made.to_json()).model_dump() == made.model_dump()
    assert StudySpec.from_json(made.to_json()).to_json() == made.to_json()


def test_seeds_of_a_study_are_those_of_its_base_config() -> None:
    made = spec(seeds="2", space={"lr": [1e-3]}, objectives=["pw_mcc"])
    assert made.n_seeds == made.base["seeds"] == made.run_config({}).seeds == 2
    assert StudySpec.from_json(made.to_json()).n_seeds == 2
    assert made.to_json() == spec(base={**BASE, "seeds": 2}, space={"lr": [1e-3]}, objectives=["pw_mcc"]).to_json()
    assert '"seeds": null' not in spec().to_json()
    assert spec(base={**BASE, "seeds": 1}, seeds=3).n_seeds == 3  # a complete config says so of itself


def test_values_pass_through_the_type_of_their_field() -> None:
    made = spec(space={"lr": ["1e-3", 0.001, 2e-3], "data.train_batch_size": ["1e1", 10]})
    assert made.space["lr"][0].values == [0.001, 0.002]
    assert made.space["data.train_batch_size"][0].values == [10]
    assert made.base["lr"] == 0.001


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"space": {"saes.sparsity_coef": [1]}}, "saes.sparsity_coeff"),
        ({"seeds": 0}, "'seeds'"),
        ({"seeds": 2, "base": {**BASE, "seeds": 3}}, "'seeds' is 2, 'base.seeds' 3"),
        ({"seeds": 2, "space": {"seed": [1, 2]}}, "'space.seed' beside 'seeds: 2'"),
        ({"space": {"seeds": [1, 2]}}, "'space.seeds'"),
        ({**WARM, "seeds": 2}, "'start_from.from_weights' beside 'seeds: 2'"),
        ({"objectives": ["found_again"]}, "needs 'seeds: 2'"),
        ({"space": {"lr": ["fast"]}}, "'lr'"),
        ({"space": {"lr": []}}, "empty"),
        ({"space": {"lr": {"low": 2, "high": 1}}}, "below 'high'"),
        ({"space": {"lr": {"low": 0, "high": 1, "log": True}}}, "above 0"),
        ({"space": {"data.train_batch_size": {"low": 1, "high": 4}}}, "int: true"),
        ({"space": {"lr@blocks.0.hook_resid_pre": [1]}}, "per hook point"),
        ({"space": {"lr": {"values": [1], "when": {"sae_type": "gated"}}}}, "never holds"),
        ({"sampler": "tpe", "space": {"lr": [1]}}, "max_trials"),
        ({"sampler": "tpee"}, "sampler"),
        ({"early_stopping": "median"}, "single objective"),
        ({"objectives": ["l00"]}, "did you mean"),
        ({"maxtrials": 3}, "max_trials"),
        ({"heartbeat": 5, "grace": 6}, "twice"),
    ],
)
def test_an_invalid_study_is_one_line_that_names_the_field(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        spec(**fields)
    assert line in str(error.value)
    assert str(error.value).startswith("s.yaml")


def test_base_may_be_a_path_beside_the_study_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nspace: {lr: [1e-3, 2e-3]}\n")
    made = load_study_spec(tmp_path / "mine.yaml")
    assert made.name == "mine"
    assert made.space["lr"][0].values == [0.001, 0.002]
    assert made.run_dir(7) == Path("output/mine/7")


def sweep(tmp_path: Path, text: str, **arguments: Any) -> StudySpec:
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "s.yaml").write_text(text)
    return sweep_spec(tmp_path / "b.yaml", tmp_path / "s.yaml", "old", **arguments)


def test_the_replaced_systems_names_are_read(tmp_path: Path) -> None:
    made = sweep(
        tmp_path,
        "learning_rates: [1e-3, 0.001]\nsparsity_coeffs: [1, 0.5]\ndict_size_ratios: [4, 8]\nmax_experiments: 20\n"
        "n_train_samples: 100\ntrain_batch_size: [2]\ngradient_accumulation_steps: [1, 2]\n"
        "sae_specific: {mse_coeffs: [1.0]}\n",
    )
    assert {k: d[0].values for k, d in made.space.items()} == {
        "lr": [0.001], "saes.sparsity_coeff": [1.0, 0.5], "saes.dict_size_to_input_ratio": [4.0, 8.0],
        "data.n_train_samples": [100], "data.train_batch_size": [2], "gradient_accumulation_steps": [1, 2],
        "saes.mse_coeff": [1.0],
    }  # fmt: skip
    assert made.max_trials == 20
    assert made.sampler.type == "grid"
    assert sweep(tmp_path, "lr: [1]\nmax_experiments: 20\n", max_trials=3).max_trials == 3


@pytest.mark.parametrize("text", ["sparsity: [1]\n", "sae_specific: {lrs: [1]}\n", "lr: [1]\nlearning_rates: [2]\n"])
def test_a_key_that_matches_no_field_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"s\.yaml"):
        sweep(tmp_path, text)


def test_what_an_older_recipe_does_not_allow_is_no_mistake_of_the_file():
    """Recipe 1 had a cosine, which needs a number of samples; a run of recipe 3 does without."""
    data = {name: value for name, value in BASE["data"].items() if name != "n_train_samples"}
    made = spec(base=BASE | {"data": data}, space={"lr": [1e-3, 2e-3]})
    assert [older.base["recipe"] for older in made.older] == [2]


def test_a_study_of_before_recipes_is_found_again_by_its_file(tmp_path):
    """What is stored has no recipe and no field that is newer; the file, unchanged, would now mean recipe 3."""
    made = spec(space={"lr": [1e-3, 2e-3]})
    second, first = made.older
    stored = json.loads(first.to_json())
    del stored["base"]["recipe"], stored["base"]["saes"]["sparsity_warmup_samples"]
    store = Store.open(f"sqlite:///{tmp_path}/s.db")
    study_id = create_study(store, made).study_id
    with store.write() as connection:
        db.set_attrs(connection, db.study_attrs, study_id, {SPEC_KEY: json.dumps(stored, sort_keys=True)})
    again = create_study(store, spec(space={"lr": [1e-3, 2e-3]}))
    assert (again.study_id, again.is_new) == (study_id, False)
    assert store.spec("s").run_config({}).recipe == 1
    with pytest.raises(UserError, match="different"):
        create_study(store, spec(base=BASE | {"recipe": 2}, space={"lr": [1e-3, 2e-3]}))
    stored = json.loads(second.to_json())
    del stored["base"]["saes"]["init"]  # newer than recipe 2
    with store.write() as connection:
        db.set_attrs(connection, db.study_attrs, study_id, {SPEC_KEY: json.dumps(stored, sort_keys=True)})
    assert create_study(store, spec(space={"lr": [1e-3, 2e-3]})).study_id == study_id
    config = store.spec("s").run_config({})
    assert (config.recipe, config.saes.normalize_activations, config.saes.init) == (2, True, "random")


@pytest.mark.parametrize("base", ["relu", "matryoshka_batch_topk"])
def test_each_architecture_has_its_own_default_unless_the_base_chose(base: str) -> None:
    fields = {"sae_type": base, "sae_positions": ["blocks.0.hook_resid_pre"], "dict_size_to_input_ratio": 2}
    types = ["relu", "batch_topk", "matryoshka_batch_topk"]
    for chosen, expected in (({}, [None, None, 5]), ({"prefixes": [0.5, 1]}, [2, 2, 2])):
        given = {**BASE, "saes": {**fields, **chosen}}
        study = study_spec({"name": "s", "base": given, "space": {"sae_type": types}, "sampler": {"type": "grid"}}, "s")
        found = [study.run_config({"saes.sae_type": name}).saes.prefixes for name in types]
        assert [None if prefixes is None else len(prefixes) for prefixes in found] == expected
