"""`saes.target_l0: auto` at the command line: where it may stand, and what `status` and `best` say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml

from saeopt.trials import claims, endings
from saeopt.trials.attributes import evaluation_attributes
from saeopt.trials.refine import Refinement
from saeopt.trials.storage import Store

Cli = Callable[..., CompletedProcess[str]]
HOOKS = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]


@pytest.fixture
def write(tiny_model_dir: Path, tiny_text: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(space: Any, saes: dict[str, Any] | None = None, **fields: Any) -> Path:
        base = {
            "recipe": 3, "tlens_model_path": str(tiny_model_dir),
            "data": {
                "dataset_name": str(tiny_text), "is_tokenized": False, "column_name": "text", "context_length": 16,
                "n_train_samples": 64, "n_eval_samples": 8, "train_batch_size": 8,
            },
            "saes": {
                "sae_type": "relu", "sae_positions": HOOKS, "dict_size_to_input_ratio": 8, **(saes or {}),
            },
        }  # fmt: skip
        path = tmp_path / "s.yaml"
        path.write_text(yaml.safe_dump({"base": base, "space": space, "output_dir": str(tmp_path / "out"), **fields}))
        return path

    return make


def params(store: Store) -> list[Any]:
    return [trial.params["saes.target_l0"] for trial in store.study("s").trials]


@pytest.mark.parametrize("where", ["space", "base", "--set", "sweep"])
def test_it_may_stand_in_the_space_in_the_base_config_and_behind_set(
    where: str, write: Callable[..., Path], cli: Cli, store_url: str, tmp_path: Path
) -> None:
    auto = {"saes.target_l0": "auto"}
    path = write(auto if where == "space" else {}, {"target_l0": "auto"} if where == "base" else {})
    words = [path, "--set", "saes.target_l0=auto"] if where == "--set" else [path]
    if where == "sweep":
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(yaml.safe_load(path.read_text())["base"]))
        (tmp_path / "sweep.yaml").write_text("sae_specific: {target_l0: [auto]}")
        words = ["--base-config", tmp_path / "base.yaml", "--sweep-config", tmp_path / "sweep.yaml", "--name", "s"]
    said = cli("create", *words).stdout
    assert "up to three trials more" in said
    assert params(Store.open(store_url)) == [1, 2, 4]  # the width is 16: up to a quarter of it
    assert "is there already, with 3 trials" in cli("create", *words).stdout


def test_a_dry_run_shows_the_l0s_and_a_study_for_other_hosts_asks_for_them(
    write: Callable[..., Path], cli: Cli, tmp_path: Path
) -> None:
    path = write({"saes.target_l0": "auto"})
    assert "1, 2, 4, refined" in cli("create", path, "--dry-run").stdout
    assert (
        "saes.target_l0: {values: [8, 16, 32, 64, 128], refine: true}"
        in cli("create", path, "--elsewhere", code=2).stderr
    )
    narrow = write({"saes.target_l0": "auto"}, {"dict_size_to_input_ratio": 1})
    assert "16 latents are too few for a curve" in cli("create", narrow, code=2).stderr
    per_hook = write({"lr": [1e-3]}, {"per_hook": {HOOKS[0]: {"target_l0": "auto"}}})
    assert "'auto' is for a study" in cli("create", per_hook, code=2).stderr
    assert not (tmp_path / "store.db").exists()


def test_status_and_best_tell_what_each_hook_point_recommends(
    write: Callable[..., Path], cli: Cli, store_url: str, tmp_path: Path
) -> None:
    cli("create", write({"saes.target_l0": {"values": [4, 8, 16], "refine": True}}))
    store = Store.open(store_url)
    study_id, spec = store.study_id("s"), store.spec("s")
    for claim in claims.claim(store, study_id, 3, {"worker": "w"}):
        l0 = float(claim.params["saes.target_l0"])
        rows = {
            hook: {"l0": l0, "fvu": 1 / l0, "fraction_dead": 0.0, "c_dec": abs(l0 - best) / 100 + 0.1, "s_dec": 1.0}
            for hook, best in zip(HOOKS, (8, 30), strict=True)
        }
        assert endings.finish(store, claim, "COMPLETE", [1.0, 0.5], attrs=evaluation_attributes(rows))
    found = json.loads(cli("status", "s", "--json").stdout)["recommended_l0"]
    assert [(one["hook_point"], one["l0"], one["at_edge"]) for one in found] == [
        (HOOKS[0], 8, False),
        (HOOKS[1], 16, True),
    ]
    for text in (cli("status", "s").stdout, cli("best", "s").stdout):
        assert "8 (#1)" in text
        assert "16? (#2)" in text
    assert "16? (#2)" not in cli("best", "s", "--hook", HOOKS[0]).stdout
    best = json.loads(cli("best", "s", "--json").stdout)
    assert best[HOOKS[1]]["recommended_l0"][0]["l0"] == 16
    from saeopt.search.space import Space

    assert "a worker adds them" in cli("status", "s").stdout
    assert json.loads(cli("list", "--json").stdout)[0]["state"] == "open"  # all have ended, and more will come
    assert Refinement(store, study_id, Space(spec), None).step() == 4
    assert "a worker adds them" not in cli("status", "s").stdout
    assert params(store)[3:] == [6, 11, 23, 32]  # around 8, and beyond 16
    for claim in claims.claim(store, study_id, 4, {"worker": "w"}):
        endings.fail(store, claim, "", retries=0)
    assert json.loads(cli("list", "--json").stdout)[0]["state"] == "done"
    assert cli("export", "s", "--wandb-sweep", tmp_path / "w.yaml", code=2).stderr.count("cannot refine") == 1
    assert "6 of" not in cli("export", "s", "--configs", tmp_path / "configs").stdout
    assert len(list((tmp_path / "configs").glob("*.yaml"))) == 7
