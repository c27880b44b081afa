"""A stand-in for the language model: a word vocabulary, and activations that are a function of the tokens."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from saeopt.config.run import DataConfig

BOS, EOS, VOCABULARY = 0, 1, 1000


def word_tokenizer(adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """Word `wI` is token I; unknown words are token 2."""
    words = ["<s>", "</s>", "<unk>"] + [f"w{i}" for i in range(3, VOCABULARY)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


class FakeModel:
    """What token data and the stream ask of a language model; x = a fixed random row per token."""

    def __init__(self, adds_bos: bool = False):
        self.tokenizer = word_tokenizer(adds_bos)
        self.special_ids = {BOS, EOS}
        self.vocab_size = VOCABULARY
        self.device = torch.device("cpu")
        self.table = torch.randn(VOCABULARY, 4, generator=torch.Generator().manual_seed(0))
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(bos_token_id=BOS, eos_token_id=EOS))
        self.sequences: list[int] = []

    dtype = torch.float32

    def width(self, hook: str) -> int:
        return 4

    def fingerprint(self) -> str:
        return str(self.table.sum().item())

    def activations(self, tokens_BT: torch.Tensor, hooks: list[str], compiled: bool = False) -> dict[str, torch.Tensor]:
        self.sequences.append(len(tokens_BT))
        x_BTd = self.table[tokens_BT].cumsum(1)
        return {hook: x_BTd * (ord(hook[-1]) - ord("a") + 1) for hook in hooks}


def data_config(name: object, **changes: object) -> DataConfig:
    fields = {
        "dataset_name": str(name), "context_length": 16, "n_eval_samples": 3, "is_tokenized": False,
        "column_name": "text", "streaming": False,
    }  # fmt: skip
    return DataConfig(**{**fields, **changes})
