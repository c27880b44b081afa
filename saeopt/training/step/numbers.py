"""The members' numbers of a window, by name on the host and as columns on the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from saeopt.training.step.contract import Numbers

FIRST_SAMPLE = "first_sample"
"""The number of a micro-batch's first sample, on which gate noise depends."""


class Table:
    """`rows`: each member's numbers as they were given; `on_device` (M, C) holds those of `names`, in float64.

    What is known on the host is sent where it changed; what a control keeps on the device is copied there. Nothing
    waits for the device.
    """

    def __init__(self, names: Iterable[str], size: int, device: torch.device) -> None:
        self.names = {name: at for at, name in enumerate([*names, FIRST_SAMPLE])}
        self.on_device = torch.zeros(size, len(self.names), dtype=torch.float64, device=device)
        self.rows: Sequence[Numbers] = ()
        self.first_sample = 0
        self._sent: list[list[float]] = []
        self._moving: list[str] = []

    def set(self, rows: Sequence[Numbers], first_sample: int) -> None:
        """The numbers of a micro-batch; `rows` must not be changed afterwards."""
        if rows is not self.rows or first_sample != self.first_sample:
            self.rows, self.first_sample = rows, first_sample
            self._moving = [n for n in self.names if n != FIRST_SAMPLE and isinstance(rows[0][n], Tensor)]
            self._send()
        for name in self._moving:
            self.column(name).copy_(torch.stack([torch.as_tensor(row[name]) for row in rows]))

    def _send(self) -> None:
        known = [n for n in self.names if n != FIRST_SAMPLE]
        numbers = [
            [*(0.0 if n in self._moving else float(row[n]) for n in known), float(self.first_sample)]
            for row in self.rows
        ]
        if numbers != self._sent:
            self._sent, sent = numbers, torch.tensor(numbers, dtype=torch.float64)
            # pinned memory is reused only after its copy has run
            self.on_device.copy_(sent.pin_memory() if self.on_device.is_cuda else sent, non_blocking=True)

    def column(self, name: str) -> Tensor:
        """One number of all members (M); a view that stays where it is."""
        return self.on_device[:, self.names[name]]
