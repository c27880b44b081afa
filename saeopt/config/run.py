"""A run: which language model, which tokens, which SAEs, and how they are trained."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)

from saeopt.config.base import Amount, BatchSize, Float, Int, Seed, Span, StrictModel, Text, word
from saeopt.config.machine import ActivationsConfig, PerformanceConfig
from saeopt.config.marks import Located, Made, Member, PackWide, Reporting, Resumable, Slow, Stack, Stream
from saeopt.config.names import one_data_set
from saeopt.config.saes import SAEConfig
from saeopt.config.sites import is_attention_output

PositiveInt = Annotated[Int, Field(gt=0, le=10**9)]
Decay = Annotated[Float, Field(ge=0, lt=1)]
Cadence = Span | None
OneDataSet = Annotated[Text, BeforeValidator(one_data_set)]
NEWEST_RECIPE: Literal[3] = 3
COOLDOWN_SHARE, SPARSITY_WARMUP_SHARE = 0.2, 0.05
"""Since recipe 2: over how much of the run the learning rate falls at its end, and λ rises at its beginning."""
DEAD_AFTER_TOKENS, DEAD_SHARE_OF_RUN, RESAMPLINGS = 10_000_000, 10, 20
"""Silence that is death; in short runs one part of so many, or since recipe 3 the time between two resamplings."""


_OF_TEXT = (
    "tokenizer_name", "eval_dataset_name", "eval_column_name", "eval_split", "subset", "prepend_bos", "token_dtype",
    "skip_first_positions",
)  # fmt: skip

Ablation = Literal["unmasked", "all"]
"""Positions that `ce_zero` sets to 0."""


class DataConfig(StrictModel):
    """The `data:` section. A sample is one token sequence of `context_length` tokens."""

    dataset_name: Stream[Located[OneDataSet]]
    """Hub name, local folder, file or glob: `.parquet`, `.arrow`, `.jsonl`, `.json`, `.csv`, `.tsv`, `.txt`, packed
    ones (`.gz`, `.bz2`, `.xz`, `.zst`) too; token ids as `.npy` and `.bin`. Left out beside `activations`."""
    activations: Stream[Located[Text | None]] = None
    """A safetensors file of activations (`x` [N, d]; `y` [N, e] too where what is written is not what is read), or a
    folder of such files, one for each site (named like it), in place of a language model and text. A sample is then
    `context_length` rows; the last `n_eval_samples` samples are held out. There are no cross-entropies."""
    tokenizer_name: Stream[Located[Text | None]] = None
    """Hub name or local folder; null: the language model's own."""
    context_length: Stream[BatchSize] = 1024
    """Tokens per sample."""
    n_train_samples: Stream[Amount | None] = None
    """Samples to train on; null: one pass over the training documents."""
    n_eval_samples: Stream[Span] = 500
    """Held-out samples; whole documents are set aside for them (a very long one is cut)."""
    n_threshold_samples: Stream[Amount | None] = None
    """Held-out samples behind those of the evaluation, which reports on none of them: `saes.threshold: held_out` is
    set on these."""
    eval_dataset_name: Stream[Located[OneDataSet | None]] = None
    """Data of their own for the held-out samples: nothing is set aside; null: `dataset_name`."""
    eval_column_name: Stream[Text | None] = None
    """The column of the held-out data; null: `column_name`."""
    eval_split: Stream[Text | None] = None
    """The split of the held-out data, also another split of `dataset_name`; null: `split`."""
    train_batch_size: Stream[BatchSize] = 20
    """Samples per micro-batch and process."""
    eval_batch_size: PackWide[BatchSize] = 20
    """Samples per evaluation batch."""
    streaming: Stream[bool] = True
    """Read the data set as a stream instead of downloading it first."""
    is_tokenized: Stream[bool] = True
    """true: `column_name` holds token ids; false: text."""
    column_name: Stream[Text] = "input_ids"
    """The column to read. Beside token ids, an `attention_mask` column is followed: positions with 0 are left out."""
    split: Stream[Text] = "train"
    """The split to read."""
    subset: Stream[Text | None] = None
    """The data set's configuration name on the hub."""
    seed: Stream[Seed | None] = None
    """Seed of the data order, apart from the run's, so that a sweep over `seed` keeps one stream; null: 0."""
    prepend_bos: Stream[bool] = False
    """Put BOS before every sample (which then holds one token less)."""
    token_dtype: Stream[Literal["uint8", "uint16", "uint32", "uint64", "int16", "int32", "int64"] | None] = None
    """How a `.bin` file stores its token ids; null: as a file that says so itself (`.npy`, llm.c's header)."""
    separator: Stream[Text] = "auto"
    """Token between documents; auto: BOS where the tokenizer adds one by itself, else EOS; bos, eos, none, or the text
    of a token, which then counts as special (`<|endoftext|>`)."""
    join_documents: Stream[bool] = True
    """false: no sample holds parts of two documents; short ones are padded, and padding counts nowhere."""
    skip_first_positions: Stream[Span] = 0
    """Positions at the start of every sample that are left out of normalisation, bias, loss and metrics."""
    text_unit: Stream[Literal["auto", "blank_line", "endoftext", "file"]] = "auto"
    """Where documents end in `.txt` files; auto: at `<|endoftext|>` where it occurs, else at blank lines."""
    shuffle_documents: Stream[bool] = True
    """Shuffle the order of documents (streaming: within a buffer)."""
    shuffle_buffer_tokens: Stream[Annotated[Int, Field(ge=0, le=2**30)]] = 0
    """Size of each process's activation shuffle buffer (a run trains on the tokens of its own samples and no others);
    0: samples keep their order."""
    mask_special_tokens: Stream[bool] = True
    """Leave BOS, EOS and padding out of normalisation, bias, loss and metrics."""
    mask_norm_outliers: Stream[Annotated[Float, Field(gt=1, le=1e6)] | None] = None
    """Also leave out tokens whose activation norm is above this many medians (attention sinks). The median is that of
    the first samples at each hook point; it is measured once and stored with the weights. null: keep them."""

    @model_validator(mode="before")
    @classmethod
    def _in_place_of_text(cls, raw: object) -> object:
        """Stored activations are the data set, and what speaks of text is not for them."""
        if not isinstance(raw, dict) or raw.get("activations") is None:
            return raw
        if raw.get("dataset_name") not in (None, raw["activations"]):
            raise ValueError("'activations' stand in for 'dataset_name': give one of them")
        for name in _OF_TEXT:
            if raw.get(name) not in (None, False, 0):
                raise ValueError(f"'{name}' is about text: it has no effect on 'activations'")
        return {**raw, "dataset_name": raw["activations"]}

    @model_serializer(mode="wrap")
    def _without_the_stand_in(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """`dataset_name` that repeats `activations` is not written: who changes the one would have to know both."""
        found: dict[str, Any] = dump(self)
        if self.activations is not None:
            found.pop("dataset_name", None)
        return found

    @field_validator("separator", mode="before")
    @classmethod
    def _none(cls, value: object) -> object:
        return "none" if value is None else word(value, None, "none")

    @model_validator(mode="after")
    def _positions(self) -> Self:
        if self.skip_first_positions >= self.context_length:
            raise ValueError(f"'skip_first_positions' leaves nothing of 'context_length' ({self.context_length})")
        if not self.join_documents and not self.mask_special_tokens:
            raise ValueError("'join_documents: false' pads samples, and needs 'mask_special_tokens: true'")
        return self

    @property
    def n_held_out(self) -> int:
        """Samples that are not trained on: first those of the evaluation, then those that thresholds are set on."""
        return self.n_eval_samples + (self.n_threshold_samples or 0)

    @property
    def eval_data(self) -> Self | None:
        """This section as it reads held-out data of their own; None where documents are set aside."""
        if self.eval_dataset_name is None and self.eval_split is None:
            return None
        own = {
            "dataset_name": self.eval_dataset_name or self.dataset_name,
            "subset": None if self.eval_dataset_name else self.subset,
            "column_name": self.eval_column_name or self.column_name,
            "split": self.eval_split or self.split,
        }
        return self.model_copy(update=own)


class RunConfig(StrictModel):
    """One run. Unknown keys are errors; the seed's base configs load unchanged."""

    wandb_project: Reporting[Text | None] = None
    """W&B project; null: no W&B."""
    wandb_run_name: Reporting[Text | None] = None
    """null: generated from the parameters that matter."""
    wandb_tags: Reporting[list[Text]] = Field(default_factory=list)
    """Tags of the W&B run."""
    trackers: Reporting[list[Literal["wandb", "tensorboard"]]] = Field(default_factory=list)
    """More sinks for the metrics, through Accelerate's trackers (`wandb_project` alone switches W&B on)."""
    seed: Annotated[Member[Seed], Slow(5)] = 0
    """Decides initial weights and gate noise (the data order has `data.seed`)."""
    seeds: Member[Annotated[Int, Field(gt=0, le=1000)]] = 1
    """SAEs that are trained per site on one pass of the language model: with `seed`, `seed + 1`, … Metrics are means
    over them, told with their spread. Weights of all but the first: `seeds/<seed>` in the run folder."""
    tlens_model_name: Stream[Located[Text | None]] = None
    """Hub name of the language model; exactly one of name and path."""
    tlens_model_path: Stream[Located[Text | None]] = None
    """A local Hugging Face directory."""
    lm_dtype: Stream[Literal["auto", "float32", "bfloat16", "float16"]] = "auto"
    """Precision of the language model; auto: bfloat16 on a GPU, float32 on the CPU."""
    lm_processing: Stream[Literal["raw", "compatibility"]] = "raw"
    """raw: Hugging Face's own values; compatibility: folded and centred weights, as SAE-Interpretability had them."""
    lm_batch_size: PackWide[BatchSize | None] = None
    """Sequences per pass of the language model, apart from the SAEs' batch; null: as suits the device."""
    mixed_precision: Stream[Literal["auto", "no", "bf16", "fp16"]] = "auto"
    """Accelerate's; auto: bf16 on a GPU, no on the CPU. Master weights stay float32."""
    save_dir: Reporting[Made[Text]] = "output"
    """Run folders are made below it."""
    save_every_n_samples: PackWide[Cadence] = 0
    """Samples between two checkpoints; 0 or null: only at the end."""
    keep_checkpoints: Reporting[PositiveInt | None] = None
    """Weights files kept; null: all."""
    eval_every_n_samples: Stream[Cadence] = 0
    """Samples between two evaluations; 0: only at the end. null: never, not even at the end (SAE-Interpretability's
    meaning, which stored configs rely on; `data.n_eval_samples: 0` says the same more plainly)."""
    ce_ablation: Stream[Ablation] = "unmasked"
    """What `ce_zero`, to which CE recovered compares, sets to 0. unmasked: masked positions keep their activations, as
    in `ce_sae`; all: they are zeroed too, as in sae-lens, which changes CE recovered by up to 0.003."""
    log_every_n_grad_steps: PackWide[Resumable[PositiveInt]] = 20
    """Optimiser steps between two times that metrics are read from the device, logged and written."""
    lr: Member[Annotated[Float, Field(ge=1e-12, le=1e30)]] = 1e-3
    """Peak learning rate of Adam."""
    lr_schedule: Member[Literal["cosine", "linear", "constant"] | None] = None
    """After the warm-up: cosine to `min_lr_factor`, constant, or linear (falls during `cooldown_samples`); null: linear
    (recipe 1: cosine)."""
    min_lr_factor: Member[Annotated[Float, Field(ge=0, le=1)]] = 0.0
    """Learning rate at the end as a share of `lr` (recipe 1: 0.1)."""
    warmup_samples: Member[Span] = 0
    """Linear warm-up from 0."""
    cooldown_samples: Member[Span | None] = None
    """Length of the final linear fall (`lr_schedule: linear`); null: the last 20 % of `data.n_train_samples`, nothing
    where that is null (recipe 1: all samples after the warm-up)."""
    gradient_accumulation_steps: Stream[PositiveInt] = 1
    """Micro-batches per optimiser step."""
    max_grad_norm: Member[Annotated[Float, Field(ge=1e-12, le=1e30)] | None] = 1.0
    """Clip each member's gradient to this norm; null: no clipping."""
    adam_betas: Stack[tuple[Decay, Decay]] = (0.9, 0.99)
    """Adam's decay rates (recipe 1: 0.9, 0.999)."""
    legacy_scaling: Stack[bool | None] = None
    """true: loss terms divided as in SAE-Interpretability, activations not normalised; null: false, and configs that
    may come from there (they name no recipe) get a notice."""
    recipe: Stack[Literal[1, 2, 3]] = Field(
        default_factory=lambda given: 1 if given.get("legacy_scaling") else NEWEST_RECIPE
    )
    """Which defaults hold for what is not written: 3, or those of versions before it (what they stored goes on under
    them): 2 and 1. Not written: 3; 1 with `legacy_scaling: true`."""
    threads: PackWide[Resumable[Annotated[Int, Field(gt=0, le=1024)] | None]] = None
    """CPU threads of torch; stored in the run because sums depend on it; null: what torch chooses."""
    activations: ActivationsConfig = Field(default_factory=ActivationsConfig)
    """The cache of activations on disk."""
    performance: Resumable[PerformanceConfig] = Field(default_factory=PerformanceConfig)
    """How the step is computed."""
    data: DataConfig
    saes: SerializeAsAny[SAEConfig]
    as_typed: Reporting[dict[str, str]] = Field(default_factory=dict)
    """Written by the system: what stood in the config where an absolute path stands now."""

    @model_validator(mode="before")
    @classmethod
    def _as_recipes_were(cls, raw: object) -> object:
        """What is left to an older recipe is written out, as those versions did."""
        if not isinstance(raw, dict):
            return raw
        recipe = str(raw.get("recipe", 1 if raw.get("legacy_scaling") is True else NEWEST_RECIPE))
        if recipe not in ("1", "2"):
            return raw
        saes, left = raw.get("saes"), _RECIPE_2_SAES if recipe == "2" else _RECIPE_1_SAES
        if isinstance(saes, dict):
            raw = {**raw, "saes": saes | {name: value for name, value in left.items() if saes.get(name) is None}}
        return raw if recipe == "2" else {**_RECIPE_1, **raw, "lr_schedule": raw.get("lr_schedule") or "cosine"}

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no(cls, value: object) -> object:
        return word(value, None, "no")

    @field_validator("wandb_tags", "trackers", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.data.activations is not None:
            if self.model != self.data.activations:
                raise ValueError("'data.activations' stand in for a language model: leave 'tlens_model_…' out")
        elif (self.tlens_model_name is None) == (self.tlens_model_path is None):
            raise ValueError("exactly one of 'tlens_model_name' and 'tlens_model_path' must be given")
        if self.tlens_model_path is not None and self.tlens_model_path.endswith(".pt"):
            raise ValueError(
                "'tlens_model_path': TransformerLens .pt files cannot be read any more; "
                "give the Hugging Face directory of the model (save_pretrained of the original weights)"
            )
        if self.data.prepend_bos and self.data.context_length < 2:
            raise ValueError("'data.context_length': must be above 1: 'data.prepend_bos' takes one token of it")
        n = self.data.n_train_samples
        if self.lr_schedule == "cosine" and n is None:
            raise ValueError("'lr_schedule: cosine' needs 'data.n_train_samples'")
        if self.schedule == "linear" and n is None and (self.recipe == 1 or self.cooldown_samples is not None):
            raise ValueError("'lr_schedule: linear' needs 'data.n_train_samples'")
        if self.cooldown_samples is not None and self.schedule != "linear":
            raise ValueError("'cooldown_samples' needs 'lr_schedule: linear'")
        if n is not None and self.warmup_samples + (self.cooldown_samples or 0) > n:
            raise ValueError(
                f"'warmup_samples' ({self.warmup_samples}) + 'cooldown_samples' ({self.cooldown_samples or 0})"
                f" exceed 'data.n_train_samples' ({n})"
            )
        if self.seed + self.seeds > 2**63:
            raise ValueError(f"'seeds': the last would be {self.seed + self.seeds - 1}: too large")
        if self.seeds > 1 and self.saes.pretrained_sae_paths:
            raise ValueError("'seeds' above 1: with 'saes.pretrained_sae_paths' all would start from the same weights")
        if self.legacy_scaling and isinstance(self.saes.normalize_activations, str):
            raise ValueError("'legacy_scaling: true' leaves activations as they are: no 'saes.normalize_activations'")
        if self.saes.set_on_held_out and self.data.n_threshold_samples is None:
            raise ValueError("'saes.threshold: held_out' needs 'data.n_threshold_samples' (200, say), held out too")
        warmup = self.saes.sparsity_warmup_samples
        if n is not None and warmup is not None and warmup > n:
            raise ValueError(f"'saes.sparsity_warmup_samples' ({warmup}) exceeds 'data.n_train_samples' ({n})")
        return self

    @property
    def schedule(self) -> str:
        """The learning rate's schedule that holds."""
        return self.lr_schedule or "linear"

    def cooldown(self, total: int) -> int:
        """Samples of the final linear fall in a run of `total` samples."""
        if self.cooldown_samples is not None:
            return self.cooldown_samples
        left = total - self.warmup_samples
        return left if self.recipe == 1 else min(left, self._share(COOLDOWN_SHARE, total))

    def sparsity_warmup(self, sae: SAEConfig, total: int) -> int:
        """Samples over which λ rises from 0 in a run of `total` samples."""
        given = sae.sparsity_warmup_samples
        return self._share(SPARSITY_WARMUP_SHARE, total) if given is None else given

    def resample_every_tokens(self, sae: SAEConfig, total: int) -> int:
        """Tokens between two times that dead latents get new directions, in a run of `total` samples; 0: never."""
        given = getattr(sae, "resample_every_tokens", 0)
        if given is not None or not self._resamples(sae):
            return int(given or 0)
        return max(1, total * self.data.context_length // RESAMPLINGS)

    def dead_after_tokens(self, sae: SAEConfig, total: int) -> int:
        """Tokens without firing after which a latent counts as dead, in a run of `total` samples."""
        share = total * self.data.context_length // (RESAMPLINGS if self._resamples(sae) else DEAD_SHARE_OF_RUN)
        return sae.dead_after_tokens or max(1, min(DEAD_AFTER_TOKENS, share))

    def _resamples(self, sae: SAEConfig) -> bool:
        return self.recipe >= 3 and getattr(sae, "resamples", False)

    def _share(self, part: float, total: int) -> int:
        """A part of the run; 0 where the config does not say how long it is."""
        return 0 if self.data.n_train_samples is None else round(part * total)

    @property
    def effective_batch(self) -> int:
        """Samples per optimiser step and process."""
        return self.data.train_batch_size * self.gradient_accumulation_steps

    @property
    def model(self) -> str:
        """Name or path of the language model, or of the activations that stand in for it."""
        return self.tlens_model_name or self.tlens_model_path or self.data.activations or ""

    @property
    def of_each_seed(self) -> list[Self]:
        """What each of its seeds is trained as, each a run of one seed; the first is the run folder's own."""
        one = [self.model_copy(update={"seed": self.seed + i, "seeds": 1}) for i in range(self.seeds)]
        return one if self.seeds > 1 else [self]

    @property
    def data_seed(self) -> int:
        """Seed of the data order."""
        return self.data.seed or 0

    def sae_at(self, key: str) -> SAEConfig:
        """The SAE section as it holds at one site."""
        section = self.saes.at(key)
        if section.init is None:
            low_rank = self.recipe >= 3 and all(map(is_attention_output, self.saes.site(key).hooks))
            section = section.model_copy(update={"init": "active_subspace" if low_rank else "random"})
        return section


@cache
def run_model(sae_class: type[SAEConfig]) -> type[RunConfig]:
    """`RunConfig` whose `saes` section is that of one architecture (so that errors name the field)."""
    return create_model("RunConfig", __base__=RunConfig, saes=(sae_class, ...))


_RECIPE_1 = {"min_lr_factor": 0.1, "adam_betas": (0.9, 0.999)}
_RECIPE_2_SAES = {"normalize_activations": True, "init": "random"}
_RECIPE_1_SAES = {**_RECIPE_2_SAES, "decoder_norm": "free", "encoder_start": "matched", "sparsity_warmup_samples": 0}
