"""What people and programs see of a study whose trials have several seeds."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from study_outcomes import HOOKS, evaluation

from saeopt.spread import over_seeds

Cli = Callable[..., Any]


def three(l0: float, fvu: float) -> dict[str, Any]:
    """An evaluation of three seeds whose FVU lie 0.002 apart."""
    each = [evaluation(l0, fvu + 0.002 * i) for i in (-1, 0, 1)]
    return {h: {**over_seeds([e[h] for e in each]), "found_again": 0.25, "pw_mcc": 0.5} for h in HOOKS}


@pytest.fixture
def study(cli: Cli, study_file: Path, finish: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> str:
    """#1 is worse than #0 by less than the noise of its range, #2 by more."""
    study_file.write_text(study_file.read_text() + "seeds: 3\n")
    cli("create", study_file)
    for outcome in ((20.0, 0.100), (21.0, 0.101), (22.0, 0.150), (40.0, 0.05)):
        finish("six", three(*outcome))
    monkeypatch.setattr("saeopt.console.console.width", 80)
    return "six"


def test_best_shows_the_spread_and_what_it_cannot_tell_apart(cli: Cli, study: str) -> None:
    text = cli("best", study, "--hook", HOOKS[0]).stdout
    assert max(map(len, [line for line in text.splitlines() if "/" not in line])) <= 80
    assert "±0.002" in text
    assert "25.0%" in text
    assert "beaten within the noise alone: #1\n" in text
    assert "16 to 32: #1 not really worse than #0 (noise: 0.004)" in text
    assert "trials not named are really worse (95 %)" in text
    found = json.loads(cli("best", study, "--hook", HOOKS[0], "--json").stdout)[HOOKS[0]]
    assert found["not_really_beaten"] == [1]
    low, high = found["ranges"]
    assert low["not_really_worse"] == [1]
    assert low["noise"] == pytest.approx(2.446912 * 0.002 * (2 / 3) ** 0.5, rel=1e-4)  # t of 6 degrees of freedom
    assert high["not_really_worse"] == []
    assert low["metrics"]["fvu_std"] == pytest.approx(0.002, rel=1e-4)


def test_status_notes_columns_and_tables_say_how_far_the_seeds_lie_apart(
    cli: Cli, study: str, store_url: str, tmp_path: Path
) -> None:
    text = cli("status", study).stdout
    assert max(map(len, text.splitlines())) <= 80
    assert "over 3 seeds" in text
    assert "#0 20 → 0.100 ± 0.002" in text
    status = json.loads(cli("status", study, "--json").stdout)
    assert status["seeds"] == 3
    assert status["front"][HOOKS[0]][0]["fvu_std"] == pytest.approx(0.002, rel=1e-4)
    stored = optuna.load_study(study_name=study, storage=store_url)
    assert stored.trials[0].user_attrs["fvu_std"] == pytest.approx(0.002, rel=1e-4)
    assert stored.trials[0].user_attrs["pw_mcc"] == 0.5
    attributes = stored._storage.get_study_system_attrs(stored._study_id)
    notes = [v for k, v in attributes.items() if "note" in k and isinstance(v, str)]
    assert any("0.1000 ±0.002" in note and "over 3 seeds" in note for note in notes)
    assert any("seeds: 3 per trial" in note for note in notes)
    cli("export", study, "--csv", tmp_path / "t.csv")
    row = next(csv.DictReader((tmp_path / "t.csv").open()))
    assert (row["n_seeds"], float(row["fvu_std"])) == ("3", pytest.approx(0.002, rel=1e-4))


def test_best_copies_all_seeds(cli: Cli, study: str, tmp_path: Path) -> None:
    run = tmp_path / "out" / study / "0"
    files = ["samples_9.safetensors", "seeds/1/samples_9.safetensors", "seeds/1/final_config.yaml"]
    for name in [*files, "seeds/1/samples_5.safetensors"]:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    cli("best", study, "--copy", tmp_path / "kept")
    copied = tmp_path / "kept" / f"{study}-0"
    assert {str(f.relative_to(copied)) for f in copied.rglob("*") if f.is_file()} == set(files)
    assert (copied / files[1]).read_text() == files[1]


def test_more_seeds_are_another_study_and_the_same_number_is_the_same(cli: Cli, study: str, study_file: Path) -> None:
    assert "is there already" in cli("create", study_file).stdout
    assert "is there already" in cli("create", study_file, "--set", "seeds=3").stdout
    raw = yaml.safe_load(study_file.read_text())
    study_file.write_text(yaml.safe_dump({**raw, "seeds": 2}))
    assert "'base.seeds'" in cli("create", study_file, "--name", study, code=2).stderr


def test_a_preview_counts_the_saes_of_all_seeds_and_makes_smaller_packs(
    study_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saeopt.config.study_file import load_study_spec
    from saeopt.trials.create import planned_cells
    from saeopt.views import preview

    monkeypatch.chdir(study_file.parent)
    raw = yaml.safe_load(study_file.read_text())
    raw["space"]["lr"] = [1e-3 * i for i in range(1, 41)]  # 120 cells
    sizes = {}
    for seeds in (1, 3):
        study_file.write_text(yaml.safe_dump({**raw, "seeds": seeds}))
        spec = load_study_spec(study_file)
        packs = preview.packs_of(spec, planned_cells(spec)[0], preview._largest_pack(spec))
        sizes[seeds] = [len(pack) for pack in packs]
    assert sizes == {1: [64, 56], 3: [21, 21, 21, 21, 21, 15]}
