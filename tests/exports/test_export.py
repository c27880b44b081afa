"""`saeopt export`: what it writes of runs and studies, what it refuses, and the hub."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_stand_in import State, hub
from interop import run_worker
from safetensors.torch import load_file

import saeopt
from saeopt.cli import app
from saeopt.config.settings import settings
from saeopt.config.study_file import load_study_spec
from saeopt.options import run_cli
from saeopt.saes.base import SAE, Widths
from saeopt.search.objectives import objective_values
from saeopt.testing.cases import build
from saeopt.trials import claims, endings
from saeopt.trials.attributes import evaluation_attributes
from saeopt.trials.create import create_study
from saeopt.trials.storage import Store

HOOKS = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]


Command = Callable[..., str]


@pytest.fixture(scope="module")
def place(tiny_model_dir: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study `s` of two trials at two hook points, each trained with two seeds."""
    folder = tmp_path_factory.mktemp("exports")
    base = {
        "tlens_model_path": str(tiny_model_dir), "threads": 1, "lr": 0.01, "save_every_n_samples": 32,
        "eval_every_n_samples": 32, "seeds": 2,
        "data": {"dataset_name": str(tiny_text), "is_tokenized": False, "column_name": "text", "streaming": False,
                 "context_length": 16, "n_train_samples": 64, "n_eval_samples": 8, "train_batch_size": 8},
        "saes": {"sae_type": "batch_topk", "sae_positions": HOOKS, "dict_size_to_input_ratio": 2},
    }  # fmt: skip
    made = {"name": "s", "base": base, "space": {"saes.k": [2, 6]}, "output_dir": str(folder / "out")}
    (folder / "s.yaml").write_text(yaml.safe_dump(made), encoding="utf-8")
    store = Store.open(f"sqlite:///{folder}/store.db", create=True)
    spec = load_study_spec(folder / "s.yaml")
    create_study(store, spec)
    study = store.study_id("s")
    for number, k in enumerate((2, 6)):  # as a worker does it
        (claim,) = claims.claim(store, study, 1, {"worker": "test"})
        run = saeopt.train_run(
            {**base, "save_dir": str(folder / "out/s"), "wandb_run_name": str(number)}, {"saes.k": k}, device="cpu"
        )
        assert run.folder == spec.run_dir(claim.number)
        found = run.evaluation
        attributes = evaluation_attributes(found)
        assert endings.finish(store, claim, "COMPLETE", objective_values(spec, found), attrs=attributes)
    store.close()
    return folder


@pytest.fixture
def command(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """`saeopt …` in this process, in 80 columns; gives its output, or its errors where it fails as it should."""

    def run(*words: object, code: int = 0) -> str:
        monkeypatch.chdir(place)
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("SAEOPT_STORAGE", f"sqlite:///{place}/store.db")
        settings.cache_clear()
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_cli(app, [str(word) for word in words])
        shown = capsys.readouterr()
        assert (ended.value.code or 0) == code, shown.out + shown.err
        return shown.err if code else shown.out

    yield run
    settings.cache_clear()


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_front_is_a_release_of_saelens(place: Path, command: Command) -> None:
    said = command("export", "--study", "s", "--front", "--to", "sae-lens", "front", "--license", "mit")
    assert said == "4 SAEs as sae-lens in front\n"
    saes = [f"{hook}/trial-{n}" for hook in HOOKS for n in (0, 1)]
    files = [f"{sae}/{name}" for sae in saes for name in ("cfg.json", "sae_weights.safetensors", "README.md")]
    assert tree(place / "front") == sorted([*files, "README.md", "pretrained_saes.yaml"])
    table = yaml.safe_load((place / "front/pretrained_saes.yaml").read_text(encoding="utf-8"))["front"]
    assert (table["repo_id"], {row["id"] for row in table["saes"]}) == ("OWNER/NAME", set(saes))
    config = json.loads((place / "front" / saes[0] / "cfg.json").read_text(encoding="utf-8"))
    assert config["metadata"]["model_name"] == "llama"
    assert config["metadata"]["dataset_path"] == "tiny.jsonl"
    for path in (place / "front").rglob("*"):  # nothing of this host leaves
        assert path.is_dir() or str(place.parent).encode() not in path.read_bytes(), path


def test_a_card_does_not_say_that_what_was_imported_was_trained(place: Path, command: Command) -> None:
    config = yaml.safe_load((place / "out/s/0/final_config.yaml").read_text(encoding="utf-8"))
    config["saes"] |= {"pretrained_sae_paths": str(place / "out/s/0"), "retrain_saes": False}
    run = saeopt.train_run({**config, "seeds": 1, "save_dir": str(place / "kept")}, device="cpu")
    command("export", run.folder, "kept-card", "--to", "safetensors", "--site", HOOKS[0])
    for card in (place / "kept-card/README.md", place / f"kept-card/{HOOKS[0]}/README.md"):
        text = card.read_text(encoding="utf-8").split("```yaml")[0]
        assert "trained on `" not in text
        assert "| trained on |" not in text
        assert ("evaluated on `" in text) is (card.parent.name == "kept-card")
        assert ("| evaluated on | `" in text) is (card.parent.name != "kept-card")
    assert "imported, and not trained on" in text


def test_an_sae_that_is_taken_for_another_hook_point_is_told(
    place: Path, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    command("export", "out/s/0", "one", "--to", "safetensors", "--site", HOOKS[0])
    config = yaml.safe_load((place / "out/s/0/final_config.yaml").read_text(encoding="utf-8"))
    config["saes"] = {"sae_type": "jumprelu", "dict_size_to_input_ratio": 2, "retrain_saes": False}
    for path, wanted in ((place / "one", 1), (f"{HOOKS[1]}={place / 'one'}", 0)):
        config["saes"] |= {"pretrained_sae_paths": str(path), "sae_positions": [HOOKS[1]]}
        caplog.clear()
        saeopt.train_run({**config, "seeds": 1, "save_dir": str(place / "taken")}, device="cpu")
        assert caplog.text.count(f"is of {HOOKS[0]}, as its files say, and is taken for {HOOKS[1]}") == wanted


def test_a_card_has_what_made_the_sae(place: Path, command: Command) -> None:
    command("export", "--study", "s", "--trial", 1, "--to", "safetensors", "card", "--seed", 1)
    card = (place / f"card/{HOOKS[0]}/README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["license"], "saeopt" in front["tags"], "base_model" in front) == ("unknown", True, False)
    row = json.loads((place / "out/s/1/evaluation.json").read_text(encoding="utf-8"))[HOOKS[0]]
    assert row["seeds"]["1"]["l0"] != row["l0"]  # a mean over both seeds
    assert f"| `l0` | {row['seeds']['1']['l0']:.1f} | mean number of non-zero entries of f |" in card
    assert "| from | study s, trial 1, seed 1 |" in card
    assert "saeopt export --study s --trial=1 --seed 1 --to safetensors card" in card
    config = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert (config["saes"]["k"], config["tlens_model_path"]) == (6, "llama")


def test_an_older_checkpoint_has_the_metrics_of_its_time(place: Path, command: Command) -> None:
    command("export", "out/s/0", "older", "--to", "safetensors", "--checkpoint", 32, "--site", HOOKS[1])
    told = json.loads(_metadata(place / f"older/{HOOKS[1]}/sae.safetensors"))
    rows = [json.loads(line) for line in (place / "out/s/0/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    (wanted,) = [r["eval_fvu"] for r in rows if r["samples"] == 32 and r["hook_point"] == HOOKS[1] and "eval_fvu" in r]
    assert told["metrics"]["fvu"] == pytest.approx(wanted)
    assert tree(place / "older") == ["README.md", f"{HOOKS[1]}/README.md", f"{HOOKS[1]}/sae.safetensors"]


def _metadata(path: Path) -> str:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return str(header["__metadata__"]["saeopt"])


def test_the_same_again_is_no_mistake_and_anything_else_is(place: Path, command: Command) -> None:
    words = ["export", "out/s/0", "again", "--to", "sae-lens"]
    command(*words)
    before = {name: (place / "again" / name).read_bytes() for name in tree(place / "again")}
    command(*words)
    assert before == {name: (place / "again" / name).read_bytes() for name in tree(place / "again")}
    error = command(*words, "--license", "mit", code=2)
    assert "again: holds another export, or files were changed there: give another folder" in error
    (place / "mine").mkdir()
    (place / "mine" / "thesis.txt").write_text("", encoding="utf-8")
    error = command("export", "out/s/0", "mine", "--to", "sae-lens", code=2)
    assert "mine: is there already" in error
    assert [path.name for path in place.glob(".*")] == []


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["out/s/0", "no"], "--to is missing: sae-lens,"),
        (["out/s/0", "no", "--to", "saelens"], "--to saelens: no such format; did you mean 'sae-lens'"),
        (["no", "--to", "sae-lens"], "export needs RUN_DIR and DIR, or --study NAME and DIR"),
        (["a", "no", "--study", "s", "--to", "sae-lens"], "export needs RUN_DIR and DIR, or --study NAME and DIR"),
        (["out/s/0", "no", "--front", "--to", "sae-lens"], "--front and --trial are for --study NAME"),
        (["--study", "s", "no", "--front", "--trial", "1", "--to", "sae-lens"], "--front and --trial: give one"),
        (["--study", "s", "no", "--trial", "7", "--to", "sae-lens"], "no trial of study 's' that was trained to"),
        (["--study", "s", "no", "--site", "blocks.7.x", "--to", "sae-lens"], "no hook point 'blocks.7.x'"),
        (["out/s/0", "no", "--site", "blocks.7.x", "--to", "sae-lens"], "no site of run 0 'blocks.7.x'"),
        (["out/s/0", "no", "--checkpoint", "5", "--to", "sae-lens"], "no checkpoint at 5 samples (there are: 64, 32)"),
        (["out/s/0", "no", "--seed", "5", "--to", "sae-lens"], "no seed 5 (there are: 0, 1)"),
        (["out/s/9", "no", "--to", "sae-lens"], "out/s/9: no such run folder"),
        (["out/s/0", "no", "--to", "sae-lens", "--push", "me"], "--push me: must be OWNER/NAME"),
        (["out/s/0", "no", "--to", "sae-lens", "--push", "a//b"], "--push a//b: "),
        (["no", "--push", "me/saes"], "no: no such folder"),
        (["out/s/0", "s.yaml", "--to", "sae-lens"], "s.yaml: is there already"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_write_nothing(place: Path, command: Command, words: list[str], wanted: str) -> None:
    error = command("export", *words, code=2)
    assert wanted in error
    assert len(error.strip().splitlines()) == 1
    assert not (place / "no").exists()


def test_what_a_format_cannot_say_is_refused_with_the_nearest_that_can(tmp_path: Path) -> None:
    first, second = build("relu"), build("hard_concrete")
    with pytest.raises(
        saeopt.UserError, match=r"sae-lens cannot hold 'b': .*'hard_concrete'; nearest .*--to safetensors"
    ):
        saeopt.export({"a": first, "b": second}, to="sae-lens", folder=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    transcoder = build("topk", widths=Widths((6,), (4,), False))
    with pytest.raises(saeopt.UserError, match="it has no topk transcoder; nearest format that can: --to "):
        saeopt.export(
            {"blocks.0.hook_resid_mid->blocks.0.hook_mlp_out": transcoder}, to="sae-lens", folder=tmp_path / "out"
        )
    with pytest.raises(saeopt.UserError, match="decoder rows differ in length"):
        saeopt.export(
            build("topk", {"decoder_norm": "free"}), to="sae-lens", folder=tmp_path / "o", site="x", unit_decoder=True
        )
    with pytest.raises(saeopt.UserError, match="given by unit_decoder"):
        saeopt.export(second.unit_decoder(), to="safetensors", folder=tmp_path / "o", site="x")
    with pytest.raises(saeopt.UserError, match="does not say where the SAE reads and writes"):
        saeopt.export(transcoder, to="sae-lens", folder=tmp_path / "o", site="x")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_of_the_folder_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"begun")
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(saeopt.UserError, match=rf"{tmp_path}/new/out/x/sae_w\S+: cannot be written: the disk is full"):
        saeopt.export(build("relu"), to="sae-lens", folder=tmp_path / "new/out", site="x")
    assert list(tmp_path.iterdir()) == []


def test_an_sae_that_was_loaded_knows_its_site(tmp_path: Path) -> None:
    own = saeopt.Site(("blocks.1.mlp.hook_in",), ("blocks.1.hook_mlp_out",), "mlp1")
    transcoder: SAE = build("relu", widths=Widths((6,), (4,), False))
    saeopt.export(transcoder, to="safetensors", folder=tmp_path / "out", site=own)
    saes = saeopt.load(tmp_path / "out")
    for given in (saes, saes["mlp1"]):
        saeopt.export(given, to="sae-lens", folder=tmp_path / "again")
        (again,) = saeopt.load(tmp_path / "again").values()
        assert again.origin is not None
        assert again.origin.site.hooks == own.hooks


def test_from_python(tmp_path: Path) -> None:
    sae: SAE = build("jumprelu", dtype=torch.float32)
    site = saeopt.Site(("blocks.0.hook_resid_pre",), ("blocks.0.hook_resid_pre",), "blocks.0.hook_resid_pre")
    found = saeopt.export(sae, to="sae-lens", folder=tmp_path / "new/out", site=site, unit_decoder=True, license="mit")
    assert found == tmp_path / "new/out"
    weights = load_file(found / "blocks.0.hook_resid_pre/sae_weights.safetensors")
    torch.testing.assert_close(weights["W_dec"].norm(dim=-1), torch.ones(sae.h))
    (again,) = saeopt.load(found).values()
    x_Nd = 5 + torch.randn(50, sae.d)
    torch.testing.assert_close(again(x_Nd), sae(x_Nd), rtol=1e-5, atol=1e-4)


# ---- the hub
def pushing(state: State, folder: Path, **more: str) -> dict[str, str]:
    """The environment of someone who pushes to the stand-in."""
    told = {"HF_ENDPOINT": state.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": state.token, "HF_HUB_DISABLE_XET": "1"}
    return {**told, "HF_HOME": str(folder / "hf"), **more}


def saeopt_command(*words: object, cwd: Path, code: int = 0, **environment: str) -> tuple[str, str]:
    """Its output and its errors, in a process of its own: the client reads its environment once."""
    told = {**os.environ, "COLUMNS": "80", "SAEOPT_STORAGE": f"sqlite:///{cwd}/store.db", **environment}
    command = [sys.executable, "-m", "saeopt", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=told, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


def test_a_push_goes_on_over_faults_sends_nothing_twice_and_saelens_loads_it(place: Path, tmp_path: Path) -> None:
    words = ["export", "--study", "s", "--front", "--to", "sae-lens", "pushed", "--push", "me/saes"]
    with hub() as state:
        state.faults += [
            ("/repos/create", "503"),
            ("/preupload/", "drop"),
            ("/objects/batch", "drop"),
            ("/commit/", "503"),
        ]
        said, error = saeopt_command(*words, cwd=place, **pushing(state, tmp_path))
        assert said.endswith(f"pushed: {state.url}/me/saes\n")
        assert state.faults == []
        assert error.count("trying again") == 2  # the client itself tries again where a connection broke
        assert (state.commits, len(state.sent()), len(state.objects)) == (1, 4, 4)
        assert state.files == {name: (place / "pushed" / name).read_bytes() for name in tree(place / "pushed")}
        assert yaml.safe_load(state.files["pretrained_saes.yaml"])["pushed"]["repo_id"] == "me/saes"
        saeopt_command(*words, cwd=place, **pushing(state, tmp_path))
        assert (state.commits, len(state.sent())) == (1, 4)

        x_Nd = 3 + torch.randn(20, 16)
        torch.save(x_Nd, tmp_path / "x.pt")
        worker = Path(__file__).with_name("sae_lens_worker.py")
        table = place / "pushed" / "pretrained_saes.yaml"
        run_worker(
            "sae-lens", worker, tmp_path, "pushed", table, **pushing(state, tmp_path, HF_HOME=str(tmp_path / "its"))
        )
    found: dict[str, dict[str, Any]] = torch.load(tmp_path / "found.pt")
    assert set(found) == {f"{hook}/trial-{n}" for hook in HOOKS for n in (0, 1)}
    for name, theirs in found.items():
        hook, trial = name.split("/trial-")
        sae = saeopt.load_sae(place / "out/s" / trial, site=hook)
        torch.testing.assert_close(theirs["code"], sae.encode(x_Nd), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs["forward"], sae(x_Nd), rtol=1e-5, atol=1e-5)
        assert (theirs["hook"], theirs["trained"], 0 < theirs["l0"] < 32) == (hook, "batch_topk", True)


def test_what_the_hub_refuses_is_one_line(place: Path, tmp_path: Path) -> None:
    saeopt_command("export", "out/s/0", "refused", "--to", "safetensors", cwd=place)
    push = ["export", "refused", "--push", "me/saes"]
    with hub() as state:
        _, error = saeopt_command(*push, cwd=place, code=2, **pushing(state, tmp_path, HF_TOKEN="hf_bad"))
        assert (
            "--push me/saes: the hub knows no such token (401): 'hf auth login' or HF_TOKEN; all is in refused" in error
        )
        assert "hf_bad" not in error
        _, error = saeopt_command(*push, cwd=place, code=2, **pushing(state, tmp_path, HF_HUB_OFFLINE="1"))
        assert (
            "--push me/saes: HF_HUB_OFFLINE is set; all is in refused: 'saeopt export refused --push me/saes' goes"
            in error
        )
    _, error = saeopt_command(*push, cwd=place, code=2, **pushing(state, tmp_path))
    assert "--push me/saes: the hub cannot be reached: " in error
    assert len([line for line in error.splitlines() if "error:" in line]) == 1
