"""Make what studies/demo.yaml trains on, without any download: a random language model and the text of Python's manual.

It shows that database, workers, volumes and dashboard work together; what SAEs find in random weights means nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path


def make_model(folder: Path) -> None:
    """A Llama of two layers (d=64) with random weights, and a tokenizer of single bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=256
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, bos_token_id=0, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def make_text(file: Path) -> None:
    """The topics of Python's own help, one document each."""
    from pydoc_data.topics import topics

    with file.open("w", encoding="utf-8") as sink:
        for name in sorted(topics):
            sink.write(json.dumps({"text": topics[name]}) + "\n")


def main() -> None:
    """Appears complete or not at all."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    target = Path(os.environ.get("SAEOPT_CACHE_DIR", "cache")) / "demo"
    if target.exists():
        return
    sys.stderr.write(f"saeopt: making the demo's model and text in {target}\n")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".demo-", dir=target.parent) as scratch:
        made = Path(scratch) / "demo"
        make_model(made / "model")
        make_text(made / "text.jsonl")
        for path in (made, *made.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        try:
            made.rename(target)
        except OSError:  # another container was faster
            if not target.exists():
                raise


if __name__ == "__main__":
    main()
