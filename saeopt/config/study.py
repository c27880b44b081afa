"""A study: a base config, the space around it, what to aim at and when to give up on a trial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from saeopt.config.base import Float, Int, Seed, StrictModel, explain, nearest, printable
from saeopt.config.io import apply_overrides, stored, validate_run
from saeopt.config.limits import Budget, Constraints, StopWhen
from saeopt.config.places import first_made
from saeopt.config.run import RunConfig
from saeopt.config.starts import StartFrom
from saeopt.config.stopping import Collapse, Count, EarlyStopping, Factor, Positive
from saeopt.errors import UserError
from saeopt.metrics import METRICS, more_is_better, objective_metrics

CPU_PACK, LARGEST_PACK, MEMORY_SHARE = 8, 64, 0.8
"""`pack: auto`: trials of a pack on the CPU, at most on a GPU, and how much of a GPU's free memory a pack may take."""


AUTO, TARGET = "auto", "saes.target_l0"
"""Stands in place of the list of values of `TARGET`: five L0s by the model's width, and some more around the best."""
_SHORT = {"sae_type": "saes.sae_type"}
FORMAT = 2
"""Of a stored spec that older versions would misunderstand; 1 where they would not."""


class Dimension(StrictModel):
    """One parameter: a list of values or a range, perhaps only where other parameters have certain values."""

    values: list[Any] | None = None
    """The values to choose from."""
    low: Float | None = None
    """Lower end of a range (included)."""
    high: Float | None = None
    """Upper end of a range (included)."""
    log: bool = False
    """Search the range on a logarithmic scale."""
    step: Annotated[Float, Field(gt=0)] | None = None
    """Distance between neighbouring values of a range."""
    integer: bool = Field(False, alias="int")
    """Whole numbers only."""
    when: dict[str, list[Any]] = Field(default_factory=dict)
    """Field (`sae_type` is short for `saes.sae_type`) → values under which this parameter exists."""
    refine: bool = False
    """`saes.target_l0` alone: once its values have been tried, up to three more are tried around the one that the
    decoder's own signs favour (docs/target-l0.md). `auto` in place of the values is five of them by the model's
    width, refined."""

    model_config = StrictModel.model_config | {"populate_by_name": True}

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        if not self.refine:  # older versions know no such field, and go on reading what does not need it
            dumped.pop("refine", None)
        return dumped

    @field_validator("values", mode="before")
    @classmethod
    def _auto_alone(cls, value: object) -> object:
        return [value] if value == AUTO else value

    @field_validator("when", mode="before")
    @classmethod
    def _lists(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {_SHORT.get(k, k): v if isinstance(v, list) else [v] for k, v in value.items()}

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.values is not None:
            if self.low is not None or self.high is not None or self.step is not None or self.log or self.integer:
                raise ValueError("give 'values' or a range ('low', 'high'), not both")
            if not self.values:
                raise ValueError("the list of values is empty")
            return self
        if self.refine:
            raise ValueError("'refine: true' needs 'values'")
        if self.low is None or self.high is None:
            raise ValueError("needs 'values', or both 'low' and 'high'")
        if not self.low < self.high:
            raise ValueError(f"'low' must be below 'high' (got {self.low:g} and {self.high:g})")
        if self.log and self.low <= 0:
            raise ValueError(f"'log: true' needs 'low' above 0 (got {self.low:g})")
        if self.log and self.step is not None:
            raise ValueError("'log: true' and 'step' exclude each other")
        if self.integer and not all(end.is_integer() for end in (self.low, self.high, self.step or 1.0)):
            raise ValueError("'int: true' needs whole numbers as 'low', 'high' and 'step'")
        return self


class Sampler(StrictModel):
    """Who proposes the parameters of a trial."""

    type: Literal["grid", "tpe", "random", "nsga2", "gp", "cmaes", "qmc"] = "grid"
    """`grid` runs every cell once; `qmc` spreads all trials by a quasi-random design."""
    seed: Seed = 0
    """Proposals depend on it and on the trial's number."""
    n_startup_trials: Count = 10
    """First trials of a sampled study, spread by a quasi-random (Sobol) design."""


class Objective(StrictModel):
    """One value to minimise or maximise, from the evaluation at the end of a trial."""

    metric: str
    """A metric of the evaluation (`saeopt.metrics`)."""
    direction: Literal["minimize", "maximize"] | None = None
    """null: the metric's own (explained_variance, cosine, fraction_alive and ce_recovered are maximised)."""
    hook_points: str | Annotated[list[str], Field(min_length=1)] = "mean"
    """`mean` over all hook points, `all` (an objective for each), one name, or a list (its mean)."""
    target_l0: Annotated[Float, Field(gt=0, le=1e9)] | None = None
    """Worsen the value by `l0_weight` · max(0, |ln(L0 / target_l0)| − ln(1 + l0_tolerance)); null: the SAE's own
    `saes.target_l0`, where it has one and `l0` is no objective itself."""
    l0_tolerance: Factor = 0.1
    """Relative distance from `target_l0` that costs nothing."""
    l0_weight: Annotated[Float, Field(gt=0, le=1e9)] = 1.0
    """Cost of a factor e between L0 and its target."""

    @field_validator("metric")
    @classmethod
    def _known(cls, value: str) -> str:
        known = objective_metrics()
        if value not in known:
            raise ValueError(f"unknown metric{nearest(value, known)} (known: {', '.join(known)})")
        return value

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: object) -> object:
        return {"metric": value} if isinstance(value, str) else value

    @property
    def maximised(self) -> bool:
        """Whether more is better."""
        return more_is_better(self.metric) if self.direction is None else self.direction == "maximize"


class StudySpec(StrictModel):
    """Everything a worker needs to know; it is stored in the study itself."""

    format: Literal[1, 2] = 1
    """Version of this format (2 where trials can be paused); a worker of an older version refuses a newer one."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    """The study's name; run folders are `<output_dir>/<name>/<trial>/`."""
    base: dict[str, Any]
    """The base run config: a mapping, or the path of a YAML file (relative to the study file)."""
    space: dict[str, list[Dimension]] = Field(default_factory=dict)
    """`field` or `saes.field@hook point` → a list of values, a range, or alternatives with `when`."""
    sampler: Sampler = Field(default_factory=Sampler)
    """A name (`grid`) or a section: see below."""
    objectives: Annotated[list[Objective], Field(min_length=1)] = Field(
        default_factory=lambda: [Objective(metric="l0"), Objective(metric="explained_variance")]
    )
    """What a trial is judged by: metrics by name, or sections as below. Two or more give a Pareto front."""
    early_stopping: EarlyStopping = Field(default_factory=EarlyStopping)
    """A name (`median`) or a section: see below. Left out, a new study that samples several objectives has `halving`
    (unless it could stop no trial), others `none`."""
    seeds: Annotated[Int, Field(gt=0, le=1000)] | None = Field(None, exclude=True)
    """Short for `seeds` of the base config: every trial is trained with so many seeds (`seed`, `seed + 1`, …) in one
    pack, its values are means over them, and what differs by less than they do is called noise."""
    enqueue: list[Annotated[dict[str, Any], Field(min_length=1)]] = Field(default_factory=list)
    """Points of a sampled study that are tried first: `{field: value}` each, as in `space`. What a point leaves out is
    filled by the quasi-random design; what stands twice is tried once."""
    start_from: StartFrom | None = None
    """Trials of another study that a sampled study tries first, after `enqueue`: see below."""
    max_trials: Positive | None = None
    """Grid: only the first cells, up to this number. Otherwise: the number of trials."""
    budget: Budget | None = None
    """What all workers may spend together: see below."""
    constraints: Constraints = Field(default_factory=dict)
    """`{fraction_dead: "<= 0.1", memory_gib: "<= 8"}`: what each SAE of a trial must keep. Any metric of an evaluation,
    and of the trial as a whole `parameters` (of one seed) and `memory_gib` (estimated, of its training alone). What
    violates one is infeasible for the sampler, marked in status, and on no front unless it is asked for."""
    stop_when: StopWhen | None = None
    """The study ends by itself when its front no longer grows: see below."""
    pack: Positive | Literal["auto"] = "auto"
    """Most trials that a worker trains together; auto: what fits, and for samplers that learn from results no more than
    leaves ten rounds of proposals."""
    retries: Count = 2
    """How often a failed trial is tried again."""
    max_losses: Positive = 10
    """A trial fails when its worker was lost this number of times without a new checkpoint in between."""
    heartbeat: Annotated[Float, Field(ge=0.05, le=3600)] = 5.0
    """Seconds between the signs of life of a worker."""
    grace: Annotated[Float, Field(gt=0, le=86400)] = 20.0
    """Seconds without a sign of life after which a worker's trials go back to the queue."""
    stall: Annotated[Float, Field(ge=1, le=1e7)] | None = None
    """Seconds without progress after which a worker gives its trials back and starts a fresh training process. null:
    half an hour, or fifty times the longest pause seen, whichever is more; four times that while it loads."""
    output_dir: Annotated[str, Field(max_length=1000), AfterValidator(printable)] | None = None
    """null: `save_dir` of the base config. A relative path starts where the study was created, if its folder is there,
    else where the worker does."""
    _older: tuple[StudySpec, ...] = PrivateAttr(())

    @field_validator("sampler", mode="before")
    @classmethod
    def _sampler_name(cls, value: object) -> object:
        return {"type": value} if isinstance(value, str) else value

    @field_validator("space", mode="before")
    @classmethod
    def _short_forms(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        if "sae_type" in value and "saes.sae_type" in value:
            raise ValueError("'sae_type' and 'saes.sae_type' are the same field: give one of them")
        return {_SHORT.get(k, k): _dimensions(entry) for k, entry in value.items()}

    @field_validator("enqueue", mode="before")
    @classmethod
    def _full_names(cls, value: object) -> object:
        if not isinstance(value, list):
            return value
        return [{_SHORT.get(k, k): v for k, v in p.items()} if isinstance(p, dict) else p for p in value]

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        for name in ("enqueue", "start_from", "budget", "constraints", "stop_when"):  # unknown to older versions
            if not dumped.get(name):
                dumped.pop(name, None)
        return dumped

    @model_validator(mode="after")
    def _seeds_in_base(self) -> Self:
        if self.seeds is not None:
            if self.base.get("seeds", 1) not in (1, self.seeds):
                raise ValueError(f"'seeds' is {self.seeds}, 'base.seeds' {self.base['seeds']}: give one of them")
            self.base["seeds"] = self.seeds
        return self

    @model_validator(mode="after")
    def _newest_where_needed(self) -> Self:
        self.__dict__["format"] = FORMAT if self.early_stopping.type == "halving" else 1
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in self.constraints:
            if name in METRICS and METRICS[name].seeds and self.n_seeds == 1:
                raise ValueError(f"'constraints': '{name}' is measured between seeds: give 'seeds', two or more")
        if self.sampler.type == "grid" and (self.enqueue or self.start_from):
            name = "enqueue" if self.enqueue else "start_from"
            raise ValueError(
                f"'{name}' needs a sampled study (sampler: tpe, random, …): a grid trains every cell of 'space' once"
            )
        if self.max_trials is not None and len(self.enqueue) > self.max_trials:
            raise ValueError(f"'enqueue' has {len(self.enqueue)} points, 'max_trials' is {self.max_trials}")
        if self.sampler.type != "grid" and self.max_trials is None:
            raise ValueError(f"'sampler: {self.sampler.type}' needs 'max_trials'")
        if self.sampler.type != "grid" and not self.space:
            raise ValueError("'space' is empty")
        if self.grace < 2 * self.heartbeat:
            raise ValueError(f"'grace' must be at least twice 'heartbeat' ({self.heartbeat:g} s)")
        n_objectives = len(self.objectives)
        if n_objectives > 1 or self.objectives[0].hook_points == "all":
            if self.early_stopping.type not in ("none", "pareto", "halving"):
                raise ValueError(
                    f"'early_stopping: {self.early_stopping.type}' needs a single objective; use 'halving' or 'pareto'"
                )
            if self.sampler.type == "cmaes":
                raise ValueError("'sampler: cmaes' needs a single objective")
        elif self.early_stopping.type == "pareto":
            raise ValueError("'early_stopping: pareto' needs several objectives; use median, asha or hyperband")
        return self

    @property
    def older(self) -> tuple[StudySpec, ...]:
        """The same study under older recipes, where its base config names none and got the newest."""
        return self._older

    def set_older(self, *older: StudySpec) -> None:
        """Keep the same study under older recipes."""
        self._older = older

    def to_json(self) -> str:
        """Canonical text: equal specs give equal texts."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> StudySpec:
        """The inverse of :meth:`to_json`.

        Raises:
            UserError: this version does not know such a spec.
        """
        try:
            found = cls.model_validate_json(text)
            return found.model_copy(update={"base": stored(found.base)})
        except ValidationError as error:
            made = json.loads(text).get("format", 1) if text.lstrip().startswith("{") else None
            if made not in (1, FORMAT):
                raise UserError(f"the study's format is {made}, this version knows {FORMAT}: use a newer one") from None
            raise explain(error, "the stored study (made by another version?)", known_names()) from None

    def run_config(self, values: dict[str, Any], source: str | None = None) -> RunConfig:
        """The base config with the values of a cell (`field[@hook point]` → value); :class:`UserError` if invalid."""
        return validate_run(apply_overrides(self.base, values), source or f"study {self.name}")

    @property
    def n_seeds(self) -> int:
        """SAEs per trial and site."""
        return int(self.base.get("seeds", 1))

    @property
    def n_starts(self) -> int:
        """Trials that are given, or were found in another study."""
        return len(self.enqueue) + len((self.start_from and self.start_from.found) or [])

    @property
    def runs(self) -> Path:
        """The folder that holds the run folders of all trials."""
        folder = self.output_dir or self.base.get("save_dir") or "output"
        return first_made(self.base.get("as_typed") or {}, folder, self.name)

    def run_dir(self, number: int) -> Path:
        """The run folder of a trial."""
        return self.runs / str(number)

    @property
    def sae_types(self) -> list[str]:
        """The architectures that the trials may have."""
        varied = [str(v) for d in self.space.get("saes.sae_type", []) for v in d.values or []]
        return list(dict.fromkeys(varied)) or [self.base_sae_type]

    @property
    def base_sae_type(self) -> str:
        """`saes.sae_type` of the base config."""
        saes = self.base.get("saes")
        return str(saes.get("sae_type", "")) if isinstance(saes, dict) else ""


def _dimensions(entry: object) -> object:
    if isinstance(entry, dict):
        return [entry]
    if isinstance(entry, list) and entry and all(isinstance(e, Dimension) or _is_dimension(e) for e in entry):
        return entry
    return [{"values": entry if isinstance(entry, list) else [entry]}]


def _is_dimension(entry: object) -> bool:
    return isinstance(entry, dict) and ("values" in entry or "low" in entry)


def known_names() -> dict[tuple[str, ...], list[str]]:
    """Field names per section, for suggestions."""
    return {
        (): list(StudySpec.model_fields),
        ("sampler",): list(Sampler.model_fields),
        ("early_stopping",): list(EarlyStopping.model_fields),
        ("early_stopping", "collapse"): list(Collapse.model_fields),
        ("start_from",): list(StartFrom.model_fields),
        ("budget",): list(Budget.model_fields),
        ("stop_when",): list(StopWhen.model_fields),
    }
