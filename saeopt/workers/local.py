"""Training on one device in this process; language model and tokens stay warm between packs."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saeopt.config.run import RunConfig
from saeopt.config.study import CPU_PACK, LARGEST_PACK, MEMORY_SHARE
from saeopt.errors import HostError
from saeopt.files import write_error

if TYPE_CHECKING:
    from saeopt.training.plan import Observer, TrialPlan, TrialResult
    from saeopt.training.runtime import Runtime

_STATE_BYTES = 12
"""Of one parameter in a checkpoint: float32 weights and two moments."""
_SPARE_BYTES = 2**20


class LocalTraining:
    """The training loop on one device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._runtime: Runtime | None = None

    @property
    def runtime(self) -> Runtime:
        """Made when it is first needed."""
        if self._runtime is None:
            from saeopt.training.launch import make_runtime

            self._runtime = make_runtime(self.device)
        return self._runtime

    def __call__(self, plans: Sequence[TrialPlan], observer: Observer) -> dict[str, TrialResult]:
        from saeopt.training import train_pack

        return train_pack(plans, self.runtime, observer)

    def fitting(self, config: RunConfig) -> int:
        """How many trials like this one fit into the device's free memory (an error halves it later)."""
        import torch

        device = self.runtime.device
        if device.type != "cuda":
            return max(1, CPU_PACK // config.seeds)
        from saeopt.training.dry_run import fitting

        free = torch.cuda.mem_get_info(device)[0] * MEMORY_SHARE
        return fitting(config, free, device, LARGEST_PACK)

    def probe(self, config: RunConfig, architecture: bool, runs: Path) -> None:
        """Raise what would keep a trial like this one from being trained here: device, model, data, sizes, room."""
        import torch

        from saeopt.training.dry_run import shapes

        torch.ones(2, device=self.runtime.device).sum().item()
        model = self.runtime.language_model(config)
        parameters = sum(member.n_parameters for member in shapes(config, model)) if architecture else 0
        self.runtime.token_data(config, model)
        check_folder(runs, _STATE_BYTES * parameters)


def check_folder(folder: Path, needed: int = 0) -> None:
    """Raise :class:`HostError` where a folder cannot be written, or has no room for `needed` bytes more."""
    probe = folder / f".probe-{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
        probe.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise write_error(folder, error) from error
    if free < (wanted := needed + _SPARE_BYTES):
        raise HostError(f"{folder}: {free / 2**20:.1f} MiB are free, {wanted / 2**20:.1f} are needed for a checkpoint")
