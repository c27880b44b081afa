"""Which rule of early stopping a new study has where its file names none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from saeopt.config.study import StudySpec
from saeopt.config.study_file import load_study_spec
from saeopt.search.stopping import with_default_rule
from saeopt.trials.create import create_study
from saeopt.trials.storage import Store

Write = Callable[..., Path]


@pytest.fixture
def study_of(tmp_path: Path, base_config: dict[str, Any]) -> Write:
    """A study file of eight random trials."""

    def write(**fields: Any) -> Path:
        raw: dict[str, Any] = {
            "name": "new", "base": base_config, "output_dir": str(tmp_path / "out"), "max_trials": 8,
            "space": {"lr": {"low": 1e-4, "high": 1e-2, "log": True}}, "sampler": "random", **fields,
        }  # fmt: skip
        path = tmp_path / "new.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


def stored(url: str) -> StudySpec:
    store = Store.open(url)
    spec = store.spec("new")
    store.close()
    return spec


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({}, "halving"),
        ({"objectives": [{"metric": "fvu", "hook_points": "all"}]}, "halving"),
        ({"early_stopping": {"collapse": None}}, "halving"),
        ({"early_stopping": "none"}, "none"),
        ({"early_stopping": "pareto"}, "pareto"),
        ({"objectives": ["fvu"]}, "none"),
        ({"sampler": "grid", "space": {"lr": [1e-3, 1e-2]}, "max_trials": None}, "none"),
        ({"max_trials": 1}, "none"),
    ],
    ids=[
        "two objectives", "one at all hook points", "collapse alone", "none", "pareto", "one objective", "grid",
        "nobody to compare with",
    ],
)  # fmt: skip
def test_several_objectives_that_are_sampled_are_halved(fields: dict[str, Any], rule: str, study_of: Write) -> None:
    spec = with_default_rule(load_study_spec(study_of(**fields)))
    assert spec.early_stopping.type == rule
    assert (spec.early_stopping.collapse is None) == ("collapse" in (fields.get("early_stopping") or {}))
    assert StudySpec.from_json(spec.to_json()).to_json() == spec.to_json()


def test_create_says_what_is_measured_at_which_rungs(cli: Any, study_of: Write, store_url: str) -> None:
    path = study_of()
    shown = [cli("create", path, "--elsewhere", *more).stdout for more in (["--dry-run"], [])]
    for said in shown:
        assert "halving compares l0, explained_variance at 10% (100 samples) and 30% (300 samples)" in said
    assert stored(store_url).early_stopping.type == "halving"
    assert "is there already, with 8 trials" in cli("create", path, "--elsewhere").stdout


@pytest.mark.parametrize("recipe", [{}, {"recipe": 3}], ids=["recipe left out", "recipe given"])
def test_a_study_that_was_made_without_it_stays_as_it_is(
    recipe: dict[str, Any], cli: Any, study_of: Write, base_config: dict[str, Any], store_url: str
) -> None:
    path = study_of(base={**base_config, **recipe})
    store = Store.open(store_url, create=True)
    create_study(store, load_study_spec(path))  # as an older version did
    store.close()
    said = cli("create", path, "--elsewhere").stdout
    assert "is there already, with 8 trials" in said
    assert "halving" not in said, "what is said is of the study that is there"
    assert stored(store_url).early_stopping.type == "none"
    study_of(base={**base_config, **recipe}, early_stopping="halving")
    assert "with a different 'early_stopping." in cli("create", path, "--elsewhere", code=2).stderr


def test_changes_to_the_base_config_leave_the_rule_to_its_default(cli: Any, study_of: Write, store_url: str) -> None:
    cli("create", study_of(), "--elsewhere", "--set", "data.n_train_samples=500")
    spec = stored(store_url)
    assert spec.early_stopping.type == "halving"
    assert spec.base["data"]["n_train_samples"] == 500
    cli("delete", "new", "--yes")
    cli("create", study_of(early_stopping="none"), "--elsewhere", "--set", "data.n_train_samples=500")
    assert stored(store_url).early_stopping.type == "none"
