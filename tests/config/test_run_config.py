"""Configs load, mistakes are one line that names file and field, and what is written loads equal."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from saeopt.config import apply_overrides, dump_yaml, load_run_config, read_yaml, stream_key, validate_run
from saeopt.config.marks import Role
from saeopt.config.roles import DATA_AND_MODEL, MAY_DIFFER, MEMBER_FIELDS, PATHS, REPORTING, sections, walk
from saeopt.config.sense import check_sense
from saeopt.config.study_file import load_study_spec
from saeopt.config.sweep import sweep_spec
from saeopt.errors import UserError
from saeopt.saes.registry import ARCHITECTURES, sae_config_class
from saeopt.training.launch import resolve

ROOT = Path(__file__).resolve().parents[2]
SEED = sorted((Path(__file__).parent / "seed").glob("*.yaml"))
OWN = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if not p.name.startswith("sweep"))
SWEEPS = sorted((ROOT / "configs").rglob("sweep-*.yaml"))


@pytest.fixture
def base() -> dict[str, Any]:
    return read_yaml(SEED[-1].with_name("relu.yaml"))


def error_of(base: dict[str, Any], changes: dict[str, Any]) -> str:
    with pytest.raises(UserError) as raised:
        validate_run(apply_overrides(base, changes), "run.yaml")
    text = str(raised.value)
    assert "\n" not in text
    return text


# ---- files
@pytest.mark.parametrize("path", SEED, ids=lambda p: p.stem)
def test_base_configs_of_the_replaced_system_load_unchanged(path: Path) -> None:
    config = load_run_config(path)
    assert config.saes.sae_type == path.stem
    assert config.legacy_scaling is None
    assert config.effective_batch == 400
    assert config.warmup_samples == 20_000
    assert config.lr in (1e-3, 5e-5)


@pytest.mark.parametrize("path", OWN, ids=lambda p: p.stem)
def test_shipped_configs_load_and_survive_dump_and_load(path: Path, tmp_path: Path) -> None:
    config = load_run_config(path)
    check_sense(config)
    (tmp_path / "final.yaml").write_text(dump_yaml(config), encoding="utf-8")
    again = load_run_config(tmp_path / "final.yaml")
    assert again == config
    assert dump_yaml(again) == dump_yaml(config)


def test_every_architecture_has_a_config_for_each_model() -> None:
    names = {p.stem for p in OWN}
    assert {f"{model}-{a}" for model in ("stories260k", "tinystories", "gpt2") for a in ARCHITECTURES} <= names


@pytest.mark.parametrize("sae_type", ARCHITECTURES)
def test_defaults_of_every_architecture_make_sense(base: dict[str, Any], sae_type: str) -> None:
    given = {"sae_type": sae_type, "sae_positions": ["x"]}
    check_sense(validate_run({**base, "saes": given}, "run.yaml"))
    if sae_type == "jumprelu":
        with pytest.raises(UserError, match=r"'saes.density_coeff' has no effect without 'saes.max_density'$"):
            check_sense(validate_run({**base, "saes": {**given, "density_coeff": 2.0}}, "run.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_sweeps_fit_their_base_configs(path: Path) -> None:
    model = path.parent.name
    spec = sweep_spec(path.with_name(f"{model}-{path.stem.removeprefix('sweep-')}.yaml"), path, "test")
    assert "lr" in spec.space


# ---- values
@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("lr: 1e-3", "lr", 0.001),
        ('lr: "1e-3"', "lr", 0.001),
        ("lr: 5e-05", "lr", 0.00005),
        ("lr: 1", "lr", 1.0),
        ("warmup_samples: 1e5", "warmup_samples", 100_000),
        ("warmup_samples: 1e+5", "warmup_samples", 100_000),
        ("warmup_samples: 1.0e+5", "warmup_samples", 100_000),
        ("warmup_samples: 20_000", "warmup_samples", 20_000),
        ('warmup_samples: "20_000"', "warmup_samples", 20_000),
        ("max_grad_norm: null", "max_grad_norm", None),
        ("wandb_tags: relu", "wandb_tags", ["relu"]),
    ],
)
def test_numbers_are_read_as_people_write_them(base: dict[str, Any], text: str, field: str, value: object) -> None:
    config = validate_run({**base, **yaml.safe_load(text)}, "run.yaml")
    read = getattr(config, field)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("mixed_precision: no", "no"), ("performance: {compile: off}", "off"), ("performance: {graphs: on}", "on"),
        ("activations: {cache: off}", "off"),
    ],
)  # fmt: skip
def test_words_that_yaml_takes_for_booleans(base: dict[str, Any], text: str, value: str) -> None:
    given = yaml.safe_load(text)
    found = validate_run({**base, **given}, "run.yaml").model_dump()
    [(field, inner)] = given.items()
    assert (found[field][next(iter(inner))] if isinstance(inner, dict) else found[field]) == value


def test_one_hook_point_may_stand_without_a_list(base: dict[str, Any]) -> None:
    assert validate_run(apply_overrides(base, {"saes.sae_positions": "a"}), "x").saes.sae_positions == ["a"]


# ---- mistakes
@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"learning_rate": 1}, ["unknown key 'learning_rate'", "'lr'"]),
        ({"warmup_sample": 1}, ["unknown key 'warmup_sample'", "'warmup_samples'"]),
        ({"train_batch_size": 1}, ["unknown key 'train_batch_size'", "'data.train_batch_size'"]),
        ({"data.contextlength": 1}, ["unknown key 'data.contextlength'", "'context_length'"]),
        ({"saes.sparsity_coef": 1}, ["unknown key 'saes.sparsity_coef'", "'relu'", "'sparsity_coeff'"]),
        ({"saes.aux_coeff": 1}, ["unknown key 'saes.aux_coeff' of sae_type 'relu'"]),
        ({"lr": "fast"}, ["'lr'", "number", "'fast'"]),
        ({"lr": True}, ["'lr'", "not true or false"]),
        ({"lr": 0}, ["'lr'", "greater than"]),
        ({"lr": float("nan")}, ["'lr'"]),
        ({"lr": float("inf")}, ["'lr'", "finite"]),
        ({"seed": 1.5}, ["'seed'", "1.5"]),
        ({"data.train_batch_size": "many"}, ["'data.train_batch_size'", "'many'"]),
        ({"data.streaming": "maybe"}, ["'data.streaming'", "boolean"]),
        ({"data": 3}, ["'data'", "section"]),
        ({"saes.sae_type": "gates"}, ["'saes.sae_type'", "'gated'"]),
        ({"saes.sae_type": "no.such:Thing"}, ["'saes.sae_type'", "no.such:Thing"]),
        ({"saes.sae_positions": []}, ["'saes.sae_positions'"]),
        ({"lr_schedule": "steps"}, ["'lr_schedule'", "'cosine'"]),
        ({"tlens_model_path": "x"}, ["exactly one of 'tlens_model_name' and 'tlens_model_path'"]),
        ({"tlens_model_name": None}, ["exactly one of 'tlens_model_name' and 'tlens_model_path'"]),
        ({"tlens_model_name": None, "tlens_model_path": "m.pt"}, [".pt", "Hugging Face directory"]),
        ({"data.n_train_samples": None}, ["cosine", "'data.n_train_samples'"]),
        ({"warmup_samples": 500_000}, ["'warmup_samples' (500000)", "'data.n_train_samples' (400000)"]),
        ({"lr_schedule": "linear", "cooldown_samples": 390_000}, ["'cooldown_samples' (390000)"]),
        ({"cooldown_samples": 5}, ["'cooldown_samples'", "linear"]),
        ({"data.prepend_bos": True, "data.context_length": 1}, ["'data.context_length'", "above 1"]),
        ({"saes.sae_type": "hard_concrete", "saes.beta_annealing": True}, ["'beta_annealing' needs 'final_beta'"]),
        ({"saes.sae_type": "gated_hard_concrete", "saes.beta_annealing": True}, ["needs 'final_beta'"]),
        ({"saes.retrain_saes": False}, ["'pretrained_sae_paths'"]),
        ({"saes.sae_type@blocks.0.x": "topk"}, ["per_hook"]),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_field(
    base: dict[str, Any], changes: dict[str, Any], parts: list[str]
) -> None:
    text = error_of(base, changes) if "saes.sae_type" not in changes else _error_anywhere(base, changes)
    for part in parts:
        assert part in text


def _error_anywhere(base: dict[str, Any], changes: dict[str, Any]) -> str:
    with pytest.raises(UserError) as raised:
        validate_run(apply_overrides(base, changes), "run.yaml")
    return str(raised.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("lr: [1\nx", encoding="utf-8")
    (tmp_path / "list.yaml").write_text("- 1", encoding="utf-8")
    (tmp_path / "twice.yaml").write_text("lr: 1\ndata: {}\nlr: 2\n", encoding="utf-8")
    (tmp_path / "inner.yaml").write_text("data:\n  seed: 1\n  seed: 2\n", encoding="utf-8")
    for name, part in [
        ("none.yaml", "no such file"), ("broken.yaml", "line"), ("list.yaml", "key: value"),
        ("twice.yaml", "line 3: 'lr' stands twice"), ("inner.yaml", "line 3: 'seed' stands twice"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=part) as raised:
            load_run_config(tmp_path / name)
        assert name in str(raised.value)


# ---- overrides
def test_overrides_reach_sections_and_hook_points() -> None:
    per_hook = "saes.sparsity_coeff@blocks.2.hook_resid_pre=3"
    config = load_run_config(SEED[-1], ["lr=1e-2", "data.n_train_samples=1e6", "wandb_project=null", per_hook])
    assert (config.lr, config.data.n_train_samples, config.wandb_project) == (0.01, 1_000_000, None)
    assert config.sae_at("blocks.2.hook_resid_pre").sparsity_coeff == 3
    assert config.sae_at("blocks.4.hook_resid_pre").sparsity_coeff == 0.1


def test_another_architecture_drops_only_the_fields_that_it_lacks() -> None:
    path = SEED[0].with_name("gated_hard_concrete.yaml")
    config = load_run_config(path, ["saes.sae_type=gated"])
    assert config.saes.sae_type == "gated"
    assert config.saes.model_dump()["aux_coeff"] == 0.03125


@pytest.mark.parametrize("text", ["lr", "=3", "data.x.y=1", "lr.x=1", "saes.sae_type=gates", "lr=[1", "lr=fast"])
def test_a_bad_override_is_one_line(text: str) -> None:
    with pytest.raises(UserError) as raised:
        load_run_config(SEED[-1], [text])
    assert "\n" not in str(raised.value)


def test_overrides_leave_the_given_mapping_alone(base: dict[str, Any]) -> None:
    apply_overrides(base, {"data.n_train_samples": 5, "saes.k@x": 3})
    assert base["data"]["n_train_samples"] == 400_000
    assert "per_hook" not in base["saes"]


# ---- packs
@pytest.mark.parametrize(
    ("changes", "equal"),
    [
        ({"lr": 0.5, "seed": 7, "max_grad_norm": None, "warmup_samples": 1}, True),
        ({"saes.sparsity_coeff": 3, "saes.sae_positions": ["x"]}, True),
        ({"saes.sae_type": "gated"}, True),
        ({"save_dir": "elsewhere", "wandb_project": None, "wandb_tags": []}, True),
        ({"data.seed": 0}, True),
        ({"data.seed": 1}, False),
        ({"data.context_length": 512}, False),
        ({"data.train_batch_size": 10}, False),
        ({"gradient_accumulation_steps": 10}, False),
        ({"data.n_train_samples": 500_000}, False),
        ({"tlens_model_name": "gpt2"}, False),
        ({"lm_dtype": "float16"}, False),
        ({"log_every_n_grad_steps": 5}, False),
    ],
)
def test_trials_share_a_pack_when_the_stream_is_equal(
    base: dict[str, Any], changes: dict[str, Any], equal: bool
) -> None:
    one, other = validate_run(base, "x"), validate_run(apply_overrides(base, changes), "x")
    assert (stream_key(one) == stream_key(other)) is equal


def test_every_field_says_what_it_fixes() -> None:
    missing = [
        place.path
        for name in ARCHITECTURES
        for place in walk(sae_config_class(name))
        if not any(isinstance(mark, Role) for mark in place.info.metadata)
    ]
    assert missing == []


def test_what_follows_from_the_marks_is_what_older_versions_wrote_down() -> None:
    """Stored hashes, run folders and packs depend on these."""
    reporting = {
        "save_dir", "wandb_project", "wandb_run_name", "wandb_tags", "trackers", "keep_checkpoints", "as_typed",
    }  # fmt: skip
    assert reporting == REPORTING
    assert reporting | {"log_every_n_grad_steps", "threads", "performance"} == MAY_DIFFER
    assert reporting | {
        "recipe", "seed", "seeds", "lr", "lr_schedule", "min_lr_factor", "warmup_samples", "cooldown_samples",
        "max_grad_norm", "adam_betas", "legacy_scaling", "saes", "performance",
    } == MEMBER_FIELDS  # fmt: skip
    assert set(DATA_AND_MODEL) == {
        "tlens_model_name", "tlens_model_path", "data.dataset_name", "data.eval_dataset_name", "data.tokenizer_name",
        "data.activations",
    }  # fmt: skip
    assert set(PATHS) == {*DATA_AND_MODEL, "saes.pretrained_sae_paths", "activations.cache", "save_dir"}


def test_a_stream_key_is_the_one_that_older_versions_stored() -> None:
    run = {"tlens_model_name": "gpt2", "data": {"dataset_name": "x/y", "n_train_samples": 100, "seed": 3}}
    assert (
        stream_key(validate_run({**run, "saes": {"sae_type": "relu", "sae_positions": "a"}}, "x")) == "ff9c79f3a0ae31e1"
    )


# ---- every field is described and read
def _models() -> dict[str, type[Any]]:
    return {**sections(), **{name: sae_config_class(name) for name in ARCHITECTURES}}


def test_every_field_has_a_description() -> None:
    missing = [
        f"{section}.{name}"
        for section, model in _models().items()
        for name, field in model.model_fields.items()
        if not field.description and name not in ("data", "saes", "dataset_name")
    ]
    assert missing == []


def test_every_field_is_read_somewhere() -> None:
    source = "\n".join(
        p.read_text(encoding="utf-8") for p in (ROOT / "saeopt").rglob("*.py")
        if p.parts[-2:] not in (("config", "run.py"), ("config", "saes.py"))
    )  # fmt: skip
    own = (ROOT / "saeopt/config/run.py").read_text() + (ROOT / "saeopt/config/saes.py").read_text()
    unread = [
        f"{section}.{name}"
        for section, model in _models().items()
        for name in model.model_fields
        if not re.search(rf"\.{name}\b|\"{name}\"", source) and not re.search(rf"self\.(data\.)?{name}\b", own)
    ]
    assert unread == []


# ---- resuming
def test_a_resumed_run_may_change_devices_and_logging_only(tmp_path: Path) -> None:
    path = SEED[-1]
    (tmp_path / "final_config.yaml").write_text(dump_yaml(load_run_config(path)), encoding="utf-8")
    config, folder = resolve(path, ["wandb_project=null", "threads=1", "trackers=[tensorboard]"], tmp_path)
    assert folder == tmp_path
    assert (config.wandb_project, config.threads) == (None, 1)
    with pytest.raises(UserError, match=r"'saes\.sparsity_coeff' is 0\.2, but .*final_config\.yaml says 0\.1"):
        resolve(path, ["saes.sparsity_coeff=0.2"], tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        resolve(path, [], tmp_path / "none")


def test_the_reference_pages_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("config_reference", ROOT / "scripts" / "config_reference.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    pages = {name: (script.DOCS / name).read_text(encoding="utf-8") for name in script.PAGES}
    told = re.findall(r"## `saes` with `sae_type: (\w+)`", pages["configuration.md"])  # a newcomer may be missing yet
    written = {"configuration.md": script.configuration(told), "study.md": script.study()}
    assert pages == {**written, "metrics.md": script.metrics()}, "run the script"


def test_the_reference_has_every_field_and_its_example_study_is_one(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert [place.path for place in walk() if f"| `{place.name}` |" not in page] == []
    example = (ROOT / "docs" / "study.md").read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    (tmp_path / "study.yaml").write_text(example.replace("../configs", str(ROOT / "configs")), encoding="utf-8")
    assert load_study_spec(tmp_path / "study.yaml").objectives[0].target_l0 == 30
    assert "| `stall` |" in (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert re.findall(r"\| `(\w+)` \| [^|]* \| +\|", (ROOT / "docs" / "study.md").read_text(encoding="utf-8")) == []
