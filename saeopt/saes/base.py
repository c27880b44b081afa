"""What every sparse autoencoder has: parameters, initialisation, normalisation, folding. Rows of W_dec are features.

Shape suffixes: N tokens, d width read, e width written (d for an autoencoder), h dictionary width.
:meth:`SAE.encode`, :meth:`SAE.decode` and :meth:`SAE.forward` take and give raw activations; everything else, and so
everything that an architecture defines, works on normalised activations (:mod:`saeopt.saes.normalisation`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saeopt.config.marks import fields_with
from saeopt.config.saes import SAEConfig
from saeopt.saes.first_contract import refuse_first_contract, with_target
from saeopt.saes.init import initialise, point
from saeopt.saes.normalisation import Normalised, Widths, kind_of
from saeopt.saes.numbers import Number, sparsity_coeff
from saeopt.saes.origin import Origin

Reduction = Literal["sum", "min", "max"]


def where(widths: Widths | None) -> dict[str, Any]:
    """The argument that only other sites than autoencoders' need: a class of a user may not have it."""
    return {} if widths is None else {"widths": widths}


@dataclass
class StepInputs:
    """What a training forward depends on besides x, y and the weights.

    `keep_N` weighs tokens with 0 or 1 (None: all count); `u_Nh` is uniform noise in (0, 1);
    `dead_h` marks dead latents. `numbers` are those that the architecture declares besides λ and β.
    """

    sparsity_coeff: Tensor | float
    beta: Tensor | float = 1.0
    u_Nh: Tensor | None = None
    dead_h: Tensor | None = None
    keep_N: Tensor | None = None
    numbers: Mapping[str, Tensor | float] = field(default_factory=dict)


class Rule(NamedTuple):
    """How a vector of parameters is stepped: its learning rate as a multiple of `lr`, and its least value."""

    lr_factor: float = 1.0
    least: float = -math.inf


class Ratio(NamedTuple):
    """A loss term with a denominator of its own: numerator / (square − ‖total_d‖² / N).

    Each part is a sum over the kept tokens and is summed over the whole window before the division, so that
    accumulation and ranks do not matter. The numerator carries the coefficient and the gradient; `square` and
    `total_d` (float64, no gradient) are Σ‖e‖² and Σe of what the term is measured against.
    """

    numerator: Tensor
    square: Tensor
    total_d: Tensor

    def inverse_denominator(self, n: Tensor | float) -> Tensor:
        """1 / (square − ‖total_d‖² / n), or 0 where that is nothing but rounding (one token, no error)."""
        spread = self.square - self.total_d.square().sum() / n
        return torch.where(spread > 1e-6 * self.square, 1 / spread, 0.0)

    def value(self, n: Tensor | float) -> Tensor:
        """The term's value over n kept tokens."""
        return self.numerator * self.inverse_denominator(n).to(self.numerator.dtype)


@dataclass
class Forward:
    """A training forward. The loss of a window is Σ terms / N + Σ ratios.

    `terms` hold sums over the kept tokens, already multiplied by their coefficients. `tallies` hold what the
    architecture declares to be tallied, of this micro-batch's kept tokens (no gradient).
    """

    x_hat_Nd: Tensor
    f_Nh: Tensor
    terms: dict[str, Tensor]
    ratios: dict[str, Ratio] = field(default_factory=dict)
    tallies: dict[str, Tensor] = field(default_factory=dict)


class SAE(Normalised):
    """Base of all architectures: a subclass gives `code`, `training_forward` and its extra parameters.

    Source of the common form: Anthropic, April 2024 update; Bricken et al. 2023.
    """

    Config: ClassVar[type[SAEConfig]] = SAEConfig
    numbers: ClassVar[dict[str, Number]] = {"sparsity_coeff": Number(sparsity_coeff, logged=False)}
    """What a control may set from window to window."""
    tallies: Mapping[str, Reduction] = MappingProxyType({})
    """What a window is to tell of itself, and how micro-batches and ranks join: see :meth:`after_window`."""
    needs_noise: ClassVar[bool] = False
    needs_dead: bool = False
    prefixes: tuple[int, ...] = ()
    """Where prefixes of the dictionary end that reconstruct by themselves, h last (:mod:`saeopt.saes.prefixes`)."""
    selects_over_batch: ClassVar[bool] = False
    """Whether a token's code in training depends on the other tokens of its micro-batch."""
    default_decoder_norm: ClassVar[str] = "free"
    """What `decoder_norm: null` means under recipe 2."""
    default_transcoder_norm: ClassVar[str] = "free"
    """The same where what is written is not what is read: there W_dec starts at 0, and rows of norm 1 cannot."""
    zero_decoder: ClassVar[bool] = True
    """Whether a transcoder's W_dec may start at 0: not where only its rows' directions count."""
    default_encoder_start: ClassVar[str] = "matched"
    """What `encoder_start: null` means under recipe 2."""
    restart_share: ClassVar[float] = 0.2
    """How long a resampled latent's column of W_enc is, in units of the living ones' mean (0.2: Bricken 2023)."""
    latent_vectors: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Names of the parameters that hold one number per latent; they start at 0 unless `start_encoder` sets them."""
    stack_fields: ClassVar[frozenset[str]] = fields_with(SAEConfig, "member")
    """Config fields in which the members of one stack may differ (`Member`, `Reporting`); all others must be equal."""

    b_enc: nn.Parameter

    def __init__(
        self,
        d: int,
        h: int,
        config: SAEConfig,
        *,
        legacy_scaling: bool = False,
        recipe: int = 2,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        widths: Widths | None = None,
    ) -> None:
        """`widths` None: an autoencoder at one hook point of width d."""
        super().__init__()
        self.d, self.h, self.config, self.legacy_scaling, self.recipe = d, h, config, legacy_scaling, recipe
        self.widths, self.e = widths, d if widths is None else sum(widths.writes)
        usual = self.default_transcoder_norm if self.transcodes else self.default_decoder_norm
        default = "free" if recipe == 1 else usual
        self.unit_rows = (config.decoder_norm or default) == "unit"
        start = "matched" if recipe == 1 else self.default_encoder_start
        self.encoder_start = config.encoder_start or start
        self.dtype, self.device = dtype, device
        self.normalisation = kind_of(config, legacy_scaling=legacy_scaling, recipe=recipe)
        self.norm_limit = math.inf
        """Raw norm above which a token is left out at its site (`data.mask_norm_outliers`)."""
        self.origin: Origin | None = None
        """Where it was trained; None where no file says so."""
        self.unit_lengths: Tensor | None
        """h lengths that the code is multiplied by (:meth:`unit_decoder`)."""
        self.register_buffer("unit_lengths", None, persistent=False)
        self.W_enc = self.parameter(d, h)
        self.W_dec = self.parameter(h, self.e)
        for name in self.latent_vectors:
            setattr(self, name, self.parameter(h))
        self.b_dec = self.parameter(self.e)
        self.tokens_since_fired: Tensor
        self._start_normalisation(self.d, self.e, self.b_dec.detach())
        self.register_buffer("tokens_since_fired", torch.zeros(h, dtype=torch.int64, device=device))
        self.build()

    def build(self) -> None:
        """Make the further parameters and buffers that an architecture needs."""

    def parameter(self, *shape: int) -> nn.Parameter:
        """A new parameter of zeros in the module's dtype and on its device."""
        return nn.Parameter(torch.zeros(*shape, dtype=self.dtype, device=self.device))

    def ones(self, *shape: int) -> Tensor:
        """The first value of a buffer, in the module's dtype and on its device."""
        return torch.ones(shape, dtype=self.dtype, device=self.device)

    @property
    def transcodes(self) -> bool:
        """Whether what is written is not what is read."""
        return self.widths is not None and not self.widths.same

    @property
    def rules(self) -> Mapping[str, Rule]:
        """Vectors that are stepped in a way of their own, by name."""
        return {}

    @property
    def learns_from_windows(self) -> bool:
        """Whether :meth:`after_window` is to be called."""
        return type(self).after_window is not SAE.after_window

    @property
    def selected(self) -> int:
        """Latents kept per token where the code is a selection of so many; else 0."""
        return 0

    def __init_subclass__(cls, **given: object) -> None:
        super().__init_subclass__(**given)
        refuse_first_contract(cls)
        if "Config" in vars(cls) and "stack_fields" not in vars(cls):
            cls.stack_fields = fields_with(cls.Config, "member")
        if "training_forward" in vars(cls):
            cls.training_forward = with_target(vars(cls)["training_forward"])  # type: ignore[method-assign]

    # ---- what people call: raw activations in raw units
    def encode(self, x_Nd: Float[Tensor, "*N d"]) -> Float[Tensor, "*N h"]:
        """The evaluation code f of raw activations: the code that was trained, in normalised units."""
        _check_width(x_Nd, self.d, "this SAE reads")
        f_Nh = self.code(self.normalised(x_Nd))
        return f_Nh if self.unit_lengths is None else f_Nh * self.unit_lengths

    def decode(self, f_Nh: Float[Tensor, "*N h"]) -> Float[Tensor, "*N e"]:
        """Raw activations from a code."""
        _check_width(f_Nh, self.h, "this SAE's code has")
        return self.raw(self.reconstruct(f_Nh))

    def forward(self, x_Nd: Float[Tensor, "*N d"]) -> Float[Tensor, "*N e"]:
        """Reconstruction of y, in raw units, from raw activations."""
        return self.decode(self.encode(x_Nd))

    # ---- what an architecture defines
    def code(self, x_Nd: Float[Tensor, "N d"]) -> Float[Tensor, "N h"]:
        """The evaluation code of normalised activations."""
        raise NotImplementedError

    def training_forward(self, x_Nd: Float[Tensor, "N d"], y_Ne: Float[Tensor, "N e"], inputs: StepInputs) -> Forward:
        """Code, reconstruction of y and loss terms of normalised activations; y is x for an autoencoder.

        An override may also be written `(self, x_Nd, inputs)`, and be called so: then y is x.
        """
        raise NotImplementedError

    def reconstruct(self, f_Nh: Float[Tensor, "N h"]) -> Float[Tensor, "N e"]:
        """Normalised activations from a code: f W_dec + b_dec."""
        return f_Nh @ self.W_dec + self.b_dec

    # ---- common
    @torch.no_grad()
    def initialise(
        self, x_Nd: Float[Tensor, "N d"], generator: torch.Generator, y_Ne: Float[Tensor, "N e"] | None = None
    ) -> None:
        """Set the initial weights from normalised, unmasked activations (y None: x) and a CPU generator."""
        initialise(self, x_Nd, generator, y_Ne)

    @torch.no_grad()
    def measure(self, y_Ne: Float[Tensor, "N e"]) -> None:
        """Keep what the loss needs to know of what is to be given, normalised and unmasked; here nothing."""

    @torch.no_grad()
    def start_encoder(self, directions_dh: Tensor, x_Nd: Tensor) -> None:
        """Point the encoder along the initial decoder (called with b_dec set and all other parameters 0)."""
        self.W_enc.copy_(directions_dh)

    @torch.no_grad()
    def before_step(self) -> None:
        """Change gradients before clipping: with unit rows remove the part along each decoder row."""
        if self.unit_rows and self.W_dec.grad is not None:
            along_h1 = (self.W_dec.grad * self.W_dec).sum(-1, keepdim=True)
            self.W_dec.grad -= along_h1 * self.W_dec

    @torch.no_grad()
    def after_step(self) -> None:
        """Restore constraints after the optimiser's step."""
        for name, rule in self.rules.items():
            if rule.least > -math.inf:
                self.get_parameter(name).clamp_(min=rule.least)
        if self.unit_rows:
            self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12))

    @torch.no_grad()
    def restart(self, dead_n: Tensor, alive_h: Tensor, along_nd: Tensor, opens_at_n: Tensor) -> None:
        """Point dead latents, whose vectors are 0, along directions; they fire where x̄ · direction > `opens_at_n`."""
        length = point(self.W_enc, dead_n, alive_h, along_nd, self.restart_share)
        if "b_enc" in self.latent_vectors:
            self.b_enc[dead_n] = -length * opens_at_n

    def after_window(self, tallies: Mapping[str, Tensor], n: Tensor) -> None:
        """Write buffers from a window's tallies, over all its micro-batches and ranks, and its n kept tokens.

        The same on every rank; called without gradients, after the optimiser's step. Inside CUDA graphs: nothing here
        may wait for the device or decide on the host. What it wrote is undone where the window was not finite.
        """

    @torch.no_grad()
    def rescale_rows(self) -> bool:
        """Make the decoder rows 1 long and the code longer by as much; whether there was anything to do.

        Exact for codes that scale with π; a k-selection may choose others afterwards.
        """
        norm_h = self.W_dec.norm(dim=-1).clamp_min(1e-12)
        if torch.allclose(norm_h, torch.ones_like(norm_h), atol=1e-4):
            return False
        self.W_dec.div_(norm_h.unsqueeze(-1))
        self.W_enc.mul_(norm_h)
        for name in self.latent_vectors:
            if name != "r_mag":  # e^r_mag is a ratio
                self.get_parameter(name).mul_(norm_h)
        return True

    @torch.no_grad()
    def folded(self) -> Self:
        """A copy that reads and gives raw activations without normalising them (mean 0, scale 1, no whitening).

        What normalises goes into the weights: W_enc · s, W_dec / s and, in b_dec, the mean. The code is unchanged.
        """
        other = copy.deepcopy(self)
        for encoder, own in zip(other.encoders(), self.encoders(), strict=True):
            encoder.copy_(self.raw_reading(own))
        other.W_dec.copy_(self.raw_rows(self.W_dec))
        other.b_dec.copy_(self.raw(self.b_dec))
        other._forget_normalisation()
        if self.centres and self.widths is not None:
            other.shift_code(-self.mean)
        return other

    @torch.no_grad()
    def unfold(self) -> None:
        """Weights that read and give raw activations become those of normalised ones: the inverse of :meth:`folded`.

        Called with what normalises in place (:meth:`normalise_by`). The code is unchanged.
        """
        if self.centres and self.widths is not None:
            self.shift_code(self.mean)
        for encoder in self.encoders():
            encoder.copy_(self.normalised_reading(encoder))
        self.W_dec.copy_(self.normalised_rows(self.W_dec))
        self.b_dec.copy_(self.normalised_written(self.b_dec))

    def encoders(self) -> list[nn.Parameter]:
        """The (d, h) matrices that read normalised activations."""
        return [self.W_enc]

    @torch.no_grad()
    def shift_code(self, shift_d: Tensor) -> None:
        """Move biases so that x has the code that x + shift had, where b_dec is not taken from what is read."""
        self.b_enc.add_(shift_d @ self.W_enc)

    def decoder_rows(self) -> Float[Tensor, "h e"]:
        """The rows that :meth:`reconstruct` adds up."""
        return self.W_dec

    @torch.no_grad()
    def unit_decoder(self) -> Self:
        """The folded copy with decoder rows of norm 1 in raw units, its code longer by as much: for reading and export.

        Exact for every architecture, since the code is made longer after gates and k have chosen; the lengths are no
        part of the weights, so that this form is neither trained nor saved as it is.
        """
        other = self.folded()
        length_h = other.decoder_rows().norm(dim=-1).clamp_min(1e-12)
        other.unit_lengths = length_h if self.unit_lengths is None else length_h * self.unit_lengths
        other.W_dec.copy_(other.decoder_rows() / length_h.unsqueeze(-1))
        return other

    def evaluation_form(self) -> dict[str, Any] | str:
        """The evaluation code as fields of `Portable` (:mod:`saeopt.saes.portable`), or why no other tool has it."""
        return f"no format of other tools has the code of '{self.config.sae_type}'"

    # ---- pieces shared by the losses
    def centred(self, x_Nd: Tensor) -> Tensor:
        """x̄ = x − b_dec; x itself at any site but an autoencoder's."""
        return x_Nd - self.b_dec if self.widths is None else x_Nd

    def pre_activation(self, x_Nd: Tensor) -> Tensor:
        """π = x̄ W_enc + b_enc."""
        return self.before_activation(self.centred(x_Nd) @ self.W_enc + self.b_enc)

    def before_activation(self, pre_Nh: Tensor) -> Tensor:
        """What the activation function gets: the same; a splice into a model looks in here (`hook_sae_acts_pre`)."""
        return pre_Nh

    def decoder_norm_h(self) -> Tensor:
        """‖W_dec‖ per row, added up over the hook points that it writes; ones where the rows are kept at norm 1."""
        if self.widths is not None and len(self.widths.writes) > 1:
            return torch.stack([part.norm(dim=-1) for part in self.W_dec.split(self.widths.writes, dim=-1)]).sum(0)
        if self.unit_rows:
            return torch.ones(self.h, dtype=self.W_dec.dtype, device=self.W_dec.device)
        return self.W_dec.norm(dim=-1)

    def squared_error(self, x_hat_Nd: Tensor, x_Nd: Tensor, keep_N: Tensor | None) -> Tensor:
        """Σ over kept tokens of ‖x̂ − x‖², per unit of e under `legacy_scaling`."""
        error_N = (x_hat_Nd - x_Nd).square().sum(-1)
        total = error_N.sum() if keep_N is None else (error_N * keep_N).sum()
        return total / self.e if self.legacy_scaling else total

    @staticmethod
    def masked(f_Nh: Tensor, keep_N: Tensor | None) -> Tensor:
        """The code with the rows of masked tokens set to 0."""
        return f_Nh if keep_N is None else f_Nh * keep_N.unsqueeze(-1)


def _check_width(given: Tensor, width: int, what: str) -> None:
    if given.shape[-1:] != (width,):
        raise ValueError(f"{what} {width} numbers per token: got the shape {tuple(given.shape)}")
