"""Which defaults hold for a file that does not name its recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from saeopt.config import apply_overrides, dump_yaml, load_run_config, validate_run
from saeopt.config.study import StudySpec
from saeopt.config.study_file import study_spec
from saeopt.config.sweep import sweep_spec
from saeopt.errors import UserError
from saeopt.saes.registry import get_sae
from saeopt.training.launch import notices, resolve

SEED = Path(__file__).parent / "seed" / "relu.yaml"


@pytest.fixture
def raw() -> dict[str, Any]:
    """Nothing that a recipe decides."""
    return {
        "tlens_model_name": "x",
        "data": {"dataset_name": "d", "n_train_samples": 1000},
        "saes": {"sae_type": "gated", "sae_positions": ["h"]},
    }


def written(folder: Path, raw: dict[str, Any], name: str = "run.yaml") -> Path:
    (folder / name).write_text(yaml.safe_dump(raw), encoding="utf-8")
    return folder / name


def test_a_hand_written_file_gets_recipe_3_and_a_notice(raw, tmp_path, caplog):
    config = load_run_config(written(tmp_path, raw))
    assert (config.recipe, config.schedule, config.max_grad_norm) == (3, "linear", 1.0)
    assert get_sae("gated")(8, 64, config.saes, recipe=config.recipe).normalisation == "mean_scale"
    assert (config.cooldown(1000), config.sparsity_warmup(config.saes, 1000)) == (200, 50)
    assert (config.min_lr_factor, config.adam_betas) == (0.0, (0.9, 0.99))
    with caplog.at_level("INFO", logger="saeopt"):
        notices(config, resumed=False)
    (notice,) = [r.getMessage() for r in caplog.records if "recipe" in r.getMessage()]
    assert "\n" not in notice
    assert all(
        words in notice for words in ("recipe: 1", "centred", "lr falls to 0", "λ rises", "0.99", "norm 1", "AuxK")
    )


def test_what_was_stored_before_topk_started_as_in_its_paper_keeps_its_start(raw, tmp_path):
    raw = raw | {"recipe": 2, "saes": raw["saes"] | {"sae_type": "topk"}}
    starts = {}
    for name in ("run.yaml", "final_config.yaml"):
        config = load_run_config(written(tmp_path, raw, name))
        starts[name] = get_sae("topk")(8, 64, config.saes, recipe=config.recipe).encoder_start
    assert starts == {"run.yaml": "transpose", "final_config.yaml": "matched"}
    study = study_spec({"name": "s", "base": raw, "space": {"seed": [0, 1]}}, "s.yaml")
    assert StudySpec.from_json(study.to_json()).base["saes"]["encoder_start"] is None
    old = json.loads(study.to_json())
    del old["base"]["saes"]["encoder_start"]
    assert StudySpec.from_json(json.dumps(old)).base["saes"]["encoder_start"] == "matched"


def test_recipe_3_resamples_relu_and_gates_and_older_ones_only_on_request(raw):
    def of(recipe: int, **saes: object) -> tuple[int, int]:
        config = validate_run({**raw, "recipe": recipe, "saes": {**raw["saes"], **saes}}, "x")
        total = config.data.n_train_samples or 0
        return config.resample_every_tokens(config.saes, total), config.dead_after_tokens(config.saes, total)

    tokens = 1000 * validate_run(raw, "x").data.context_length
    for sae_type in ("relu", "gated", "hard_concrete", "gated_hard_concrete"):
        assert of(3, sae_type=sae_type) == (tokens // 20, tokens // 20)
        assert of(2, sae_type=sae_type) == of(1, sae_type=sae_type) == (0, tokens // 10)
        assert of(3, sae_type=sae_type, resample_every_tokens=0)[0] == 0
        assert of(2, sae_type=sae_type, resample_every_tokens=77, dead_after_tokens=5) == (77, 5)
    assert of(3, sae_type="batch_topk") == of(3, sae_type="jumprelu") == (0, tokens // 10)
    assert of(3, sae_type="jumprelu", resample_every_tokens=77) == (77, tokens // 10)


@pytest.mark.parametrize("recipe", [1, 2, 3])
def test_a_file_that_names_its_recipe_gets_no_notice(raw, tmp_path, caplog, recipe):
    config = load_run_config(written(tmp_path, raw | {"recipe": recipe}))
    with caplog.at_level("INFO", logger="saeopt"):
        notices(config, resumed=False)
    assert config.recipe == recipe
    assert not [r for r in caplog.records if "recipe" in r.getMessage()]


def test_what_saeopt_stored_without_a_recipe_is_under_the_first(raw, tmp_path):
    config = load_run_config(written(tmp_path, raw, "final_config.yaml"))
    assert (config.recipe, config.schedule, config.saes.decoder_norm) == (1, "cosine", "free")
    assert (config.cooldown(1000), config.sparsity_warmup(config.saes, 1000)) == (1000, 0)
    assert (config.min_lr_factor, config.adam_betas) == (0.1, (0.9, 0.999))


def test_the_replaced_systems_files_keep_the_old_meaning_with_its_scaling_alone():
    assert load_run_config(SEED).recipe == 3
    assert load_run_config(SEED, ["legacy_scaling=true"]).recipe == 1
    assert load_run_config(SEED, ["legacy_scaling=true", "recipe=2"]).recipe == 2


@pytest.mark.parametrize("recipe", [1, 2, 3])
def test_a_written_config_loads_equal_under_its_recipe(raw, tmp_path, recipe):
    config = validate_run(raw | {"recipe": recipe}, "x")
    (tmp_path / "final_config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    assert load_run_config(tmp_path / "final_config.yaml") == config


def test_a_run_of_the_first_version_goes_on_with_its_own_file_beside_it(raw, tmp_path):
    """Its final_config.yaml names every field of then, and no recipe; the file beside it names none either."""
    first = validate_run(raw | {"recipe": 1}, "x").model_dump(mode="json")
    del first["recipe"], first["saes"]["sparsity_warmup_samples"]
    written(tmp_path, first, "final_config.yaml")
    config, _ = resolve(written(tmp_path, raw), [], tmp_path)
    assert config.recipe == 1
    with pytest.raises(UserError, match="'recipe' is 2"):
        resolve(written(tmp_path, raw), ["recipe=2"], tmp_path)


def test_a_stored_study_without_a_recipe_goes_on_under_the_first(raw):
    made = study_spec({"name": "s", "base": raw, "space": {"lr": [1e-3, 2e-3]}}, "study.yaml")
    assert made.base["recipe"] == 3
    older = made.older[-1]
    stored = older.model_copy(update={"base": {k: v for k, v in older.base.items() if k != "recipe"}})
    config = StudySpec.from_json(stored.to_json()).run_config({"lr": 1e-3})
    assert (config.recipe, config.schedule, config.saes.decoder_norm) == (1, "cosine", "free")


def test_a_study_whose_cells_change_architecture_gives_each_its_own_defaults(raw):
    raw = apply_overrides(raw, {"saes.sae_type": "relu"})
    made = study_spec({"name": "s", "base": raw, "space": {"sae_type": ["relu", "gated"]}}, "study.yaml")
    from saeopt.saes.registry import get_sae

    for sae_type, unit in (("relu", False), ("gated", True)):
        config = made.run_config({"saes.sae_type": sae_type})
        sae = get_sae(sae_type)(4, 8, config.saes, recipe=config.recipe)
        assert sae.unit_rows is unit
    longer = made.run_config({"data.n_train_samples": 5000})
    assert longer.cooldown(5000) == 1000


def test_a_sweep_over_a_stored_config_keeps_its_recipe(raw, tmp_path):
    base = written(tmp_path, raw, "final_config.yaml")
    assert sweep_spec(base, written(tmp_path, {"lrs": [1e-3]}, "sweep.yaml"), "s").base["recipe"] == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": 4}, "'recipe'"),
        ({"saes.sparsity_warmup_samples": 2000}, r"'saes.sparsity_warmup_samples' \(2000\)"),
        ({"recipe": 1, "lr_schedule": "linear", "data.n_train_samples": None}, "'lr_schedule: linear' needs"),
        ({"cooldown_samples": 10, "data.n_train_samples": None}, "'lr_schedule: linear' needs"),
        ({"cooldown_samples": 10, "lr_schedule": "constant"}, "'cooldown_samples' needs"),
    ],
)
def test_mistakes(raw, changes, words):
    with pytest.raises(UserError, match=words):
        validate_run(apply_overrides(raw, changes), "run.yaml")


def test_recipe_2_scales_and_starts_at_random_where_recipe_3_centres_and_starts_in_a_subspace(raw):
    positions = ["blocks.1.hook_resid_pre", "blocks.1.hook_attn_out", "blocks.1.attn.hook_z"]
    raw = apply_overrides(raw, {"saes.sae_positions": positions})
    found = {}
    for recipe in (1, 2, 3):
        config = validate_run(raw | {"recipe": recipe}, "x")
        sections = [config.sae_at(key) for key in positions]
        kinds = {get_sae("gated")(8, 64, s, recipe=recipe).normalisation for s in sections}
        found[recipe] = kinds, [s.init for s in sections]
    assert found[1] == found[2] == ({"scale"}, ["random"] * 3)
    assert found[3] == ({"mean_scale"}, ["random", "active_subspace", "active_subspace"])
    chosen = validate_run(apply_overrides(raw, {"saes.init": "active_subspace", "legacy_scaling": True}), "x")
    assert chosen.sae_at(positions[0]).init == "active_subspace"
    assert get_sae("gated")(8, 64, chosen.saes, legacy_scaling=True, recipe=3).normalisation == "none"
