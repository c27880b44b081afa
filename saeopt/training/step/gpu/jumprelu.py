"""The jumprelu step on a CUDA device: the code lies where the pre-activations were, or in narrow models nowhere.

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
)
from saeopt.training.step.forms import Form
from saeopt.training.step.gpu.dense import Call, PlainCore, around, caller, narrow_sums, products
from saeopt.training.step.jumprelu import JUMPRELU, counted, push
from saeopt.training.step.kernels import jumprelu as kernels_jumprelu
from saeopt.training.step.kernels import narrow as kernels_narrow
from saeopt.training.step.stack import Assembly
from saeopt.training.step.storage import Packed


class JumpReluCore:
    """Of penalties that reach θ alone: `step` and `quadratic`; `tanh` has the dense core."""

    def __init__(self, form: Form, d: int, low_dtype: torch.dtype, call: Call) -> None:
        self.form, self.call = form, call
        self.writes_code = d > NARROW or low_dtype != torch.bfloat16

    def __call__(self, given: Given, out: Store | None) -> tuple[Store, Found]:
        """As the contract says."""
        return self._wide(given, out) if self.writes_code else self._narrow(given)

    def _wide(self, given: Given, out: Store | None) -> tuple[Store, Found]:
        """`dense.run`, with the code in the pre-activations' place.

        Masked tokens have a code like any other here; they drop out with their error, and in the backward kernel.
        """
        low, form = given.low, self.form
        centred, b_enc, theta, push_Mh, width_M = self.call(before, form, given)
        f = torch.bmm(centred, low["W_enc"].mT)
        kernels_jumprelu.code(f, b_enc, theta, width_M)
        decoded = decode(form, [f], low["W_dec"])
        g_errors, g_b_dec, squared_M, loss_M = self.call(errors, form, given, decoded)
        del decoded
        (g_pre,) = pulled_back(form, g_errors, low["W_dec"])
        parts_3SMh = kernels_jumprelu.backward(f, g_pre, given.keep_N, theta, width_M, push_Mh)
        back: Back = self.call(jumprelu_sums, form, given, push_Mh, g_pre, parts_3SMh)
        g_b_dec, totals_M4 = self.call(last_sums, given, ["W_enc"], g_b_dec, squared_M, loss_M, back)
        wanted = [*decoder_products(form, [f], g_errors), Product("W_enc", g_pre, centred)]
        found = Found([], {**back.vectors, "b_dec": g_b_dec}, None, totals_M4, back.fired_Mh)
        return products(wanted, low, out), found

    def _narrow(self, given: Given) -> tuple[Store, Found]:
        """`dense.run` without the code in memory."""
        low, form, keep_N = given.low, self.form, given.keep_N
        centred, b_enc, theta, push_Mh, width_M = self.call(before, form, given)
        g_error, squares_MN = kernels_narrow.forward(
            given.x_Nd, centred, keep_N, low["W_enc"], low["W_dec"], b_enc, given.vectors["b_dec"].contiguous(),
            form.mse, theta,
        )  # fmt: skip
        g_b_dec, squared_M, loss_M = self.call(narrow_sums, form, g_error, squares_MN)
        g_enc, g_dec, sums_3Mh = kernels_narrow.backward(
            centred, g_error, keep_N, low["W_enc"], low["W_dec"], b_enc, push_Mh, theta, width_M
        )
        back: Back = self.call(jumprelu_sums, form, given, push_Mh, g_error, sums_3Mh.unsqueeze(1))
        g_b_dec, totals_M4 = self.call(last_sums, given, ["W_enc"], g_b_dec, squared_M, loss_M, back)
        found = Found([], {**back.vectors, "b_dec": g_b_dec}, None, totals_M4, back.fired_Mh)
        return {"W_dec": g_dec, "W_enc": g_enc}, found


def before(form: Form, given: Given) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x̄ in the dtype of the products, b_enc, θ, the penalty's slope by each latent's firings, and ε."""
    theta = given.vectors["threshold"].contiguous()
    push_Mh = push(form, given).contiguous()
    return centre(given), given.vectors["b_enc"].contiguous(), theta, push_Mh, given.numbers["bandwidth"].contiguous()


def jumprelu_sums(form: Form, given: Given, push_Mh: Tensor, g_pre: Tensor, parts_3SMh: Tensor) -> Back:
    """What follows from sums over pieces of the tokens: ∂θ = −Σ (θ ∂f + the penalty's slope) / ε over the band."""
    g_b_enc, band_Mh, fired_Mh = parts_3SMh.sum(1)
    vectors = {"b_enc": g_b_enc, "threshold": -band_Mh / given.numbers["bandwidth"].unsqueeze(-1)}
    sparsity_M = counted(form, given, push_Mh, fired_Mh)
    return Back([g_pre], vectors, [g_b_enc], None, sparsity_M, fired_Mh)


def assembly(form: Form, saes: Sequence[SAE], options: StackOptions, performance: PerformanceConfig) -> Assembly:
    """jumprelu members."""
    storage = Packed(saes, form, options.autocast or saes[0].W_enc.dtype, own_norms=True)
    call = caller(performance.compile != "off")
    core = PlainCore(JUMPRELU, form, call) if form.tanh else JumpReluCore(form, storage.d, storage.low_dtype, call)
    return around(core, storage, performance, options, call)
