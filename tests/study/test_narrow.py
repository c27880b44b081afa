"""What people see in a window of 80 columns: tables without broken words, bars with their times, JSON for programs."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from saeopt.search.objectives import objective_values
from saeopt.trials import claims, endings, presence
from saeopt.trials.attributes import evaluation_attributes
from saeopt.trials.presence import Presence
from saeopt.trials.storage import Store

Cli = Callable[..., Any]
LONG_HOOKS = ["blocks.10.hook_resid_post", "blocks.11.hook_resid_post"]


@pytest.fixture
def study(cli: Cli, study_file: Path, store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Twelve complete trials with long names, one running, some waiting, two workers."""
    raw = yaml.safe_load(study_file.read_text())
    raw["base"]["saes"]["sae_positions"] = LONG_HOOKS
    raw["space"] = {
        "saes.sparsity_coeff@blocks.10.hook_resid_post": [0.1, 0.2],
        "saes.dict_size_to_input_ratio": [2, 4],
        "lr": [1e-4 * i for i in range(1, 6)],
    }
    study_file.write_text(yaml.safe_dump(raw))
    name = "tinystories-architectures"
    cli("create", study_file, "--name", name)
    store = Store.open(store_url)
    spec, study_id = store.spec(name), store.study_id(name)
    for i in range(12):
        claim = claims.claim(store, study_id, 1, {"worker": "test"})[0]
        found = {
            hook: {"l0": 3.0 * 1.5**i, "fvu": 0.5 / (i + 1.234567), "ce_recovered": 0.9, "kl": 0.1, "fraction_dead": 0}
            for hook in LONG_HOOKS
        }
        folder = spec.run_dir(claim.number)
        folder.mkdir(parents=True)
        for file in ("samples_500.safetensors", "samples_1000.safetensors", "final_config.yaml", "evaluation.json"):
            (folder / file).write_text(f"{file} of {claim.number}")
        assert endings.finish(
            store, claim, "COMPLETE", objective_values(spec, found), attrs=evaluation_attributes(found)
        )
    running = claims.claim(store, study_id, 1, {"worker": "test"})[0]
    newest = {"samples": 640, "l0": 17.25, "fvu": 0.0625}
    for host in ("gpu-node-17", "gpu-node-18"):
        me = Presence(f"{host}/123456/cuda:0", host, "cuda:0", 123456, 0.0, trials=list(range(12, 24)), samples=640,
                      total=1000, tokens_per_s=1234567.0, quiet=12.0, latest={str(running.number): newest})  # fmt: skip
        presence.beat(store, study_id, me)
    store.close()
    monkeypatch.setattr("saeopt.console.console.width", 80)
    return name


@pytest.mark.parametrize("command", ["status", "best", "list"])
def test_tables_fit_and_break_no_word(cli: Cli, study: str, command: str) -> None:
    text = cli(command, *([] if command == "list" else [study])).stdout
    lines = [line for line in text.splitlines() if "/" not in line or "cuda" in line]  # paths are not broken
    assert lines
    assert max(map(len, lines)) <= 80
    words = {
        "status": [
            *LONG_HOOKS,
            "collapsed",
            "gpu-node-17/123456/cuda:0",
            "trial-tokens/s",
            "#11 259 → 0.041",
            "moved",
            "12 s",
        ],
        "best": ["CE recovered", "64 to 128", "0.0409"],
        "list": [study, "pruned", "state"],
    }
    for word in words[command]:
        assert any(word in line for line in text.splitlines()), (word, text)


def test_list_has_no_two_columns_of_one_name(cli: Cli, study: str) -> None:
    head = cli("list").stdout.splitlines()[1].split()
    assert len(head) == len(set(head))
    cli("stop", study)
    assert cli("list").stdout.splitlines()[2].split()[-1] == "stopped"


def test_status_shows_l0_and_fvu_of_running_trials(cli: Cli, study: str) -> None:
    row = next(line for line in cli("status", study).stdout.splitlines() if "640 of 1,000" in line)
    assert row.split()[-2:] == ["17.2", "0.0625"]
    assert len(cli("status", study).stdout.splitlines()) <= 24
    running = json.loads(cli("status", study, "--json").stdout)["running"]
    assert [(r["trial"], r["l0"], r["fvu"], r["samples"]) for r in running] == [(12, 17.25, 0.0625, 640)]


def test_best_says_where_the_weights_lie(cli: Cli, study: str, tmp_path: Path) -> None:
    weights = str(tmp_path / "out" / study / "11" / "samples_1000.safetensors")
    assert weights in [line.strip() for line in cli("best", study).stdout.splitlines()]
    (tmp_path / "out" / study / "11").rename(tmp_path / "gone")
    assert f"not on this host: {tmp_path}/out/{study}/11" in cli("best", study).stdout


def test_json_holds_what_the_tables_hold(cli: Cli, study: str, tmp_path: Path) -> None:
    best = json.loads(cli("best", study, "--json", "--hook", LONG_HOOKS[0]).stdout)
    assert list(best) == LONG_HOOKS[:1]
    front = best[LONG_HOOKS[0]]["front"]
    assert [sae["trial"] for sae in front] == list(range(12))
    assert front[11]["weights"] == str(tmp_path / "out" / study / "11" / "samples_1000.safetensors")
    assert front[0]["params"]["lr"] == pytest.approx(1e-4)
    assert front[0]["metrics"]["l0"] == 3.0
    assert best[LONG_HOOKS[0]]["ranges"][-1]["l0"] == [256.0, None]
    counts = json.loads(cli("status", study, "--json").stdout)["trials"]
    assert (counts["complete"], counts["running"], counts["all"]) == (12, 1, 20)
    assert json.loads(cli("list", "--json").stdout)[0]["complete"] == 12
    assert json.loads(cli("show", study, "--json").stdout)["name"] == study


def test_best_copies_what_it_lists(cli: Cli, study: str, tmp_path: Path) -> None:
    cli("best", study, "--copy", tmp_path / "kept")
    folders = sorted(tmp_path.joinpath("kept").iterdir())
    assert {f.name for f in folders} == {f"{study}-{i}" for i in range(12)}
    copied = tmp_path / "kept" / f"{study}-11"
    assert {f.name for f in copied.iterdir()} == {"samples_1000.safetensors", "final_config.yaml", "evaluation.json"}
    assert (copied / "samples_1000.safetensors").read_text() == "samples_1000.safetensors of 11"
    (tmp_path / "out").rename(tmp_path / "gone")
    assert "no weights of its best SAEs are on this host" in cli("best", study, "--copy", "kept", code=2).stderr


@pytest.mark.parametrize("trials", [1, 6])
def test_the_bar_keeps_its_times_and_l0_and_fvu(trials: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from saeopt.training import progress

    screen = io.StringIO()
    monkeypatch.setattr(progress, "error_console", Console(file=screen, force_terminal=True, width=80))
    with progress.Bar() as bar:
        bar.begin(0, 1000)
        for i in range(trials):
            bar.measured(str(i), {"a": {"l0": 123.4 + i, "fvu": 0.123 - 0.02 * i, "loss": 12345.6}})
        bar.update(500, 1000, 12345678.0)
        bar._drawn.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", screen.getvalue())
    line = next(text for text in re.split(r"[\n\r]", "".join(shown.split("\n"))) if "FVU" in text)
    last = line[line.rindex("training") :]
    assert re.search(r"50% 0:00:\d\d (0:00:\d\d|-:--:--) ", last), last
    assert re.search(r"L0 123.* FVU 0\.(123|02–0\.12)", last), last
    assert len(last.rstrip()) <= 80


def test_a_pack_says_lines_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from saeopt.training import progress

    monkeypatch.setattr(progress.log, "propagate", True)
    with caplog.at_level("INFO", "saeopt"), progress.Bar(every=0.0) as bar:
        bar.begin(0, 1000)
        bar.measured("0", {"a": {"l0": 5.0, "fvu": 0.5, "loss": 1.0}})
        bar.update(100, 1000, 50.0)
    assert "100 of 1,000 samples  L0 5.0  FVU 0.500  50 tok/s" in caplog.text


def test_a_sentence_is_broken_between_words_for_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from saeopt import console

    text = "  trial 7: paused by halving at 16 of 160 samples: place 6 of 8: trial 0 is ahead (l0 8.125, fvu 0.58)"
    monkeypatch.setattr(console, "console", Console(width=80, force_terminal=True))
    lines = console.wrapped(text).splitlines()
    assert len(lines) == 2
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith("    ")
    assert " ".join(" ".join(lines).split()) == text.strip()
    assert "/a/long/path" * 9 in console.wrapped("  weights: " + "/a/long/path" * 9)
    monkeypatch.setattr(console, "console", Console(width=80, force_terminal=False))
    assert console.wrapped(text) == text
