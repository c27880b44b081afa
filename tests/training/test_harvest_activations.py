"""scripts/harvest_activations.py: the values are the language model's, without special tokens and first positions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "harvest_activations.py"


def harvest(model: Path, text: Path, out: Path, n: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(model), str(text), str(out), str(n)]
    command += ["--hook", "blocks.0.hook_resid_pre", "--context", "32", "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_file_holds_what_the_model_computes(stories: Path, tinystories: list[str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    (tmp_path / "t.txt").write_text("\n\n".join(s.replace("\n", " ") for s in tinystories[:40]))
    done = harvest(stories, tmp_path / "t.txt", tmp_path / "x.safetensors", 500)
    assert done.returncode == 0, done.stderr
    x_Nd = load_file(tmp_path / "x.safetensors")["x"]
    assert (x_Nd.shape, x_Nd.dtype) == ((500, 64), torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    rows_Vd = model.get_input_embeddings().weight.detach()  # what the first block reads, whatever came before
    distance_N, token_N = torch.cdist(x_Nd.float(), rows_Vd).min(dim=1)
    assert (distance_N < 0.01 * x_Nd.float().norm(dim=-1)).all()
    assert len(token_N.unique()) > 50
    assert model.config.bos_token_id not in token_N


def test_a_text_that_is_too_short_leaves_nothing(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("Once upon a time there was a cat. " * 200)
    done = harvest(stories, tmp_path / "t.txt", tmp_path / "x.safetensors", 10**6)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "1,000,000 are wanted" in done.stderr
    assert not (tmp_path / "x.safetensors").exists()
