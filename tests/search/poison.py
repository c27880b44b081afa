"""SAEs of one's own that break the process in which they are trained."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from torch import Tensor

from saeopt.saes.relu import ReluSAE


class Killing(ReluSAE):
    """Ends its process at its first step, as a driver or the out-of-memory killer does."""

    def training_forward(self, *args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


class Leaving(ReluSAE):
    """Ends the whole program."""

    def training_forward(self, *args: Any, **kwargs: Any) -> Any:
        raise SystemExit(5)


class Asserting(ReluSAE):
    """Fails an assertion on the device, after which its process can use the GPU no more."""

    def training_forward(self, x_Nd: Tensor, *args: Any, **kwargs: Any) -> Any:
        torch._assert_async(x_Nd.new_zeros(()))
        return super().training_forward(x_Nd, *args, **kwargs)
