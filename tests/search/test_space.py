"""The search space: order of the grid, conditions, designs, what is invalid."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from _stores import grid_spec

from saeopt.config.keys import stream_key
from saeopt.errors import UserError
from saeopt.search.sensible import check_study
from saeopt.search.space import Space
from saeopt.trials.create import planned_cells

SWEEP: dict[str, Any] = {
    "saes.sparsity_coeff": [0.1, 1.0],
    "data.train_batch_size": [4, 8],
    "saes.dict_size_to_input_ratio": [4, 8],
    "gradient_accumulation_steps": [1, 2],
}


def test_what_fixes_the_stream_varies_slowest() -> None:
    cells = Space(grid_spec(space=SWEEP)).grid()
    streams = [stream_key(c.config) for c in cells]
    assert len(cells) == 16
    assert len(set(streams)) == 4
    assert sum(a != b for a, b in itertools.pairwise(streams)) == 3
    ratios = [c.config.saes.dict_size_to_input_ratio for c in cells[:4]]
    assert ratios == [4, 4, 8, 8]


def test_max_trials_keeps_the_first_cells() -> None:
    every = Space(grid_spec(space=SWEEP)).grid()
    kept = Space(grid_spec(space=SWEEP, max_trials=5)).grid()
    assert [c.params for c in kept] == [c.params for c in every[:5]]


def test_conditional_parameters_exist_only_under_their_condition() -> None:
    space = {
        "sae_type": ["relu", "topk", "gated"],
        "saes.sparsity_coeff": [
            {"values": [0.1, 1.0], "when": {"sae_type": "relu"}},
            {"values": [5.0], "when": {"sae_type": "gated"}},
        ],
        "saes.k": {"values": [8, 16], "when": {"sae_type": "topk"}},
    }
    cells = Space(grid_spec(space=space)).grid()
    found = [(c.config.saes.sae_type, c.config.saes.sparsity_coeff, getattr(c.config.saes, "k", None)) for c in cells]
    assert [f[0] for f in found] == ["relu", "relu", "topk", "topk", "gated"]
    assert [f[1] for f in found if f[0] != "topk"] == [0.1, 1.0, 5.0]
    assert [f[2] for f in found if f[0] == "topk"] == [8, 16]
    assert set(cells[0].params) == {"saes.sae_type", "saes.sparsity_coeff[relu]"}


def test_values_that_are_lists_are_written_as_lists() -> None:
    space = {"sae_type": ["relu"], "saes.prefixes": [[0.25, 1], [0.5, 1]]}
    assert [c.config.saes.model_dump()["prefixes"] for c in Space(grid_spec(space=space)).grid()] == [
        [0.25, 1],
        [0.5, 1],
    ]
    with pytest.raises(UserError, match=r"'saes.prefixes': each value is a list itself, as in .* \(got 0.25\)"):
        grid_spec(space={"sae_type": ["relu"], "saes.prefixes": [0.25, 1]})


def test_a_condition_may_name_a_field_that_the_bases_architecture_lacks() -> None:
    space = {
        "sae_type": ["jumprelu"],  # the base's is relu
        "saes.penalty": ["step", "quadratic"],
        "saes.l0_penalty_target": {"values": [8, 16], "when": {"saes.penalty": "quadratic"}},
    }
    found = [c.params.get("saes.l0_penalty_target") for c in Space(grid_spec(space=space)).grid()]
    assert found == [None, 8, 16]


def test_a_field_of_one_architecture_needs_a_condition() -> None:
    with pytest.raises(UserError, match="sae_type relu has no such field"):
        grid_spec(space={"sae_type": ["relu", "topk"], "saes.k": [8]})


def test_parameters_may_differ_per_hook_point() -> None:
    hook = "blocks.1.hook_resid_pre"
    cells = Space(grid_spec(space={f"saes.sparsity_coeff@{hook}": [1, 2]})).grid()
    assert [c.config.sae_at(hook).sparsity_coeff for c in cells] == [1.0, 2.0]
    assert [c.config.sae_at("another").sparsity_coeff for c in cells] == [0.1, 0.1]


def test_lists_of_hook_points_are_values() -> None:
    hooks = [["blocks.0.hook_resid_pre"], ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]]
    cells = Space(grid_spec(space={"saes.sae_positions": hooks})).grid()
    assert [c.config.saes.sae_positions for c in cells] == hooks


def test_a_step_makes_a_range_a_grid() -> None:
    cells = Space(grid_spec(space={"lr": {"low": 0.1, "high": 0.5, "step": 0.2}})).grid()
    assert [c.config.lr for c in cells] == [0.1, 0.3, 0.5]
    with pytest.raises(UserError, match="a list or a 'step'"):
        Space(grid_spec(space={"lr": {"low": 0.1, "high": 0.5}})).grid()


def test_every_cell_is_validated_at_creation() -> None:
    with pytest.raises(UserError, match="warmup_samples"):
        planned_cells(grid_spec(space={"warmup_samples": [0, 1000]}))
    with pytest.raises(UserError, match="warmup_samples"):
        planned_cells(
            grid_spec(space={"warmup_samples": {"low": 0, "high": 1000, "int": True}}, sampler="tpe", max_trials=9)
        )


@pytest.mark.parametrize("sampler", [{}, {"sampler": "random", "max_trials": 9}])
def test_a_study_whose_trials_would_never_be_evaluated_is_refused(sampler: dict[str, Any]) -> None:
    base = grid_spec().base
    nothing = base | {"data": base["data"] | {"n_eval_samples": 0}}
    with pytest.raises(UserError, match=r"'data\.n_eval_samples' is 0"):
        planned_cells(grid_spec(base=nothing, **sampler))
    with pytest.raises(UserError, match="'eval_every_n_samples' is null"):
        planned_cells(grid_spec(base=base | {"eval_every_n_samples": None}, **sampler))


def test_the_design_of_the_first_trials_fills_the_space() -> None:
    space = {
        "saes.sparsity_coeff": {"low": 0.05, "high": 10, "log": True},
        "saes.dict_size_to_input_ratio": [8, 16, 32],
    }
    cells, proposed = planned_cells(
        grid_spec(space=space, sampler={"type": "tpe", "n_startup_trials": 12}, max_trials=40)
    )
    assert (len(cells), proposed) == (12, 28)
    shares = sorted(math.log(c.params["saes.sparsity_coeff"] / 0.05) / math.log(200) for c in cells)
    gaps = [b - a for a, b in zip([0.0, *shares], [*shares, 1.0], strict=True)]
    assert max(gaps) < 0.25
    counts = [sum(c.params["saes.dict_size_to_input_ratio"] == r for c in cells) for r in (8, 16, 32)]
    assert min(counts) >= 3


def test_cells_that_come_out_equal_are_one_cell() -> None:
    cells = Space(grid_spec(space={"data.seed": [None, 0, "0"], "lr": ["1e-3", 0.001]})).grid()
    assert len(cells) == 2  # data.seed null and 0 are different configs of one stream
    assert len({c.stream for c in cells}) == 1


def test_how_a_step_is_computed_may_be_varied_and_what_changes_no_result_may_not() -> None:
    def check(field: str, values: list[object]) -> None:
        found = grid_spec(space={field: values})
        check_study(found, Space(found).grid())

    check("performance.stack", ["fused", "reference"])
    check("data.context_length", [16, 32])
    refused = {"data.eval_batch_size": [1, 2], "activations.cache": ["off", "auto"], "saes.name": ["a", "b"]}
    for field, values in refused.items():
        with pytest.raises(UserError, match=rf"'space\.{field}': changes no result"):
            check(field, values)
