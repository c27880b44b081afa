"""The relu step on a CUDA device: the code is written once, by the product itself, or in narrow models not at all.

Shape suffixes as in `dense`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saeopt.config.machine import PerformanceConfig
from saeopt.saes.base import SAE
from saeopt.training.step.contract import StackOptions, Store
from saeopt.training.step.dense import (
    NARROW,
    Back,
    Found,
    Given,
    Product,
    centre,
    decode,
    decoder_products,
    errors,
    last_sums,
    pulled_back,
    relu_sums,
)
from saeopt.training.step.forms import Form
from saeopt.training.step.gpu.dense import Call, around, caller, narrow_sums, products
from saeopt.training.step.kernels import narrow as kernels_narrow
from saeopt.training.step.kernels import relu as kernels_relu
from saeopt.training.step.stack import Assembly
from saeopt.training.step.storage import Packed


class ReluCore:
    """In narrow models without the code in memory."""

    def __init__(self, form: Form, d: int, low_dtype: torch.dtype, call: Call) -> None:
        self.form, self.call = form, call
        self.writes_code = d > NARROW or low_dtype != torch.bfloat16 or bool(form.prefixes)

    def __call__(self, given: Given, out: Store | None) -> tuple[Store, Found]:
        """As the contract says."""
        return self._wide(given, out) if self.writes_code else self._narrow(given)

    def _wide(self, given: Given, out: Store | None) -> tuple[Store, Found]:
        """`dense.run` with bias and relu at the end of the first product, and the gradient behind relu in its place.

        The bias enters in the dtype of the products, as it does under autocast. Masked tokens have a code like any
        other here; they drop out with their error, and in the backward kernel.
        """
        low, form = given.low, self.form
        centred, b_enc, push_Mh = self.call(before_wide, form, given)
        f = torch.empty(len(push_Mh), len(given.x_Nd), push_Mh.shape[1], dtype=centred.dtype, device=centred.device)
        for member, f_Nh in enumerate(f):
            torch._addmm_activation(b_enc[member], centred[member], low["W_enc"][member].mT, out=f_Nh)
        decoded = decode(form, [f], low["W_dec"])
        g_errors, g_b_dec, squared_M, loss_M = self.call(errors, form, given, decoded)
        del decoded
        (g_pre,) = pulled_back(form, g_errors, low["W_dec"])
        parts_3SMh = kernels_relu.backward(f, g_pre, given.keep_N, push_Mh)
        back: Back = self.call(wide_sums, form, given, g_pre, parts_3SMh)
        g_b_dec, totals_M4 = self.call(last_sums, given, ["W_enc"], g_b_dec, squared_M, loss_M, back)
        wanted = [*decoder_products(form, [f], g_errors), Product("W_enc", g_pre, centred)]
        found = Found([], {**back.vectors, "b_dec": g_b_dec}, back.pull_Mh, totals_M4, back.fired_Mh)
        return products(wanted, low, out), found

    def _narrow(self, given: Given) -> tuple[Store, Found]:
        """`dense.run` without the code in memory."""
        low, form, keep_N = given.low, self.form, given.keep_N
        b_enc, b_dec = given.vectors["b_enc"].contiguous(), given.vectors["b_dec"].contiguous()
        centred = self.call(centre, given)
        g_error, squares_MN = kernels_narrow.forward(
            given.x_Nd, centred, keep_N, low["W_enc"], low["W_dec"], b_enc, b_dec, form.mse
        )
        push_Mh = self.call(push, form, given)
        g_b_dec, squared_M, loss_M = self.call(narrow_sums, form, g_error, squares_MN)
        g_enc, g_dec, sums_3Mh = kernels_narrow.backward(
            centred, g_error, keep_N, low["W_enc"], low["W_dec"], b_enc, push_Mh
        )
        back: Back = self.call(relu_sums, form, given, g_error, *sums_3Mh)
        g_b_dec, totals_M4 = self.call(last_sums, given, ["W_enc"], g_b_dec, squared_M, loss_M, back)
        found = Found([], {**back.vectors, "b_dec": g_b_dec}, back.pull_Mh, totals_M4, back.fired_Mh)
        return {"W_dec": g_dec, "W_enc": g_enc}, found


def push(form: Form, given: Given) -> Tensor:
    """λ‖W_dec‖, what the penalty adds to the gradient of a latent that fires."""
    return (given.numbers["sparsity_coeff"] * form.penalty).unsqueeze(-1) * given.norm_Mh


def before_wide(form: Form, given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """x̄ and b_enc in the dtype of the products, and :func:`push`."""
    b_enc_Mh = given.vectors["b_enc"].to(given.low["W_enc"].dtype).contiguous()
    return centre(given), b_enc_Mh, push(form, given)


def wide_sums(form: Form, given: Given, g_pre: Tensor, parts_3SMh: Tensor) -> Back:
    """`relu_sums` from sums over pieces of the tokens."""
    return relu_sums(form, given, g_pre, *parts_3SMh.sum(1))


def assembly(form: Form, saes: Sequence[SAE], options: StackOptions, performance: PerformanceConfig) -> Assembly:
    """relu members."""
    storage = Packed(saes, form, options.autocast or saes[0].W_enc.dtype, own_norms=True)
    call = caller(performance.compile != "off")
    return around(ReluCore(form, storage.d, storage.low_dtype, call), storage, performance, options, call)
