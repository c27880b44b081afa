"""Whatever stands in a config or on the command line: one line that names the field, exit code 2, no run folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from saeopt import train
from saeopt.options import run_cli

ROOT = Path(__file__).resolve().parents[2]
LONG, DIGITS, DEEP = "x" * 5000, "9" * 5000, "[" * 5000

SETTINGS = {
    "data.n_train_samples": ["1e30", "0", "-1", DIGITS, "0x" + "f" * 5000, "1.5", "true", "nan", "2024-01-01"],
    "data.train_batch_size": ["1e9", "0", DIGITS, "[8]", "''"],
    "data.eval_batch_size": ["1e9", "null"],
    "data.context_length": ["1e12", "0", "65"],
    "data.shuffle_buffer_tokens": ["1e30", "-1"],
    "data.mask_norm_outliers": ["1", "1e300", ".inf"],
    "data.dataset_name": [LONG, r'"a\0b"', "''", "absent.jsonl", "*.absent", "2024-01-01", "/etc/passwd", r'"\ud800"'],
    "data.column_name": [LONG, r'"a\0b"', "absent"],
    "data.split": ["train[999999:]", "train[5:5]", "test", "train[", "train[a:b]", f"train[{DIGITS}:]", "train[:50%%]"],
    "data.seed": ["1:30", "1e30", "-1"],
    "data.tokenizer_name": ["/absent", r'"\0"'],
    "lm_batch_size": ["1e9", "0"],
    "lr": ["1e-300", "1e300", "0", "-1", "1:30.5", "2024-01-01", "lots", ".nan"],
    "seed": ["1:30", "1e30", DIGITS, "-1", "1.5", "!!bool x", "!!int x", "!!timestamp x"],
    "threads": ["1e6", "0", DIGITS],
    "save_dir": [r'"a\0b"', "''", "/proc/absent", "/dev/null", "y" * 300],
    "tlens_model_path": [LONG, r'"a\0b"', "/absent", "/etc", "z" * 300],
    "wandb_run_name": [LONG, r'"a\0b"'],
    "wandb_tags": [r'["a\0b"]', "{a: b}"],
    "gradient_accumulation_steps": ["1e30", "0"],
    "log_every_n_grad_steps": ["1e30", "0"],
    "warmup_samples": ["1e30", "65"],
    "adam_betas": ["[1, 1]", "[.9]", "5", "[[0.9, 0.99]]"],
    "max_grad_norm": ["0", "1e300", "1e-300"],
    "activations.cache": [r'"a\0b"', LONG, "/dev/null/cache"],
    "saes.sparsity_coeff": ["1e300", "-1", ".inf", DIGITS],
    "saes.sparsity_coeff@": ["1"],
    "saes.sparsity_coeff@blocks.9.hook_resid_pre": ["1"],
    "saes.mse_coeff": ["0", "1e300"],
    "saes.dict_size_to_input_ratio": ["1e-9", "1e300", "0", "-1"],
    "saes.dead_after_tokens": ["1e300", "0", DIGITS],
    "saes.sae_positions": ["[]", r'"\0"', LONG, "blocks.9.*", "blocks.[", "5", "[[]]", "[a, 5]"],
    "saes.name": [LONG, r'"\0"'],
    "saes.sae_type": [
        LONG, "absent", "absent.module:Class", "json:loads", "os:path", ":", "a:", ":b", "..:x", "null", "5",
        "raises:X", "does_not_parse:X", "exits:X", "deep:X", r'"json\0:x"',
    ],
    "saes.pretrained_sae_paths": ["/absent", "/etc", r'"\0"'],
    "saes": ["5", "[]", "null", DEEP, "{sae_type: relu}", "{sae_positions: [a]}"],
    "data": ["5", "null", "{}"],
    "unknown": ["1"],
    "saes.l0": ["1", "{a: 1}"],
    "": ["1"],
}  # fmt: skip
FILES = {
    "a list": b"[1, 2]",
    "a number": b"5",
    "nothing": b"",
    "no UTF-8": b"\xff\xfe\x00",
    "NUL": b"lr: \x00",
    "deep": b"lr: " + b"[" * 5000,
    "deep mapping": b"{a: " * 5000,
    "twice": b"lr: 1\nlr: 2",
    "an alias of itself": b"data: &a [*a]",
    "a tag": b"lr: !!python/object:os.system x",
    "a binary tag": b"lr: !!binary x",
    "a set": b"lr: !!set {a, b}",
    "a mapping as key": b"{[1, 2]: 3}",
    "a merge": b"<<: 5",
    "digits": b"seed: " + b"9" * 5000,
}


@pytest.fixture
def config_file(
    tiny_model_dir: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:  # fmt: skip
    raw: dict[str, Any] = {
        "tlens_model_path": str(tiny_model_dir), "save_dir": "output", "lr_schedule": "constant", "threads": 1,
        "recipe": 2, "legacy_scaling": False,
        "data": {
            "dataset_name": str(tiny_text), "is_tokenized": False, "column_name": "text", "streaming": False,
            "context_length": 16, "n_train_samples": 64, "n_eval_samples": 8, "train_batch_size": 8,
        },
        "saes": {"sae_type": "relu", "sae_positions": ["blocks.1.hook_resid_pre"]},
    }  # fmt: skip
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw))
    modules = {
        "raises": "raise RuntimeError('at import')", "does_not_parse": "def", "exits": "import sys; sys.exit(3)",
        "deep": "def f(): f()\nf()",
    }  # fmt: skip
    (tmp_path / "modules").mkdir()
    for name, text in modules.items():
        (tmp_path / "modules" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("saeopt.console.set_up_logging", lambda *args, **kwargs: None)  # its stream outlives no test
    return path


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says; fails unless it is one line, with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        run_cli(train.app, arguments)
    shown = capsys.readouterr().err.strip()
    lines = [line for line in shown.splitlines() if "saeopt: error:" in line]
    assert ended.value.code == 2, (arguments[-1][:80], shown[-300:])
    assert len(lines) == 1, shown
    assert len(lines[0]) < 1500
    assert "Traceback" not in shown
    return lines[0]


@pytest.mark.parametrize("field", list(SETTINGS))
def test_a_malformed_value_is_one_line_that_names_the_field_and_leaves_no_folder(
    field: str, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(os.listdir(tmp_path))
    for value in SETTINGS[field]:
        line = refusal(["--config", str(config_file), "--device", "cpu", "--set", f"{field}={value}"], capsys)
        named = field.partition("@")[2] or field.split("@")[0].rpartition(".")[2]
        assert named in line or field == "save_dir", (value[:80], line)
        assert sorted(os.listdir(tmp_path)) == before, value[:80]


@pytest.mark.parametrize("content", list(FILES))
def test_a_malformed_file_is_one_line_that_names_it(
    content: str, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(FILES[content])
    assert "broken.yaml" in refusal(["--config", str(path)], capsys)


def test_a_misspelt_required_key_is_told_as_a_misspelling(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    config_file.write_text(config_file.read_text().replace("sae_positions", "sae_postions"))
    line = refusal(["--config", str(config_file)], capsys)
    assert "unknown key 'saes.sae_postions'" in line
    assert "sae_positions" in line


def test_a_final_temperature_without_annealing_is_refused_in_a_new_run_alone(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["--set", "saes.sae_type=hard_concrete", "--set", "saes.final_beta=0.1"]
    assert "'saes.final_beta' has no effect" in refusal(["--config", str(config_file), *changes], capsys)


def test_a_dry_run_refuses_a_field_at_a_hook_point_that_is_not_there(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["--set", "saes.target_l0@blocks.1.hook_resid_prr=5", "--dry-run"]
    line = refusal(["--config", str(config_file), "--device", "cpu", *wrong], capsys)
    assert "saes.per_hook" in line
    assert "blocks.1.hook_resid_prr" in line


def test_what_is_found_out_late_names_the_file_or_the_change(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sizes of the model, and what the data hold, are known only when they have been read."""
    known, topk = ["--config", str(config_file), "--device", "cpu"], ["--set", "saes.sae_type=topk"]
    jumprelu = ["saes.sae_type=jumprelu", "saes.penalty=quadratic", "saes.l0_penalty_target=9000"]
    cases = {
        "--set saes.k=600: 'saes.k': 600 exceeds the dictionary's": [*topk, "--set", "saes.k=600"],
        "--set saes.target_l0=9000: 'saes.target_l0': 9000 exceeds": ["--set", "saes.target_l0=9000"],
        "--set saes.l0_penalty_target=9000: 'saes.l0_penalty_target'": [w for c in jumprelu for w in ("--set", c)],
        "--set data.context_length=5000: 'data.context_length': 5000 is longer": ["--set", "data.context_length=5000"],
        "--set saes.sae_positions=blocks.9.hook_mlp_out: 'saes.sae_positions'": [
            "--set", "saes.sae_positions=blocks.9.hook_mlp_out",
        ],
    }  # fmt: skip
    for line, words in cases.items():
        assert f"saeopt: error: {line}" in refusal([*known, *words], capsys)
        assert f"saeopt: error: {line}" in refusal([*known, *words, "--dry-run"], capsys)
    config_file.write_text(config_file.read_text().replace("relu", "topk\n  k: 600"))
    assert f"{config_file}: 'saes.k': 600 exceeds" in refusal(known, capsys)
    assert not (tmp_path / "output").exists()


def test_a_k_that_selects_nothing_is_refused_before_anything_is_read(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = yaml.safe_load(config_file.read_text())["data"]
    tokens = raw["context_length"] * raw["train_batch_size"]
    words = ["--config", str(config_file), "--set", "saes.sae_type=batch_topk", "--set"]
    for change, name in ((f"saes.k={0.9 / tokens}", "saes.k"), (f"saes.target_l0={0.9 / tokens}", "saes.target_l0")):
        for more in ([], ["--dry-run"]):
            line = refusal([*words, change, *more], capsys)
            assert f"'{name}': " in line
            assert f"selects nothing in a micro-batch of {tokens} tokens: at least {1 / tokens:.3g}" in line


def test_real_command_lines(config_file: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path / 'modules'}", "OMP_NUM_THREADS": "1"}
    cases: dict[str, Callable[[str], bool]] = {
        "saes.sae_type=exits:X": lambda text: "SystemExit" in text,
        "data.split=train[999999:]": lambda text: "data.split" in text,
        "threads=100000": lambda text: "threads" in text,
    }
    for change, told in cases.items():
        command = [sys.executable, "-m", "saeopt.train", "--config", str(config_file), "--set", change]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert told(done.stderr), done.stderr
        assert not (tmp_path / "output").exists()


def test_an_argument_that_is_no_text_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no UTF-8 text" in refusal(["--config", "\udc80.yaml"], capsys)
    assert len(refusal(["--config", "x" * 5000], capsys)) < 1100
