"""The study files that ship with the project."""

from __future__ import annotations

from pathlib import Path

import pytest

from saeopt.config.study import TARGET
from saeopt.config.study_file import load_study_spec
from saeopt.reach import with_targets
from saeopt.trials.create import planned_cells
from saeopt.views.notes import LIMIT, study_text

STUDIES = sorted((Path(__file__).resolve().parents[2] / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_the_study_file_is_valid_in_every_corner_of_its_space(path: Path) -> None:
    spec = load_study_spec(path)
    if TARGET in spec.space:
        spec = with_targets(spec, [8, 16, 32])  # in place of `auto`
    cells, proposed = planned_cells(spec)
    assert cells
    assert spec.sampler.type == "grid" or len(cells) + proposed == spec.max_trials
    assert len(study_text(spec)) < LIMIT


def test_there_are_examples_of_a_grid_and_of_a_search_over_architectures() -> None:
    specs = {path.stem: load_study_spec(path) for path in STUDIES}
    assert specs["tinystories-relu-grid"].sampler.type == "grid"
    searched = specs["tinystories-architectures"]
    assert {d.when["saes.sae_type"][0] for d in searched.space["saes.sparsity_coeff"]} >= {"relu", "gated"}
    assert len({cell.config.saes.sae_type for cell in planned_cells(searched)[0]}) == 5
