"""What every SAE's section of a config holds; an architecture adds its own fields beside its class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from saeopt.config.base import Amount, Float, Span, StrictModel, Text, Weight
from saeopt.config.marks import Located, Mark, Member, Reporting, Shape, Slow, Stack, WholeRun, fields_with
from saeopt.config.names import Known, suggestion
from saeopt.config.sites import Position, Site, SiteEntry, as_list, hooks_of, keys_of


def _normalisation(value: object) -> object:
    """`scale` and `none` as configs have always written them."""
    words = {"scale": True, "true": True, "none": False, "false": False}
    found = words.get(value.lower(), value.lower()) if isinstance(value, str) else value
    if found is None or isinstance(found, bool) or found in ("mean_scale", "whiten"):
        return found
    raise ValueError("must be mean_scale, scale (= true), none (= false) or whiten")


Normalisation = Annotated[bool | Literal["mean_scale", "whiten"] | None, BeforeValidator(_normalisation)]


class FirstCoeff(NamedTuple):
    """λ at which an architecture came to an L0 of 16 on normalised activations of width 64, and how it goes with both.

    Measured on stories260K (d 64) and SmolLM2-135M (d 576), at three L0 each. One that is too small does less harm than
    one that is too large: latents that die in the beginning stay dead.
    """

    at_16: float
    by_l0: float
    by_d: float
    reach: float = 1e4
    """Factor by which λ may leave its start: beyond it the penalty does not move L0 any more."""

    def at(self, target_l0: float, d: int) -> float:
        """Where λ may start."""
        return float(self.at_16 * (16 / target_l0) ** self.by_l0 * (d / 64) ** self.by_d)


class SAEConfig(StrictModel):
    """The `saes:` section. λ multiplies a penalty in the units of the spec (see `legacy_scaling`)."""

    without_effect: ClassVar[frozenset[str]] = frozenset()
    """Fields that change nothing for an architecture: a study over them would train the same SAE again and again."""
    only_with: ClassVar[Mapping[str, str]] = {}
    """Field → the switch without which it changes nothing."""
    first_coeff: ClassVar[FirstCoeff | None] = None
    """Where λ starts with `target_l0`; None: at `sparsity_coeff`."""

    sae_type: Annotated[Shape[WholeRun[Text]], Slow(1)]
    """A registered architecture, or `package.module:Class`."""
    name: Reporting[WholeRun[Text | None]] = None
    """A label for people; the run's name starts with it."""
    sae_positions: Annotated[Member[WholeRun[Annotated[list[Position], Field(min_length=1)]]], Slow(2)]
    """Hook points: one name, a list, or glob patterns. Or sites `{read: HOOK or [HOOKS], write: HOOK or [HOOKS],
    name: …}` for transcoders (read and write differ) and crosscoders (several hook points); `name` (null:
    `READ->WRITE`, several joined by `+`) is what the site is called in files, objectives and `saes.field@NAME`."""
    dict_size_to_input_ratio: Annotated[Shape[Annotated[Float, Field(ge=0.01, le=2**16)]], Slow(3)] = 8.0
    """h / d."""
    sparsity_coeff: Member[Weight] = 1.0
    """λ."""
    target_l0: Member[Annotated[Float, Field(gt=0, le=1e9)] | None] = None
    """The L0 that training is to end at, in place of a choice of λ: λ starts where the architecture usually comes near
    it (of your own, or without normalised activations: at `sparsity_coeff`) and is moved until the code has so many
    non-zeros per token; where k fixes L0, k is set to it. null: λ or k as given."""
    mse_coeff: Stack[Annotated[Float, Field(gt=0, le=1e12)]] = 1.0
    """Weight of the reconstruction term."""
    sparsity_warmup_samples: Member[Span | None] = None
    """λ rises linearly from 0 over this many samples; null: 5 % of `data.n_train_samples`, 0 where that is null
    (recipe 1: 0)."""
    decoder_norm: Stack[Literal["free", "unit"] | None] = None
    """`unit` keeps every decoder row at norm 1 by projecting the gradient and renormalising after the step; null:
    `unit` for gated and topk (not for a topk transcoder, whose W_dec starts at 0), `free` for the others (recipe 1:
    `free`)."""
    init_decoder_orthogonal: Member[bool] = True
    """Orthonormal initial decoder (rows, or columns where h > d) instead of random unit rows."""
    encoder_start: Member[Literal["matched", "transpose"] | None] = None
    """matched: W_enc starts as c · W_decᵀ, with c such that ‖x̂‖ = ‖x‖ in the mean of the first batch; `transpose`: as
    W_decᵀ, or c · W_decᵀ where c is below 1; null: `transpose` for topk, `matched` for the others (recipe 1: all)."""
    init: Member[Literal["random", "active_subspace"] | None] = None
    """Where the initial directions of encoder and decoder lie. random: anywhere; active_subspace: in the span of the
    activations' leading principal components (arXiv 2508.16929, which sets their number by hand; here the fewest that
    hold 99 % of the first batches' variance); null: active_subspace where only attention outputs (`hook_attn_out`,
    `attn.hook_z`, `attn.hook_out`) are read and written, random elsewhere (recipes 1 and 2: random everywhere)."""
    bias_init: Member[Literal["geometric_median", "mean", "zero"]] = "geometric_median"
    """What b_dec starts from, over the first batch; where what is written is not what is read, the mean stands for the
    geometric median."""
    normalize_activations: Member[Normalisation] = None
    """What is done to the activations of each hook point and undone behind the SAE; measured once, on the first
    batches' unmasked tokens. `scale` (= true): one scalar makes E‖x‖ = √d; `mean_scale`: the mean μ is taken away and
    E‖x − μ‖ = √d; `whiten`: (x − μ)(C + ε·I)^(−1/2), C the covariance, ε 0.001 of its mean eigenvalue, scaled to √d;
    `none` (= false); null: `mean_scale` (recipes 1 and 2: `scale`). The loss, `b_dec` and λ are in these units."""
    dead_after_tokens: Stack[Amount | None] = None
    """A latent is dead when it has not fired for this many tokens; null: 10M, or less in short runs: a tenth of the
    run, where recipe 3 resamples a twentieth."""
    pretrained_sae_paths: Member[WholeRun[Located[list[Text] | None]]] = None
    """Saved SAEs to start from, one for all or one per hook point: run folders, `.safetensors` files, or what other
    tools saved (docs/import.md), in a folder or on the hub (`OWNER/NAME[@REVISION][:FOLDER]`); `HOOK_POINT=PATH` says
    which is whose."""
    retrain_saes: Stack[bool] = True
    """false keeps the pretrained SAEs as they are: the run only evaluates them."""
    per_hook: Member[WholeRun[dict[Text, dict[str, Any]]]] = Field(default_factory=dict)
    """Fields of this section that differ at one hook point or site: `{its name: {field: value}}`."""

    def idle(self) -> dict[str, str]:
        """Fields that change nothing with these values → what each of them needs, as it is written."""
        values = self.model_dump(include=set(self.only_with.values()))
        needed = {switch: f"'saes.{switch}{': true' if value is False else ''}'" for switch, value in values.items()}
        return {field: needed[switch] for field, switch in self.only_with.items() if not values[switch]}

    @property
    def steers(self) -> bool:
        """Whether λ is moved until L0 is what was asked for."""
        return self.target_l0 is not None and not self.selects_k()

    @property
    def set_on_held_out(self) -> bool:
        """Whether a threshold is set at the end of training, at some site."""
        return any(fields.get("threshold") == "held_out" for fields in self.per_hook.values())

    @classmethod
    def selects_k(cls) -> bool:
        """Whether a field k fixes L0, and not λ."""
        return "k" in cls.model_fields and "sparsity_coeff" in cls.without_effect

    @model_validator(mode="before")
    @classmethod
    def _target_is_k(cls, raw: object) -> object:
        target = raw.get("target_l0") if isinstance(raw, dict) else None
        if not isinstance(raw, dict) or target is None or not cls.selects_k():
            return raw
        try:
            k, wanted = raw.get("k"), float(target)
            differ = k is not None and float(k) != wanted
        except (TypeError, ValueError):
            return raw  # told by the fields' own types
        if differ:
            raise ValueError(
                f"'k' ({k}) and 'target_l0' ({wanted:g}) are the same here and differ: give one of them"
                " ('k: null' leaves it to 'target_l0')"
            )
        if not wanted.is_integer() and cls.model_fields["k"].annotation is int:
            raise ValueError(
                f"'target_l0' ({wanted:g}) is k here: must be a whole number ('int: true' in a study's range)"
            )
        return {**raw, "k": wanted}

    @field_validator("target_l0", mode="before")
    @classmethod
    def _not_auto(cls, value: object) -> object:
        if value == "auto":
            raise ValueError("must be a number here; 'auto' is for a study, which finds one (docs/target-l0.md)")
        return value

    @field_validator("sae_positions", "pretrained_sae_paths", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return as_list(value)

    @field_validator("sae_positions")
    @classmethod
    def _keys_differ(cls, value: list[Position]) -> list[Position]:
        keys = keys_of(value)
        for entry in value:
            if isinstance(entry, SiteEntry) and keys.count(entry.site.key) > 1:
                raise ValueError(f"two sites are called '{entry.site.key}': give them a 'name'")
        return value

    @field_validator("pretrained_sae_paths")
    @classmethod
    def _none_is_null(cls, value: list[str] | None) -> list[str] | None:
        return value or None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.retrain_saes and self.pretrained_sae_paths is None:
            raise ValueError("'retrain_saes: false' needs 'pretrained_sae_paths'")
        own = set(type(self).model_fields) - fields_with(type(self), Mark.WHOLE_RUN)
        for hook, fields in self.per_hook.items():
            for field in fields:
                if field not in own:
                    known: Known = {("saes",): sorted(own)}
                    near = suggestion(("saes", field), known, self.sae_type)
                    raise ValueError(f"'per_hook.{hook}.{field}' is no field that can differ per hook point{near}")
            self._merged(fields)
        return self

    def _merged(self, fields: dict[str, Any]) -> Self:
        own = self.model_dump(exclude={"per_hook"})
        if self.selects_k():  # one of the two takes the other's place
            if fields.get("target_l0") is not None:
                own["k"] = None
            elif "k" in fields:
                own["target_l0"] = None
        return type(self).model_validate({**own, **fields})

    @property
    def sparsity_label(self) -> str:
        """What decides how sparse the code is, in a run's name."""
        return f"lambda{self.sparsity_coeff:g}" if self.target_l0 is None else f"L0-{self.target_l0:g}"

    def at(self, key: str) -> Self:
        """This section with the overrides of one site applied."""
        return self._merged(self.per_hook.get(key, {}))

    @property
    def keys(self) -> list[str]:
        """The sites' keys; of hook points the names and patterns."""
        return keys_of(self.sae_positions)

    @property
    def hooks(self) -> list[str]:
        """Names and patterns of all hook points that are read or written."""
        return hooks_of(self.sae_positions)

    def site(self, key: str) -> Site:
        """The site of this key; a hook point's name is that of an autoencoder there."""
        entries = [p.site for p in self.sae_positions if isinstance(p, SiteEntry)]
        return next((site for site in entries if site.key == key), Site.of(key))
