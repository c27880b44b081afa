"""Hugging Face models and tokenizers from a folder or the hub, with one-line errors and no progress bars."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeopt.console import log
from saeopt.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_OLD_BUFFERS = re.compile(r"(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$|(^|\.)position_ids$")
"""Constants that old versions of transformers stored with the weights; not every class says so itself."""
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "base_model.model.")
"""What torch.compile, DDP, FSDP and PEFT put before the names of a model that they wrap."""


@contextlib.contextmanager
def silent_libraries() -> Iterator[None]:
    """No progress bars or advice from transformers while input is still being checked."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def one_line(error: BaseException, limit: int = 200) -> str:
    """The first words of a library's error on one line."""
    return " ".join(str(error).split())[:limit]


def _explain(name: str, what: str, error: Exception) -> UserError:
    text = f"{type(error).__name__} {error}"
    if isinstance(error, PermissionError) or "PermissionError" in text:
        return UserError(f"{name}: {one_line(error)}; for downloads HF_HOME can name a folder that is writable")
    if "gated" in text.lower() or "401" in text or "403" in text:
        return UserError(f"{name}: this {what} is gated: accept its terms on the hub and set HF_TOKEN")
    if Path(name).is_dir():
        return UserError(f"{name}: holds no {what} that can be read: {one_line(error)}")
    if isinstance(error, OSError) and ("not a local folder" in text or "404" in text or "RepositoryNotFound" in text):
        return UserError(f"{name}: no such {what} on the hub, and no such folder")
    if isinstance(error, OSError):
        return UserError(f"{name}: no such folder, and the hub cannot be reached for this {what}")
    return UserError(f"{name}: this {what} cannot be loaded: {one_line(error)}")


def read_model_config(name: str, from_path: bool) -> PretrainedConfig:
    """A model's config from a Hugging Face directory or hub name.

    Raises:
        UserError: no such directory or model, or one that may not be read.
    """
    from transformers import AutoConfig

    if from_path:
        folder = Path(name)
        try:
            folder.stat()
        except OSError as error:
            problem = "no such folder" if isinstance(error, FileNotFoundError) else error.strerror
            raise UserError(f"'tlens_model_path': {name}: {problem}") from None
        if not (folder / "config.json").is_file():
            raise UserError(f"'tlens_model_path': {name}: no Hugging Face directory (it has no config.json)")
    try:
        with silent_libraries():
            found: PretrainedConfig = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise _explain(name, "model", error) from None
    _check_causal(name, found)
    return found


def _check_causal(name: str, config: PretrainedConfig) -> None:
    """Refuse what does not predict the next token from those before it.

    BERT-like models have a causal class too, which looks at later tokens all the same unless the config says
    `is_decoder`.
    """
    from transformers.models.auto import modeling_auto as auto

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        what = "an encoder–decoder model"
    elif kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        what = "a masked language model"
    elif kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    else:
        what = "another kind of model"
    raise UserError(f"{name}: holds {what} ({kind}), and a causal language model is needed")


def load_model(name: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A causal language model in evaluation mode on a device.

    Raises:
        UserError: no weights, no causal language model, or weights that are not those of its config.
    """
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        with silent_libraries():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        raise _explain(name, "causal language model", error) from None
    model, report = loaded
    check_weights(name, report)
    found: PreTrainedModel = model.to(device).eval()
    return found


def check_weights(name: str, report: dict[str, Any]) -> None:
    """Refuse a model some of whose tensors came from chance, by transformers' report of what it loaded.

    Tied heads that are not stored count as loaded. Names of a shape that differs come with both shapes.

    Raises:
        UserError: naming some of the tensors.
    """
    missing = sorted(report["missing_keys"])
    unexpected = sorted(key for key in report["unexpected_keys"] if not _OLD_BUFFERS.search(key))
    differing = sorted(f"{key} {tuple(found)} instead of {tuple(own)}" for key, found, own in report["mismatched_keys"])
    kinds = {"missing": missing, "of another shape": differing, "unknown to the model": unexpected}
    problems = [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names]
    if problems:
        wrapper = next((w for w in _WRAPPERS if any(key.startswith(w) for key in unexpected)), None)
        hint = f"; save the model without its wrapper (no '{wrapper}' before the names)" if wrapper else ""
        raise UserError(f"{name}: the weights are not those of its config.json; tensors: {', '.join(problems)}{hint}")


def _some(names: Iterable[str], n: int = 2) -> str:
    listed = list(names)
    return ", ".join(listed[:n]) + (", …" if len(listed) > n else "")


def load_tokenizer(name: str, required: bool) -> PreTrainedTokenizerBase | None:
    """A tokenizer; None, with a notice, where there is none and the data are token ids already.

    Raises:
        UserError: it is required and cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        with silent_libraries():
            return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if required:
            raise _explain(name, "tokenizer", error) from None
        log.info("%s has no tokenizer in reach; special tokens are those of the model's config", name)
        return None


def context_length_of(config: PretrainedConfig) -> int | None:
    """Positions that a model was made for; None where it has no limit."""
    text = config.get_text_config()
    for field in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        value = getattr(text, field, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def n_layers_of(config: PretrainedConfig) -> int:
    """Number of layers."""
    return int(config.get_text_config().num_hidden_layers)


def special_token_ids(tokenizer: PreTrainedTokenizerBase | None, config: PretrainedConfig) -> set[int]:
    """BOS, EOS and padding of the tokenizer, or of the model's config where there is no tokenizer."""
    source: object = config.get_text_config() if tokenizer is None else tokenizer
    ids: set[int] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(source, name, None)
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    return ids
