"""Forward and backward of the architectures whose code is dense, written by hand for members side by side.

Shape suffixes: M members, N tokens, d model width, h dictionary width. `run` computes Σ over tokens of everything a
step needs; the formulas are those of the modules in `saeopt.saes`, whose autograd is the oracle. What lies between
two products is a stage of plain torch, so that torch.compile can fuse it. `codes` are the code and, where there is
one, the auxiliary code that reconstructs from the gate alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saeopt.saes.numbers import EVALUATED
from saeopt.training.step.contract import TALLY
from saeopt.training.step.forms import Form

NARROW = 128
"""Up to this d a relu stack on a GPU never writes its code (`kernels.narrow`): above, the tiles outgrow the registers,
and plain matrix products are the faster way."""
ALONE = 2**25
"""Pre-activations of a member (tokens x latents) from which members of a dense stack on a GPU are computed one after
another: each fills the card by itself, and what lies between the products needs room for one of them only."""
FIRED = "fired"
"""The tally of how often each latent fired."""


class Given(NamedTuple):
    """What a pass reads. `low` holds the matrices (M, h, d) in the dtype of the products, `vectors` (M, length),
    `numbers` the architecture's own of this window (M), `buffers` the modules' (M, …).

    Gate noise comes as `u_MNh` or as the `keys_2MN` that it is computed from (`saeopt.saes.noise`).
    """

    low: dict[str, Tensor]
    vectors: dict[str, Tensor]
    norm_Mh: Tensor
    x_Nd: Tensor
    keep_N: Tensor | None
    u_MNh: Tensor | None
    keys_2MN: Tensor | None
    numbers: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def member(self, i: int) -> Given:
        """What the pass of one member alone reads."""
        row = slice(i, i + 1)
        return self._replace(
            low={name: tensor[row] for name, tensor in self.low.items()},
            vectors={name: tensor[row] for name, tensor in self.vectors.items()},
            norm_Mh=self.norm_Mh[row],
            u_MNh=None if self.u_MNh is None else self.u_MNh[row],
            keys_2MN=None if self.keys_2MN is None else self.keys_2MN[:, row],
            numbers={name: tensor[row] for name, tensor in self.numbers.items()},
            buffers={name: tensor[row] for name, tensor in self.buffers.items()},
        )


class Product(NamedTuple):
    """The gradient of these rows of a matrix is leftᵀ right."""

    name: str
    left_MNh: Tensor
    right_MNd: Tensor
    rows: slice = slice(None)


class Found(NamedTuple):
    """What a pass gives, summed over tokens.

    `pull_Mh`: the gradient of W_dec has this multiple of W_dec besides. `totals_M4`: Σ loss terms, Σ‖x̂ − x‖²,
    Σ sparsity term, non-zeros.
    """

    products: list[Product]
    vectors: dict[str, Tensor]
    pull_Mh: Tensor | None
    totals_M4: Tensor
    fired_Mh: Tensor
    evaluated_M: Tensor | None = None
    """Non-zeros of the evaluation form, where the architecture tallies them."""

    @classmethod
    def of(cls, members: list[Found]) -> Found:
        """Of several members what their passes gave, but for the products."""
        pulls = [one.pull_Mh for one in members if one.pull_Mh is not None]
        evaluated = [one.evaluated_M for one in members if one.evaluated_M is not None]
        return cls(
            [],
            {name: torch.cat([one.vectors[name] for one in members]) for name in members[0].vectors},
            torch.cat(pulls) if pulls else None,
            torch.cat([one.totals_M4 for one in members]),
            torch.cat([one.fired_Mh for one in members]),
            torch.cat(evaluated) if evaluated else None,
        )

    def tallies(self) -> dict[str, Tensor]:
        """The window's statistics that only some architectures have."""
        return {} if self.evaluated_M is None else {TALLY + EVALUATED: self.evaluated_M.double()}


class Back(NamedTuple):
    """What lies behind the codes' gradients: those of the encoders' products and of the vectors, and sums."""

    products: list[Tensor]
    vectors: dict[str, Tensor]
    through: list[Tensor]
    pull_Mh: Tensor | None
    sparsity_M: Tensor
    fired_Mh: Tensor
    evaluated_M: Tensor | None = None
    more_M: Tensor | float = 0.0
    """Loss terms besides the squared error and the sparsity term."""


class Architecture(NamedTuple):
    """The two elementwise stages in which architectures differ."""

    codes: Callable[[Form, Given, list[Tensor]], list[Tensor]]
    back: Callable[[Form, Given, list[Tensor], list[Tensor], list[Tensor]], Back]
    back_needs_pre: bool = True


def plainly(function: Callable[..., Any], *arguments: Any) -> Any:
    """A stage run as it is."""
    return function(*arguments)


def run(architecture: Architecture, form: Form, given: Given, call: Callable[..., Any] = plainly) -> Found:
    """One micro-batch. Each stage between two products goes through `call`, which may compile it.

    Stages hand over only what is in the dtype of the products: what lies in between is computed again in the
    backward stage, which costs less than to write it down.
    """
    names = ["W_enc", "W_gate"] if "W_gate" in given.low else ["W_enc"]
    centred_MNd = call(centre, given)
    pres = [torch.bmm(centred_MNd, given.low[name].mT) for name in names]
    codes = call(architecture.codes, form, given, pres)
    if not architecture.back_needs_pre:
        pres = []  # what is not needed any more makes room
    decoded = decode(form, codes, given.low["W_dec"])
    decoding = codes[:1] if form.frozen_aux else codes[:]  # through what W_dec learns
    del codes[1:]
    g_errors, g_b_dec, squared_M, loss_M = call(errors, form, given, decoded)
    g_codes = pulled_back(form, g_errors, given.low["W_dec"])
    back: Back = call(architecture.back, form, given, pres, codes, g_codes)
    g_b_dec, totals_M4 = call(last_sums, given, names, g_b_dec, squared_M, loss_M, back)
    products = decoder_products(form, decoding, g_errors[: max(len(decoding), len(form.prefixes))])
    products += [Product(name, g_pre, centred_MNd) for name, g_pre in zip(names, back.products, strict=True)]
    vectors = {**back.vectors, "b_dec": g_b_dec}
    return Found(products, vectors, back.pull_Mh, totals_M4, back.fired_Mh, back.evaluated_M)


def centre(given: Given) -> Tensor:
    """x̄ = x − b_dec in the dtype of the products."""
    return (given.x_Nd - column(given.vectors["b_dec"])).to(given.low["W_enc"].dtype)


def decode(form: Form, codes: list[Tensor], W_dec_Mhd: Tensor) -> list[Tensor]:
    """Each code times W_dec; with prefixes one code, block by block of the dictionary."""
    return [torch.bmm(code[..., block], W_dec_Mhd[:, block]) for code in codes for block in form.blocks]


def pulled_back(form: Form, g_errors: list[Tensor], W_dec_Mhd: Tensor) -> list[Tensor]:
    """Gradients of the codes."""
    if not form.prefixes:
        return [torch.bmm(g_error, W_dec_Mhd.mT) for g_error in g_errors]
    g_code = torch.empty(*g_errors[0].shape[:2], W_dec_Mhd.shape[1], dtype=W_dec_Mhd.dtype, device=W_dec_Mhd.device)
    for g_error, block in zip(g_errors, form.blocks, strict=True):
        torch.bmm(g_error, W_dec_Mhd[:, block].mT, out=g_code[..., block])
    return [g_code]


def decoder_products(form: Form, codes: list[Tensor], g_errors: list[Tensor]) -> list[Product]:
    """What W_dec learns from."""
    if form.prefixes:
        found = zip(g_errors, form.blocks, strict=True)
        return [Product("W_dec", codes[0][..., block], g_error, block) for g_error, block in found]
    left, right = (p[0] if len(p) == 1 else torch.cat(p, 1) for p in (codes, g_errors))
    return [Product("W_dec", left, right)]


def errors(form: Form, given: Given, decoded: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Gradients of the reconstructions by the codes, b_dec's of them, the first's ‖error‖², and the losses."""
    if form.prefixes:
        return prefix_errors(form, given, decoded)
    b_dec_M1d = column(given.vectors["b_dec"])
    error = [masked(d_MNd + b_dec_M1d - given.x_Nd, given.keep_N) for d_MNd in decoded]
    coefficients = (form.mse, form.aux)[: len(decoded)]
    gradients = [(2 * c * e).to(decoded[0].dtype) for c, e in zip(coefficients, error, strict=True)]
    squares = [e.square().sum((1, 2)) for e in error]
    loss_M = form.mse * squares[0]
    if len(squares) == 2:
        loss_M = loss_M + form.aux * squares[1]
    g_b_dec = gradients[0].sum(1, dtype=given.x_Nd.dtype)
    if not form.frozen_aux:
        g_b_dec = g_b_dec + gradients[1].sum(1, dtype=given.x_Nd.dtype)
    return gradients, g_b_dec, squares[0], loss_M


def prefix_errors(form: Form, given: Given, decoded: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """:func:`errors` of the reconstructions from all prefixes, in their mean.

    A block has a part in the error of its own prefix and of all longer ones.
    """
    weight = form.mse / len(decoded)
    error, squares_M = column(given.vectors["b_dec"]) - given.x_Nd, []
    found = []
    for d_MNd in decoded:
        error = error + d_MNd
        found.append(masked(error, given.keep_N))
        squares_M.append(found[-1].square().sum((1, 2)))
    total, gradients = torch.zeros_like(found[0]), decoded[:]
    for m in reversed(range(len(found))):
        total = total + found[m]
        gradients[m] = (2 * weight * total).to(decoded[m].dtype)
    g_b_dec = gradients[0].sum(1, dtype=given.x_Nd.dtype)
    return gradients, g_b_dec, squares_M[-1], weight * torch.stack(squares_M).sum(0)


def last_sums(
    given: Given, names: list[str], g_b_dec: Tensor, squared_M: Tensor, loss_M: Tensor, back: Back
) -> tuple[Tensor, Tensor]:
    """b_dec's gradient with what comes through the encoders, and the totals."""
    for name, vector_Mh in zip(names, back.through, strict=True):
        matrix_Mhd = given.low[name]
        through = torch.bmm(vector_Mh.to(matrix_Mhd.dtype).unsqueeze(1), matrix_Mhd).squeeze(1)
        g_b_dec = g_b_dec - through.to(g_b_dec.dtype)
    loss_M = loss_M + back.sparsity_M + back.more_M
    return g_b_dec, torch.stack([loss_M, squared_M, back.sparsity_M, back.fired_Mh.sum(-1)], -1)


# ---- relu: f = relu(x̄ W_enc + b_enc), see `saeopt.saes.relu`
def relu_codes(form: Form, given: Given, pres: list[Tensor]) -> list[Tensor]:
    """f."""
    return [masked(torch.relu(pres[0] + column(given.vectors["b_enc"])), given.keep_N).to(pres[0].dtype)]


def relu_back(form: Form, given: Given, pres: list[Tensor], codes: list[Tensor], g_codes: list[Tensor]) -> Back:
    """∂π = 1[f > 0] (∂f + λ‖W_dec‖)."""
    dtype = given.norm_Mh.dtype
    penalty_M = given.numbers["sparsity_coeff"] * form.penalty
    push_Mh = penalty_M.unsqueeze(-1) * given.norm_Mh
    f_MNh = codes[0]
    g_pre = torch.where(f_MNh > 0, g_codes[0].to(dtype) + column(push_Mh), 0.0)
    per_latent_Mh, fired_Mh = f_MNh.sum(1, dtype=dtype), (f_MNh != 0).sum(1, dtype=dtype)
    return relu_sums(form, given, g_pre.to(f_MNh.dtype), g_pre.sum(1), per_latent_Mh, fired_Mh)


def relu_sums(
    form: Form, given: Given, g_pre: Tensor, g_b_enc: Tensor, per_latent_Mh: Tensor, fired_Mh: Tensor
) -> Back:
    """What follows from sums over tokens."""
    penalty_M = given.numbers["sparsity_coeff"] * form.penalty
    sparsity_M = penalty_M * (per_latent_Mh * given.norm_Mh).sum(-1)
    pull_Mh = penalty_pull(form, penalty_M, per_latent_Mh, given.norm_Mh)
    return Back([g_pre], {"b_enc": g_b_enc}, [g_b_enc], pull_Mh, sparsity_M, fired_Mh)


RELU = Architecture(relu_codes, relu_back, back_needs_pre=False)


# ---- pieces
def column(vector_Mh: Tensor) -> Tensor:
    """(M, h) against (M, N, h)."""
    return vector_Mh.unsqueeze(1)


def masked(rows_MNx: Tensor, keep_N: Tensor | None) -> Tensor:
    """Rows of masked tokens become 0."""
    return rows_MNx if keep_N is None else rows_MNx * keep_N[None, :, None]


def penalty_pull(form: Form, penalty_M: Tensor, per_latent_Mh: Tensor, norm_Mh: Tensor) -> Tensor | None:
    """∂(λ Σ f ‖W_dec‖)/∂W_dec as a multiple of W_dec; none where the norm is fixed."""
    if form.unit:
        return None
    return torch.where(norm_Mh > 0, penalty_M.unsqueeze(-1) * per_latent_Mh / norm_Mh, 0.0)
