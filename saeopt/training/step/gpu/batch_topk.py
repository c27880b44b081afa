"""The batch_topk step on a CUDA device: topk's, with a selection over all tokens and codes of any length.

Shape suffixes as in `topk`; E places for the selected entries of a member, as many as k of every token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saeopt.config.machine import PerformanceConfig
from saeopt.saes.base import SAE
from saeopt.saes.batch_topk import running_mean
from saeopt.training.step.contract import TALLY, StackOptions, Store
from saeopt.training.step.forms import Form
from saeopt.training.step.gpu.dense import Call
from saeopt.training.step.gpu.topk import Code, GpuTopkPass, assembled
from saeopt.training.step.kernels import batch as kernels_batch
from saeopt.training.step.stack import Assembly
from saeopt.training.step.storage import Packed


class GpuBatchTopkPass(GpuTopkPass):
    """batch_topk members on a CUDA device."""

    k_dtype = torch.float64

    def __init__(self, storage: Packed, options: StackOptions, call: Call) -> None:
        super().__init__(storage, options, call)
        self.floor_M = kernels_batch.first_floors(len(self.members), storage.device)

    def _select(self, pre: Tensor, b_enc: Tensor, keep: Tensor | None, n_kept: Tensor) -> Code:
        """The int(k · n) largest of the n kept tokens."""
        places = max(1, int(self.k * pre.shape[1]))
        want_M = (self.k_M * n_kept).to(torch.int32)
        values, latents, rows, start = kernels_batch.select(pre, b_enc, keep, want_M, places, self.floor_M)
        return Code(values, latents, (rows, start))

    def _tallies(self, code: Code) -> Store:
        """The smallest kept activation of this micro-batch, and whether there is one."""
        least_M, found_M = self.call(smallest, code.values)
        return {TALLY + "smallest": least_M, TALLY + "batches": found_M}

    def after_window(self, tallies: Store, went_M: Tensor) -> bool:
        """As the contract says."""
        buffers = self.storage.buffers
        threshold_M, windows_M = buffers["threshold"], buffers["threshold_windows"]
        self.call(move_thresholds, threshold_M, windows_M, tallies["smallest"], tallies["batches"], went_M)
        return True


def move_thresholds(
    threshold_M: Tensor, windows_M: Tensor, smallest_M: Tensor, batches_M: Tensor, went_M: Tensor
) -> None:
    """Every member's threshold takes the window in, unless it was broken."""
    new_M, more_M = running_mean(threshold_M, windows_M, smallest_M, batches_M)
    threshold_M.copy_(torch.where(went_M, new_M, threshold_M))
    windows_M.copy_(torch.where(went_M, more_M, windows_M))


def smallest(values_ME: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest value above 0 of every member (0 where there is none), and 1 where there is one."""
    least_M = torch.where(values_ME > 0, values_ME, torch.inf).amin(1)
    found_M = least_M.isfinite()
    return torch.where(found_M, least_M, 0.0), found_M.to(least_M.dtype)


def assembly(form: Form, saes: Sequence[SAE], options: StackOptions, performance: PerformanceConfig) -> Assembly:
    """batch_topk members."""
    return assembled(GpuBatchTopkPass, form, saes, options, performance)
