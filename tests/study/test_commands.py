"""Every command of `saeopt study` on a study whose trials finished, failed and wait."""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from study_outcomes import HOOKS, evaluation

from saeopt.config import load_run_config
from saeopt.config.study_file import load_study_spec
from saeopt.trials.create import create_study
from saeopt.trials.storage import Store

Cli = Callable[..., subprocess.CompletedProcess[str]]
Finish = Callable[..., None]
REPOSITORY = Path(__file__).resolve().parents[2]
SECRET = "hunter2secret"


@pytest.fixture
def study(cli: Cli, study_file: Path, finish: Finish) -> str:
    """Four complete trials (one collapsed), one failed, one waiting."""
    cli("create", study_file)
    for outcome in ((40.0, 0.05), (20.0, 0.1), (10.0, 0.2), (0.2, 0.99), "CUDA error: a crash"):
        finish("six", outcome)
    return "six"


def test_create_twice_makes_no_new_cells_and_another_spec_is_refused(cli: Cli, study_file: Path) -> None:
    assert "created with 6 trials" in cli("create", study_file).stdout
    assert "is there already, with 6 trials" in cli("create", study_file).stdout
    done = cli("create", study_file, "--max-trials", 2, code=2)
    assert "max_trials" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_next_commands_carry_the_storage_that_was_given(cli: Cli, study_file: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/my store.db"
    text = cli("create", study_file, "--name", "mine", "--storage", url, storage=None).stdout
    commands = [shlex.split(line.partition(": ")[2]) for line in text.splitlines()[1:]]
    assert [c[c.index("--storage") + 1] for c in commands] == [url] * 3
    assert commands[1][-5:-2] == ["status", "mine", "--watch"]
    for words in (("stop", "mine"), ("show", "mine")):
        assert f"--storage '{url}'" in cli(*words, "--storage", url, storage=None).stdout
    assert f"--storage '{url}'" in cli("status", "mine", "--storage", url, storage=None).stdout
    assert "--storage" not in cli("create", study_file).stdout


def test_a_refused_study_leaves_no_store(cli: Cli, study_file: Path) -> None:
    assert "n_eval_samples" in cli("create", study_file, "--set", "data.n_eval_samples=0", code=2).stderr
    assert "no such store" in cli("list", code=2).stderr


def test_status_shows_states_and_the_best(cli: Cli, study: str) -> None:
    text = cli("status", study).stdout
    assert "waiting" in text
    assert HOOKS[1] in text
    assert "#0 40" in text
    assert "trial 4: CUDA error: a crash" in text


def test_the_best_trial_is_that_of_the_objective_and_no_collapsed_one(
    cli: Cli, study_file: Path, finish: Finish
) -> None:
    raw = yaml.safe_load(study_file.read_text())
    for name, objective, trial in [
        ("lowest", {"metric": "l0"}, 1),
        ("near", {"metric": "ce_recovered", "target_l0": 10, "hook_points": HOOKS[1]}, 1),
        ("highest", {"metric": "ce_recovered"}, 0),
    ]:
        study_file.write_text(yaml.safe_dump({**raw, "objectives": [objective]}))
        cli("create", study_file, "--name", name)
        for outcome in ((80.0, 0.05), (9.0, 0.2), (0.2, 0.95)):  # stores of before hold collapsed trials as complete
            finish(name, outcome)
        assert f"(trial {trial})" in cli("status", name).stdout
        assert json.loads(cli("status", name, "--json").stdout)["best"]["trial"] == trial


def test_status_watch_ends_with_the_study(cli: Cli, study_file: Path, finish: Finish) -> None:
    cli("create", study_file, "--max-trials", 1)
    finish("six", (9.0, 0.2))
    assert "best so far" in cli("status", "six", "--watch").stdout


def test_best_lists_fronts_and_ranges_without_collapsed_saes(cli: Cli, study: str, tmp_path: Path) -> None:
    text = cli("best", study, "--png", tmp_path / "front.png").stdout
    assert "Pareto front of 4 SAEs (1 collapsed)" in text
    assert "32 to 64" in text
    assert "#3" not in text
    assert (tmp_path / "front.png").stat().st_size > 5_000
    assert HOOKS[1] not in cli("best", study, "--hook", HOOKS[0]).stdout
    assert HOOKS[0] in cli("best", study, "--hook", "blocks.0.hook_resid_pr", code=2).stderr
    assert "'ce_recovered'" in cli("best", study, "--by", "ce_recoverd", code=2).stderr


def test_show_prints_a_study_file_that_makes_the_same_study(cli: Cli, study: str, tmp_path: Path) -> None:
    (tmp_path / "again.yaml").write_text(cli("show", study).stdout)
    assert "is there already, with 6 trials" in cli("create", tmp_path / "again.yaml").stdout


def test_list_shows_every_study(cli: Cli, study: str, study_file: Path) -> None:
    cli("create", study_file, "--name", "other", "--limit", "2")
    text = cli("list").stdout
    assert "six" in text
    assert "other" in text


def test_exported_configs_load_and_differ_as_the_cells_do(cli: Cli, study: str, tmp_path: Path) -> None:
    cli("export", study, "--configs", tmp_path / "cells")
    configs = [load_run_config(path) for path in sorted((tmp_path / "cells").iterdir())]
    cells = {(config.saes.sparsity_coeff, config.lr) for config in configs}
    assert cells == {(c, lr) for c in (0.1, 0.3, 1.0) for lr in (1e-3, 1e-2)}


def test_exported_tables_hold_a_row_per_trial_and_hook_point(cli: Cli, study: str, tmp_path: Path) -> None:
    import pyarrow.parquet

    cli("export", study, "--csv", tmp_path / "t.csv", "--parquet", tmp_path / "t.parquet")
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * len(HOOKS) + 2
    assert {row["state"] for row in rows} == {"COMPLETE", "FAIL", "WAITING"}
    assert float(rows[0]["l0"]) == 40.0
    assert float(rows[0]["param:saes.sparsity_coeff"]) in (0.1, 0.3, 1.0)
    assert float(rows[0]["objective:l0"]) == 40.0
    table = pyarrow.parquet.read_table(tmp_path / "t.parquet")
    assert table.num_rows == len(rows)


def test_retry_puts_failed_trials_back(cli: Cli, study: str, finish: Finish) -> None:
    assert "trial 0 of study 'six' has not failed" in cli("retry", study, "0", code=2).stderr
    assert "1 trial of study six waits again: 4" in cli("retry", study).stdout
    finish("six", (5.0, 0.3))
    assert "#4 5" in cli("status", study).stdout


def test_why_says_what_ended_a_trial(cli: Cli, study: str, store_url: str) -> None:
    from saeopt.trials import claims, endings
    from saeopt.trials.storage import Store

    store, reason = Store.open(store_url), "stopped early by pareto at 8 of 64 samples: trial 2 was better"
    (claim,) = claims.claim(store, store.study_id(study), 1, {})
    endings.finish(store, claim, "PRUNED", None, attrs={"reason": reason, "samples": 8})
    store.close()
    told = ["trial 4 (fail): CUDA error: a crash", f"trial 5 (pruned): {reason}"]
    assert cli("why", study).stdout.splitlines() == told
    assert cli("why", study, 5).stdout.splitlines() == told[1:]
    assert cli("why", study, 0).stdout == "trial 0 (complete): trained to its end\n"
    early = {"trial": 5, "state": "PRUNED", "reason": reason, "samples": 8}
    assert json.loads(cli("why", study, "--json").stdout)[1] == early
    assert json.loads(cli("status", study, "--json").stdout)["ended_early"] == [early]
    assert reason in cli("status", study).stdout
    assert "no trial in study 'six': '9'" in cli("why", study, 9, code=2).stderr


def test_importances_say_in_one_line_that_there_are_too_few_trials(cli: Cli, study: str) -> None:
    said = cli("best", study, "--importances").stdout
    assert "importances for l0: too few trials: 3 of at least 10 have a value" in said
    told = json.loads(cli("best", study, "--importances", "--json").stdout)
    assert told[HOOKS[0]]["importances"]["l0"]["reason"].startswith("too few trials")


def test_stop_keeps_workers_from_claiming_until_resume(cli: Cli, study: str, store_url: str) -> None:
    from saeopt.trials import claims
    from saeopt.trials.storage import Store

    store = Store.open(store_url)
    cli("stop", study)
    assert "stopped" in cli("status", study).stdout
    assert claims.claim(store, store.study_id(study), 1, {}) == []
    cli("resume", study)
    assert len(claims.claim(store, store.study_id(study), 1, {})) == 1
    store.close()


def test_delete_asks_first(cli: Cli, study: str) -> None:
    cli("delete", study, text="n\n", code=130)
    assert "six" in cli("list").stdout
    assert "deleted" in cli("delete", study, text="y\n").stdout
    assert "no study 'six'" in cli("status", study, code=2).stderr


def test_logs_show_metrics_and_the_traceback_of_a_failure(cli: Cli, study: str) -> None:
    text = cli("logs", study, "0").stdout
    assert "loss=4.5" in text
    assert f"1,000  {HOOKS[0]}" in text
    assert "CUDA error: a crash" in cli("logs", study, "4").stdout
    assert "loss=4.5" in cli("logs", study, "0", "--follow").stdout


def test_unknown_names_are_one_line_with_near_ones(cli: Cli, study: str) -> None:
    for args, near in ((("status", "siz"), "'six'"), (("logs", study, "77"), "0, 1, 2"), (("best", "sax"), "'six'")):
        done = cli(*args, code=2)
        assert near in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_the_store_is_an_option_or_the_environment_or_the_default_file(cli: Cli, study: str, store_url: str) -> None:
    assert study in cli("list", "--storage", store_url, storage=None).stdout
    assert "studies/saeopt.db" in cli("list", storage=None, code=2).stderr


def test_no_output_holds_the_password_of_the_store(cli: Cli, study_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saeopt.study.PATIENCE_S", 0.5)
    url = f"postgresql+psycopg://user:{SECRET}@127.0.0.1:9/none"
    for args in (("create", study_file), ("list",), ("status", "six"), ("delete", "six", "--yes")):
        done = cli(*args, storage=url, code=2)
        assert SECRET not in done.stdout + done.stderr


def test_the_replaced_systems_sweep_pair_is_a_grid(cli: Cli, tmp_path: Path, base_config: dict[str, Any]) -> None:
    base_config["saes"]["sae_type"] = "gated"
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base_config))
    sweep = {
        "learning_rates": ["1e-3", 0.001, 1e-4],
        "sparsity_coeffs": [1, 5.0],
        "sae_specific": {"aux_coeffs": [0.1]},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    pair = ("--base_config", tmp_path / "base.yaml", "--sweep_config", tmp_path / "sweep.yaml")
    assert "with 4 trials" in cli("create", "--name", "old", *pair, "--output_dir", tmp_path / "runs").stdout
    assert f"{tmp_path}/runs/old" in cli("show", "old").stdout


def test_status_of_a_thousand_trials_asks_the_store_little_and_imports_no_torch(
    cli: Cli, study_file: Path, store_url: str, tmp_path: Path
) -> None:
    import sqlalchemy as sa

    from saeopt.trials import internals as db
    from saeopt.trials.attributes import evaluation_attributes
    from saeopt.trials.storage import Store

    raw = yaml.safe_load(study_file.read_text())
    raw["space"]["lr"] = [round(1e-4 * (i + 1), 6) for i in range(334)]
    study_file.write_text(yaml.safe_dump(raw))
    assert "created with 1002 trials" in cli("create", study_file).stdout
    store = Store.open(store_url)
    attrs = [
        {"trial_id": i, "key": k, "value_json": json.dumps(v)}
        for i in range(1, 900)
        for k, v in evaluation_attributes(evaluation(5.0 + i % 70, 0.3)).items()
    ]
    with store.write() as connection:
        connection.execute(sa.insert(db.trial_user_attrs), attrs)
        connection.exec_driver_sql("UPDATE trials SET state='COMPLETE', datetime_start='2026-01-01 00:00:00.000000', "
                                   "datetime_complete='2026-01-01 00:01:00.000000' WHERE trial_id < 900")  # fmt: skip
    store.close()
    code = (
        "import sys; from sqlalchemy import Engine, event; from saeopt.study import app; asked = []\n"
        "event.listen(Engine, 'before_cursor_execute', lambda _, __, statement, *rest: asked.append(statement))\n"
        "app(['status', 'six'], standalone_mode=False); print('statements', len(asked))\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules); assert not heavy, heavy"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "SAEOPT_STORAGE": store_url}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "899" in done.stdout
    assert int(done.stdout.split()[-1]) < 40  # none per trial


def test_relative_results_go_where_a_container_can_write(
    cli: Cli, study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEOPT_RESULTS", str(tmp_path / "results"))
    cli("best", study, "--png", "front.png")
    cli("export", study, "--csv", "t/all.csv", "--configs", tmp_path / "absolute")
    assert sorted(p.name for p in (tmp_path / "results").rglob("*")) == ["all.csv", "front.png", "t"]
    assert len(list((tmp_path / "absolute").iterdir())) == 6


def test_a_result_that_cannot_be_written_is_one_line(cli: Cli, study: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for args in (("best", study, "--png"), ("export", study, "--csv"), ("export", study, "--parquet"),
                 ("export", study, "--configs"), ("export", study, "--wandb-sweep")):  # fmt: skip
        done = cli(*args, tmp_path / "file" / "x", code=2)
        assert "cannot be written" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_study_that_is_there_keeps_a_rule_that_a_new_one_is_refused_with(
    cli: Cli, study_file: Path, store_url: str
) -> None:
    rule = {"type": "pareto", "n_startup_trials": 1}
    raw = yaml.safe_load(study_file.read_text()) | {"objectives": ["fvu", "cosine"], "early_stopping": rule}
    study_file.write_text(yaml.safe_dump(raw))
    for more in ([], ["--dry-run"]):
        told = cli("create", study_file, *more, code=2).stderr
        assert "could stop no trial: training does not measure cosine" in told
    assert "no such store" in cli("list", code=2).stderr
    create_study(Store.open(store_url), load_study_spec(study_file))  # as an older version did
    assert "is there already" in cli("create", study_file).stdout
