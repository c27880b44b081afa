"""Devices, ranks and the parts of a run that stay warm between packs."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env

from saeopt.activations.source import Samples, Source, open_samples, open_source
from saeopt.config.run import RunConfig
from saeopt.errors import UserError
from saeopt.host.launcher import launched
from saeopt.training.environment import check_environment, check_gpus, check_joined, precision
from saeopt.training.memory import ModelShape
from saeopt.training.ranks import Axis, Ranks

_DTYPES: dict[str, torch.dtype | None] = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def _join(on_cpu: bool) -> Accelerator:
    """Accelerate's view of this process, in a group with those that were started with it."""
    try:
        return Accelerator(cpu=on_cpu)
    except (ValueError, RuntimeError) as error:  # no address, or nobody there
        if (started := launched().size) == 1:
            raise
        raise UserError(f"{started} processes were started (WORLD_SIZE), but they cannot join: {error}") from error


class Runtime:
    """One process's Accelerator, device, language model and tokens.

    Accelerate decides device, rank and precision where the config does not. The last language model and the
    last token data are kept: a worker trains pack after pack without loading them again.

    Raises:
        UserError: Accelerate is asked for what this is not made for, or processes that started together are apart.
    """

    def __init__(self, device: str | torch.device | None = None, *, weights_dtype: torch.dtype = torch.float32) -> None:
        wanted = None if device is None or str(device) == "auto" else torch.device(device)
        if wanted is None and torch.backends.mps.is_available():  # no float64 there, which sums are kept in
            wanted = torch.device("cpu")
        check_environment()
        on_cpu = wanted is not None and wanted.type == "cpu"
        if not on_cpu and not parse_flag_from_env("ACCELERATE_USE_CPU"):
            check_gpus(torch.cuda.device_count())
        self.accelerator = _join(on_cpu)
        self.ranks = Ranks(data=Axis(int(self.accelerator.process_index), int(self.accelerator.num_processes)))
        check_joined(self.ranks.data.size)
        if wanted is not None and wanted.type == "cuda":
            wanted = torch.device("cuda", wanted.index or 0)
            torch.cuda.set_device(wanted)
        self.device: torch.device = wanted if wanted is not None else self.accelerator.device
        self.weights_dtype = weights_dtype
        self._kept: dict[str, tuple[object, Any]] = {}

    def autocast(self, config: RunConfig) -> torch.dtype | None:
        """Dtype of the SAEs' matrix products: the config's, `accelerate launch`'s, or bf16 on a GPU."""
        return _DTYPES[precision(config, self.device.type)[0]]

    def language_model(self, config: RunConfig) -> Source:
        """The config's language model on this device, or the files that stand in for it."""
        data = config.data
        tokens = (data.context_length, data.tokenizer_name, data.is_tokenized, data.separator)
        key = (config.model, config.lm_dtype, config.lm_processing, *tokens)
        return self._keep("model", key, lambda: open_source(config, self.device))

    def model_shape(self, config: RunConfig) -> ModelShape:
        """What the memory of the config's language model depends on."""
        from saeopt.training.dry_run import weightless

        key = (config.model, str(config.data.activations))
        return self._keep("shape", key, lambda: weightless(config)[1])

    def token_data(self, config: RunConfig, model: Source) -> Samples:
        """The config's token data, tokenised for `model`."""
        key = (config.model, config.data.model_dump_json(exclude={"train_batch_size", "eval_batch_size"}))
        return self._keep("tokens", key, lambda: open_samples(config.data, model))

    def _keep(self, kind: str, key: object, load: Any) -> Any:
        kept = self._kept.get(kind)
        if kept is None or kept[0] != key:
            self._kept.pop(kind, None)
            self._kept[kind] = (key, load())
        return self._kept[kind][1]

    def leave(self) -> None:
        """Part from the other ranks at the end of all work; NCCL warns of a process that just ends."""
        if self.ranks.data.size > 1:
            self.accelerator.state.destroy_process_group()
