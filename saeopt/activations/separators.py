"""What stands between documents, and whether they are joined at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saeopt.console import log
from saeopt.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from saeopt.activations.language_model import LanguageModel
    from saeopt.config.run import DataConfig

END_OF_TEXT = "<|endoftext|>"
_CHAT_MARKS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")


@dataclass(frozen=True)
class Separator:
    """The token before each document (BOS) or after each; none where documents are full blocks.

    Documents that are not to share a sample are padded to a multiple of a sample's tokens.
    """

    token: int | None = None
    before: bool = False
    multiple: int = 1
    padding: int = 0

    def lengths(self, documents: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """Joined lengths of documents, given their lengths and their first tokens (BOS) or last tokens."""
        missing = np.zeros(len(ends), bool) if self.token is None else ends != self.token
        return -(-(documents + (missing & (documents > 0))) // self.multiple) * self.multiple

    def join(self, documents: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
        """Documents as one array, separated; a document that brings its separator along gets no second one."""
        parts: list[NDArray[Any]] = []
        mark = np.array([self.token or 0], dtype=np.int32)
        for document in documents:
            if len(document) == 0:
                continue
            own = self.token is None or document[0 if self.before else -1] == self.token
            parts += [document] if own else [mark, document] if self.before else [document, mark]
            if missing := -(len(document) + (not own)) % self.multiple:
                parts.append(np.full(missing, self.padding, dtype=np.int32))
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def separator_of(data: DataConfig, model: LanguageModel) -> tuple[Separator, int | None]:
    """The separator that a config asks for, and BOS.

    Raises:
        UserError: the tokenizer and the model's config have no such token.
    """
    bos, eos, pad = (_token(model, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
    if data.prepend_bos and bos is None:
        raise UserError("'data.prepend_bos': the tokenizer has no BOS token")
    found = _separator(data.separator, model, bos, eos)
    if data.join_documents:
        return found, bos
    padding = next((token for token in (pad, eos, bos, found.token) if token is not None), None)
    if padding is None:
        raise UserError("'data.join_documents: false' needs a token to pad with, and the tokenizer has none")
    if data.prepend_bos and found.before:
        found = Separator()  # every sample begins with BOS as it is
    return replace(found, multiple=data.context_length - data.prepend_bos, padding=padding), bos


def _separator(choice: str, model: LanguageModel, bos: int | None, eos: int | None) -> Separator:
    if choice == "none":
        return Separator()
    if choice not in ("auto", "bos", "eos"):
        named = token_id(choice, model.tokenizer)
        return Separator(named, before=named == bos != eos)
    if choice == "auto":
        adds_bos = model.tokenizer is not None and bos is not None and model.tokenizer("a")["input_ids"][:1] == [bos]
        choice = "bos" if adds_bos or eos is None else "eos"
        if bos is None and eos is None:
            log.info("the tokenizer has neither BOS nor EOS: documents are joined without a separator")
            return Separator()
        _tell_chat_mark(model, bos if choice == "bos" else eos)
    token = bos if choice == "bos" else eos
    if token is None:
        raise UserError(f"'data.separator': the tokenizer has no {choice.upper()} token")
    return Separator(token, before=choice == "bos")


def token_id(text: str, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """The token that a config's `separator` spells out.

    Raises:
        UserError: there is none of this text.
    """
    if tokenizer is None:
        raise UserError(f"'data.separator': '{text}' cannot be looked up: there is no tokenizer")
    found: int | None = tokenizer.get_vocab().get(text)
    if found is None:
        raise UserError(f"'data.separator': must be auto, bos, eos, none or the text of one token (got '{text}')")
    return found


def _tell_chat_mark(model: LanguageModel, token: int | None) -> None:
    """A model that was trained to chat ends turns with its EOS, and documents with another token."""
    if model.tokenizer is None or token is None:
        return
    text = str(model.tokenizer.convert_ids_to_tokens(token))
    if text in _CHAT_MARKS and END_OF_TEXT in model.tokenizer.get_vocab():
        log.info(
            "documents are separated by %s, which ends turns of a chat; data.separator: '%s' is what stands between"
            " documents", text, END_OF_TEXT,
        )  # fmt: skip


def special_tokens(model: LanguageModel) -> list[int]:
    """EOS and BOS, as far as there are any."""
    return [t for name in ("eos_token_id", "bos_token_id") if (t := _token(model, name)) is not None]


def separator_token(choice: str, tokenizer: PreTrainedTokenizerBase | None) -> set[int]:
    """The token that `data.separator` spells out, which counts as special; empty where it names none."""
    return set() if choice in ("auto", "bos", "eos", "none") else {token_id(choice, tokenizer)}


def _token(model: LanguageModel, name: str) -> int | None:
    source: PretrainedConfig | PreTrainedTokenizerBase = (
        model.config.get_text_config() if model.tokenizer is None else model.tokenizer
    )
    value = getattr(source, name, None)
    return value[0] if isinstance(value, list) else value
