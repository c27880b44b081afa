"""Fixtures that several packages share. Real models and texts are used where `SAEOPT_SHARED` or ../shared has them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")

SHARED = Path(os.environ.get("SAEOPT_SHARED") or Path(__file__).resolve().parents[2] / "shared")


def shared(path: str) -> Path:
    """A file or folder of the shared material; skips the test where it is absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"{path} is not there (set SAEOPT_SHARED to the folder that holds it)")
    return found


@pytest.fixture(scope="session")
def stories() -> Path:
    """Directory of stories260K, a small real language model."""
    return shared("models/stories260K")


@pytest.fixture(scope="session")
def tinystories_text() -> Path:
    """1,000 TinyStories as a text file."""
    return shared("data/tinystories-1000/tinystories_1000.txt")


@pytest.fixture(scope="session")
def tinystories() -> list[str]:
    """1,000 TinyStories."""
    return json.loads(shared("data/tinystories-1000/tinystories_1000.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer Llama (d=16, vocabulary 64, context 64) and tokenizer, as a Hugging Face directory."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny") / "llama"
    words = ["<s>", "</s>", "<unk>"] + [f"w{i}" for i in range(61)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl data set of 400 documents of 20 to 60 words of the tiny model's vocabulary, column `text`."""
    import random

    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "tiny.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(400):
            words = [f"w{rng.randrange(61)}" for _ in range(rng.randrange(20, 61))]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path
