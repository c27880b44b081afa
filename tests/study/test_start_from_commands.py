"""`study create` with `enqueue` and `start_from`, on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from saeopt.trials.internals import get_attrs, note_keys, study_attrs
from saeopt.trials.storage import Store


@pytest.fixture
def next_study(tmp_path: Path, base_config: dict[str, Any]) -> Callable[..., Path]:
    def write(**fields: Any) -> Path:
        raw: dict[str, Any] = {
            "name": "next", "base": base_config, "output_dir": str(tmp_path / "out"), "max_trials": 8,
            "space": {"saes.target_l0": {"low": 5, "high": 50, "log": True}, "lr": {"low": 1e-3, "high": 5e-3}},
            "sampler": {"type": "tpe", "n_startup_trials": 4}, **fields,
        }  # fmt: skip
        path = tmp_path / "next.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


def trial_note(url: str, study: str, number: int) -> str:
    store = Store.open(url)
    study_id = store.study_id(study)
    key = note_keys(store.study(study).trials[number]._trial_id)[0]
    with store.read() as connection:
        note = get_attrs(connection, study_attrs, study_id, key)[key]
    store.close()
    return str(note)


def test_a_study_starts_from_another_and_stays_as_it_was_made(
    cli: Any, study_file: Path, finish: Callable[..., None], next_study: Callable[..., Path], store_url: str
) -> None:
    cli("create", study_file, "--elsewhere")
    for outcome in ((10.0, 0.4), (20.0, 0.2), (40.0, 0.3), (30.0, 0.15)):
        finish("six", outcome)
    path = next_study(start_from={"study": "six", "front": True}, enqueue=[{"lr": 0.002}])
    tried = cli("create", path, "--elsewhere", "--dry-run").stdout
    made = cli("create", path, "--elsewhere").stdout
    for shown in (tried, made):
        assert "first come the fronts of study six: #1, #0, #3; 'saes.target_l0' is the L0 that they reached" in shown
        assert "lr of #3 is left to the design: 0.01 is not in 0.001 to 0.005" in shown
        assert "not varied here" not in shown, "λ comes from the L0"
    assert "tpe proposes 4 of 8 trials" in made
    stored = json.loads(cli("show", "next", "--json").stdout)
    assert [one["trial"] for one in stored["start_from"]["found"]] == [1, 0, 3]
    assert stored["start_from"]["found"][1]["params"] == {"saes.target_l0": 10.0, "lr": 0.001}
    finish("six", (8.0, 0.1))  # beats them all
    finish("next", (10.0, 0.3))
    finish("next", (20.0, 0.2))
    told = [trial_note(store_url, "next", number) for number in (0, 1)]
    assert ["- started from: study six #1" in note for note in told] == [False, True]
    again = cli("create", path, "--elsewhere").stdout
    assert "is there already, with 8 trials" in again
    cli("delete", "six", "--yes")
    assert "is there already, with 8 trials" in cli("create", path, "--elsewhere").stdout
    assert json.loads(cli("show", "next", "--json").stdout) == stored
    other = next_study(start_from={"study": "six", "top": 1}, enqueue=[{"lr": 0.002}])
    assert "different 'start_from." in cli("create", other, "--elsewhere", code=2).stderr


def test_what_is_wrong_with_it_is_one_line_and_stores_nothing(
    cli: Any, next_study: Callable[..., Path], tmp_path: Path, store_url: str
) -> None:
    for fields, line in (
        ({"start_from": {"study": "none", "top": 1}}, "no such store"),
        ({"enqueue": [{"lr": 1.0}]}, "study next: 'enqueue.0': 'lr': 1.0 is not in 0.001 to 0.005"),
        ({"enqueue": [{"lr": 1e-3}], "sampler": "grid"}, "'enqueue' needs a sampled study (sampler: tpe, random, …)"),
    ):
        done = cli("create", next_study(**fields), "--elsewhere", code=2)
        assert line in " ".join(done.stderr.split())
        assert done.stderr.count("saeopt: error:") == 1
        assert not (tmp_path / "store.db").exists()


def test_weights_need_this_host(
    cli: Any, study_file: Path, finish: Callable[..., None], next_study: Callable[..., Path]
) -> None:
    cli("create", study_file, "--elsewhere")
    finish("six", (10.0, 0.4))
    path = next_study(start_from={"study": "six", "top": 1, "from_weights": True})
    assert "has no weights of trial 0 on this host" in cli("create", path, code=2).stderr


@pytest.mark.parametrize("k", [{}, {"k": None}, {"k": 8}])
def test_a_study_whose_target_sets_k_is_the_same_study_again(
    k: dict[str, Any], cli: Any, tmp_path: Path, base_config: dict[str, Any]
) -> None:
    """k, and what several architectures have defaults of their own for, is nobody's choice: it is left open."""
    saes = {"sae_type": "topk", "sae_positions": base_config["saes"]["sae_positions"], **k}
    for name, space in (("one", {}), ("two", {"sae_type": ["topk", "batch_topk"]})):
        raw = {"base": {**base_config, "saes": saes}, "space": {"saes.target_l0": [8, 16], **space}}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**raw, "output_dir": str(tmp_path / "out")}))
        words = ["create", path, "--elsewhere"]
        if k.get("k"):  # 8 is a choice, which 16 contradicts: what the line says helps
            assert "'k: null' leaves it to 'target_l0'" in cli(*words, code=2).stderr
            words += ["--set", "saes.k=null"]
        assert "created with" in cli(*words).stdout
        assert "is there already" in cli(*words).stdout
        changed = cli(*words, "--set", "lr=0.5", code=2).stderr
        assert "with a different 'base.lr'" in changed
