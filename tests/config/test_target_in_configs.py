"""`saes.target_l0` in configs, names and studies; what it does in training: tests/training/test_target_l0.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from saeopt.config import apply_overrides, validate_run
from saeopt.config.run import RunConfig
from saeopt.config.study_file import load_study_spec, study_spec
from saeopt.errors import UserError
from saeopt.runs.naming import run_name
from saeopt.search.objectives import objective_values
from saeopt.search.sensible import check_study
from saeopt.search.space import Space

HOOK = "blocks.2.hook_resid_pre"
BASE: dict[str, Any] = {
    "recipe": 2,
    "tlens_model_name": "tiny",
    "data": {"dataset_name": "text", "n_train_samples": 100},
    "saes": {"sae_type": "topk", "sae_positions": [HOOK]},
}


def config(**saes: Any) -> RunConfig:
    return validate_run({**BASE, "saes": {**BASE["saes"], **saes}}, "a.yaml")


def k_of(found: RunConfig, hook: str = HOOK) -> int:
    k: int = found.sae_at(hook).k  # type: ignore[attr-defined]
    return k


def test_topk_selects_so_many() -> None:
    assert k_of(config(target_l0="16")) == 16
    assert k_of(config(target_l0=16, k=16)) == 16
    assert k_of(config()) == 32
    again = validate_run(config(target_l0=16).model_dump(mode="json"), "final_config.yaml")
    assert (k_of(again), again.saes.target_l0) == (16, 16)


@pytest.mark.parametrize(
    ("saes", "said"),
    [
        ({"k": 8, "target_l0": 16}, "a.yaml: 'saes': 'k' (8) and 'target_l0' (16) are the same here and differ"),
        ({"target_l0": 16.5}, "'target_l0' (16.5) is k here: must be a whole number"),
        ({"target_l0": 0}, "a.yaml: 'saes.target_l0': must be greater than 0"),
        ({"target_l0": "many"}, "a.yaml: 'saes.target_l0': must be a valid number"),
        ({"target_l0": "auto"}, "a.yaml: 'saes.target_l0': must be a number here; 'auto' is for a study"),
        (
            {"sae_type": "relu", "target_l0": "auto"},
            "a.yaml: 'saes.target_l0': must be a number here; 'auto' is for a study",
        ),
    ],
)
def test_what_cannot_be_is_told_in_one_line(saes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        config(**saes)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_at_one_site_k_and_the_target_take_each_others_place() -> None:
    assert k_of(config(target_l0=16, per_hook={HOOK: {"k": 4}})) == 4
    assert k_of(config(k=16, per_hook={HOOK: {"target_l0": 4}})) == 4
    found = config(sae_type="relu", target_l0=16, per_hook={HOOK: {"target_l0": None}})
    assert (found.saes.target_l0, found.sae_at(HOOK).target_l0) == (16, None)
    with pytest.raises(UserError, match="differ: give one of them"):
        config(per_hook={HOOK: {"target_l0": 4, "k": 8}})


def test_a_runs_name_says_its_target() -> None:
    assert "-L0-16-" in run_name(config(sae_type="relu", target_l0=16))
    assert "-lambda1-" in run_name(config(sae_type="relu"))


# ---- studies
def study(space: dict[str, Any], saes: dict[str, Any] | None = None, **more: Any) -> Any:
    base = {**BASE, "saes": {**BASE["saes"], **(saes or {})}}
    return study_spec({"name": "s", "base": base, "space": space, **more}, "study.yaml")


def cells(spec: Any) -> list[Any]:
    found = Space(spec).grid()
    check_study(spec, found)
    return found


@pytest.mark.parametrize("base", ["topk", "relu"])
def test_a_study_sweeps_it_over_all_architectures(base: str) -> None:
    spec = study({"sae_type": ["relu", "gated", "topk"], "saes.target_l0": [8, "16", 32]}, {"sae_type": base})
    found = cells(spec)
    assert len(found) == 9
    assert {cell.config.saes.target_l0 for cell in found} == {8, 16, 32}
    assert sorted(c.config.saes.k for c in found if c.config.saes.sae_type == "topk") == [8, 16, 32]
    assert len({run_name(cell.config) for cell in found}) == 9
    assert type(spec).from_json(spec.to_json()) == spec


def test_beside_it_a_swept_lambda_or_k_is_refused() -> None:
    with pytest.raises(UserError, match=r"'space.saes.sparsity_coeff': changes nothing beside 'saes.target_l0'"):
        cells(study({"saes.sparsity_coeff": [0.1, 1]}, {"sae_type": "relu", "target_l0": 8}))
    with pytest.raises(UserError, match=r"'k' .* and 'target_l0' .* differ"):
        cells(study({"saes.k": [8, 16]}, {"target_l0": 8}))
    with pytest.raises(UserError, match=r"'k' .* and 'target_l0' .* differ"):
        cells(study({"saes.target_l0": [8, 16]}, {"k": 4}))
    both = study(
        {
            "sae_type": ["relu", "topk"],
            "saes.target_l0": {"values": [8, 16], "when": {"sae_type": "relu"}},
            "saes.k": {"values": [8, 16], "when": {"sae_type": "topk"}},
        }
    )
    assert len(cells(both)) == 4


def test_an_objective_without_a_target_takes_the_saes() -> None:
    row = {"fvu": 0.1, "l0": 16.0, "target_l0": 8.0}
    one = study({"saes.target_l0": [8]}, objectives=["fvu"])
    assert objective_values(one, {HOOK: row}) == pytest.approx([0.1 + 0.598], abs=1e-3)  # ln 2 − ln 1.1
    assert objective_values(one, {HOOK: {**row, "l0": 8.5}}) == [0.1]
    own = study({"saes.target_l0": [8]}, objectives=[{"metric": "fvu", "target_l0": 16}])
    assert objective_values(own, {HOOK: row}) == [0.1]
    front = study({"saes.target_l0": [8]}, objectives=["fvu", "l0"])  # a front shows L0 itself
    assert objective_values(front, {HOOK: row}) == [0.1, 16.0]


def test_what_older_versions_stored_has_no_target() -> None:
    raw = config().model_dump(mode="json")
    del raw["saes"]["target_l0"]
    assert validate_run(raw, "final_config.yaml") == config()
    assert apply_overrides(raw, {"saes.target_l0": 8})["saes"]["target_l0"] == 8


def test_the_study_that_ships_has_the_same_targets_for_all_architectures() -> None:
    spec = load_study_spec(Path(__file__).resolve().parents[2] / "studies" / "stories260k-target-l0.yaml")
    found = [(cell.config.saes.sae_type, cell.config.saes.target_l0) for cell in Space(spec).grid()]
    assert len(set(found)) == len(found) == 3 * len(spec.sae_types)
