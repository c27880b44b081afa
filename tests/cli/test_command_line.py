"""One application: help, completion, argument and option forms, old spellings. Nothing here trains."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
Call = Callable[..., SimpleNamespace]
COMMANDS = ["train", "study", "worker", "evaluate", "dashboard", "init", "configs"]
STUDY_COMMANDS = ["create", "list", "show", "status", "best", "export", "retry", "stop", "resume", "delete", "logs",
                  "validate"]  # fmt: skip


CONFIGS_COMMANDS = ["ls", "show", "cp"]
WORDS = [
    [],
    *([c] for c in COMMANDS),
    *(["study", c] for c in STUDY_COMMANDS),
    *(["configs", c] for c in CONFIGS_COMMANDS),
]


@pytest.mark.parametrize("words", WORDS)
def test_help_has_two_forms_and_fits_into_eighty_columns(call: Call, words: list[str]) -> None:
    short, long = call(*words, "-h"), call(*words, "--help")
    assert short.code == 0
    assert short.out == long.out
    assert "Usage:" in short.out
    assert all(len(line) <= 80 for line in short.out.splitlines())
    assert "..." not in re.sub(r"[]}]\.\.\.", "", short.out)  # NAME, as often as one likes
    assert "bool" not in short.out
    assert "int range" not in short.out
    assert "…" not in short.out.replace("cuda:1, …", "")


def test_the_help_of_the_whole_lists_every_command(call: Call) -> None:
    assert all(f"  {name}" in call("-h").out for name in COMMANDS)
    assert "Did you mean 'train'?" in call("tran").err
    assert call("--version").out.strip()


MODULES = [["-m", "saeopt"], ["-m", "saeopt.cli"], ["-m", "saeopt.study"], ["-m", "saeopt.worker"],
           ["-m", "saeopt.evaluation"], ["-m", "saeopt.train"], [str(ROOT / "saeopt/train.py")]]  # fmt: skip


@pytest.mark.parametrize("words", [[], ["study"], ["configs"]], ids=str)
def test_without_a_command_the_help_is_shown_as_it_is(call: Call, words: list[str]) -> None:
    shown = call(*words)
    assert shown.code == 2
    assert shown.err.strip() == call(*words, "-h").out.strip()


@pytest.mark.parametrize("words", MODULES, ids=lambda words: words[-1].rpartition("/")[2])
def test_every_way_to_start_a_command_has_the_same_help(words: list[str], call: Call, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, *words, "-h"], capture_output=True, text=True, env=environment, cwd=tmp_path, check=True
    )
    name = {"evaluation": "evaluate"}.get(short := Path(words[-1]).stem if "/" in words[-1] else
                                          words[-1].rpartition(".")[2], short)  # fmt: skip
    expected = call(*([name] if name in COMMANDS else []), "-h").out
    assert done.stdout.splitlines()[1:] == expected.splitlines()[1:] or name in ("saeopt", "cli")
    assert "Usage:" in done.stdout


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["train", "none.yaml"], "none.yaml: no such file"),
        (["train", "--config", "none.yaml"], "none.yaml: no such file"),
        (["train", "--config_path", "none.yaml"], "none.yaml: no such file"),
        (["train", "-c", "none.yaml", "none.yaml"], "none.yaml: no such file"),
        (["train", "none.yaml", "--config", "other.yaml"], "none.yaml and --config other.yaml: give one of them"),
        (["train"], "CONFIG is missing"),
        (["worker", "s"], "no such store"),
        (["worker", "--study", "s"], "no such store"),
        (["worker", "s", "--study", "s", "--limit", 2], "no such store"),
        (["worker", "--study", "s", "--max_trials", 2, "--idle_timeout", 0], "no such store"),
        (["worker", "a", "--study", "b"], "a and --study b: give one of them"),
        (["worker"], "STUDY is missing"),
        (["study", "create", "none.yaml", "--max_trials", 2], "none.yaml: no such file"),
        (["study", "create", "none.yaml", "--limit", 2], "none.yaml: no such file"),
        (["evaluate", "none", "--n_eval_samples", 3, "--device", "cpu"], "none: no such run folder"),
        (["evaluation", "none"], "none: no such run folder"),
        (["dashboard"], "no such store"),
    ],
)
def test_argument_option_and_old_spelling_are_the_same(call: Call, given: list[object], shown: str) -> None:
    done = call(*given)
    assert done.code == 2
    assert shown in done.err
    assert len(done.err.splitlines()) == 1


def complete(words: str, tmp_path: Path) -> list[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "_SAEOPT_COMPLETE": "complete_bash", "COMP_WORDS": words,
                                "COMP_CWORD": str(len(words.split(" ")) - 1)}  # fmt: skip
    code = "import sys; sys.argv[0] = 'saeopt'; from saeopt.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert "Traceback" not in done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["study", "promote", "s", 1, "x"], "'TRIAL': Input should be a valid integer, not 'x'"),
        (["study", "why", "s", "1.5"], "'TRIAL': Input should be a valid integer, not '1.5'"),
        (["worker", "s", "--limit", "0"], "'--limit': Input should be greater than or equal to 1, not '0'"),
    ],
)
def test_a_wrong_number_is_named(call: Call, words: list[object], wanted: str) -> None:
    done = call(*words)
    assert (done.code, wanted in done.err) == (2, True), done.err


def test_the_shell_completes_commands_options_and_names_of_studies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optuna

    url = f"sqlite:///{tmp_path}/store.db"
    optuna.create_study(storage=url, study_name="mine")
    monkeypatch.setenv("SAEOPT_STORAGE", url)
    assert complete("saeopt wo", tmp_path) == ["worker"]
    assert complete("saeopt study st", tmp_path) == ["status", "stop"]
    assert complete("saeopt train --dry", tmp_path) == ["--dry-run"]
    assert complete("saeopt worker m", tmp_path) == ["mine"]
    assert complete("saeopt study best m", tmp_path) == ["mine"]
    monkeypatch.setenv("SAEOPT_STORAGE", f"sqlite:///{tmp_path}/none.db")
    assert complete("saeopt worker m", tmp_path) == []


def test_tries_at_a_hub_that_does_not_answer_are_no_lines_of_their_own() -> None:
    script = (
        "from saeopt.console import set_up_logging; set_up_logging()\n"
        "import huggingface_hub; print(huggingface_hub.logging.get_verbosity())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_VERBOSITY"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == logging.ERROR
