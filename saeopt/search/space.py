"""The search space: grid cells in an order that makes good packs, conditional parameters, distributions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from saeopt.config.fields import slowness
from saeopt.config.keys import stream_key
from saeopt.config.run import RunConfig
from saeopt.config.starts import Weights
from saeopt.config.study import Dimension, StudySpec
from saeopt.errors import UserError

MOST_CELLS = 100_000
"""Cells of a grid that a study may have."""


@dataclass(frozen=True)
class Parameter:
    """A named parameter of the study. `field` may occur in several, with conditions that exclude each other."""

    name: str
    field: str
    dimension: Dimension

    @cached_property
    def choices(self) -> Sequence[Any]:
        """The values as Optuna stores them: lists become JSON text."""
        values = self.dimension.values
        if values is None:
            return _Steps(self.dimension)
        return [v if v is None or isinstance(v, bool | int | float | str) else json.dumps(v) for v in values]

    @cached_property
    def distribution(self) -> BaseDistribution:
        """Optuna's view of the dimension."""
        d = self.dimension
        if d.refine:  # more values will come, and a list may not grow within a study
            return IntDistribution(1, 10**9, log=True)
        if d.values is not None:
            return CategoricalDistribution(self.choices)
        assert d.low is not None
        assert d.high is not None
        if d.integer:
            return IntDistribution(int(d.low), int(d.high), log=d.log, step=int(d.step or 1))
        return FloatDistribution(d.low, d.high, log=d.log, step=d.step)

    def value(self, stored: Any) -> Any:
        """The field's value for a stored parameter value."""
        if self.dimension.values is not None and not self.dimension.refine:
            return self.dimension.values[_index(self.choices, stored)]
        return stored

    def at(self, share: float) -> Any:
        """The stored value at a share (0 ≤ share < 1) of the dimension, for designs that fill the space."""
        d = self.dimension
        if d.values is not None:
            return self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)]
        if d.step is not None or d.integer:
            steps = self.choices
            if not d.log:
                return steps[min(int(share * len(steps)), len(steps) - 1)]
        assert d.low is not None
        assert d.high is not None
        value = d.low * (d.high / d.low) ** share if d.log else d.low + (d.high - d.low) * share
        return _plain(min(max(round(value) if d.integer else value, d.low), d.high))

    def suggest(self, trial: Trial) -> Any:
        """Ask the trial's sampler."""
        d = self.dimension
        if d.values is not None:
            return trial.suggest_categorical(self.name, self.choices)
        assert d.low is not None
        assert d.high is not None
        if d.integer:
            return trial.suggest_int(self.name, int(d.low), int(d.high), log=d.log, step=int(d.step or 1))
        return trial.suggest_float(self.name, d.low, d.high, log=d.log, step=d.step)


@dataclass(frozen=True)
class Cell:
    """One trial to come: parameters as stored, its complete config, and what it can share a pack with."""

    params: dict[str, Any]
    config: RunConfig
    stream: str


class Space:
    """The parameters of a study, slowest first: what fixes the stream, then what fixes shapes, then the rest."""

    def __init__(self, spec: StudySpec) -> None:
        self.spec = spec
        found = [p for field, dimensions in spec.space.items() for p in _parameters(field, dimensions)]
        self._slowness = {p.field: slowness(p.field.partition("@")[0], spec.sae_types) for p in found}
        self.parameters = sorted(found, key=lambda p: self._slowness[p.field])
        self.by_name = {p.name: p for p in self.parameters}
        found_elsewhere = (spec.start_from and spec.start_from.found) or []
        self._weights = {key_of(one.params): one.weights for one in found_elsewhere}
        self.parents = sorted({parent for p in found for parent in p.dimension.when})

    @property
    def refined(self) -> list[Parameter]:
        """Those of which more values are tried around the best."""
        return [p for p in self.parameters if p.dimension.refine]

    @property
    def fixes_stream(self) -> bool:
        """Whether some parameter decides which trials can share a pack."""
        return any(slow == (0, 0) for slow in self._slowness.values())

    def values(self, params: dict[str, Any]) -> dict[str, Any]:
        """`field[@hook point]` → value, from stored parameters."""
        unknown = [name for name in params if name not in self.by_name]
        if unknown:
            raise UserError(f"study {self.spec.name}: a trial has the parameter '{unknown[0]}', the space has not")
        return {self.by_name[n].field: self.by_name[n].value(v) for n, v in params.items()}

    def config(self, params: dict[str, Any]) -> RunConfig:
        """The complete config of a trial; :class:`UserError` if these values do not go together."""
        shown = ", ".join(f"{k}={v}" for k, v in params.items())
        values, weights = self.values(params), self.weights(params)
        if weights is not None:
            values["saes.pretrained_sae_paths"] = [weights.file]
        return self.spec.run_config(values, f"study {self.spec.name}: {shown or 'base'}")

    def weights(self, params: dict[str, Any]) -> Weights | None:
        """What the trial of these parameters starts from, where it comes from another study with its weights."""
        return self._weights.get(key_of(params))

    def cell(self, params: dict[str, Any]) -> Cell:
        """A validated cell."""
        config = self.config(params)
        return Cell(params, config, stream_key(config))

    def active(self, parameter: Parameter, chosen: dict[str, Any]) -> bool:
        """Whether the parameter exists under the chosen values of its parents."""
        for parent, accepted in parameter.dimension.when.items():
            current = chosen.get(parent, self.spec.base_sae_type if parent == "saes.sae_type" else None)
            if current not in accepted:
                return False
        return True

    def ordered(self) -> list[Parameter]:
        """Parents first."""
        return sorted(self.parameters, key=lambda p: p.field not in self.parents)

    def grid(self) -> list[Cell]:
        """Every cell once, validated, in the order of the queue; `max_trials` keeps the first."""
        for p in self.parameters:
            if p.dimension.values is None and p.dimension.step is None and not p.dimension.integer:
                raise UserError(
                    f"study {self.spec.name}: 'space.{p.name}': a grid needs a list or a 'step',"
                    " or choose another sampler (tpe, random, …)"
                )
        most = min(self.spec.max_trials or MOST_CELLS + 1, MOST_CELLS + 1)
        combinations = list(itertools.islice(self._combinations(), most))  # counted before any is validated
        if len(combinations) > MOST_CELLS:
            raise UserError(
                f"study {self.spec.name}: the grid has more than {MOST_CELLS:,} cells: give 'max_trials' or another"
                " sampler"
            )
        cells: dict[str, Cell] = {}
        for cell in map(self.cell, combinations):
            cells.setdefault(cell.config.model_dump_json(), cell)
        order = {stream: i for i, stream in enumerate(dict.fromkeys(c.stream for c in cells.values()))}
        return sorted(cells.values(), key=lambda c: order[c.stream])

    def _combinations(self) -> Iterator[dict[str, Any]]:
        """Every combination that exists, slowest parameters outermost; of a huge space no more than is asked for."""

        def extend(params: dict[str, Any], rest: list[Parameter]) -> Iterator[dict[str, Any]]:
            if not all(self._possible(p, params, rest) for p in self.parameters):
                return
            if not rest:
                yield params
                return
            first, *others = rest
            if first.dimension.when:
                yield from extend(params, others)  # where it does not exist
            for choice in first.choices:
                yield from extend({**params, first.name: choice}, others)

        yield from extend({}, self.parameters)

    def _possible(self, parameter: Parameter, params: dict[str, Any], rest: list[Parameter]) -> bool:
        """Whether a parameter that was decided exists exactly if its parents say so, as far as these are decided."""
        open_fields = {p.field for p in rest}
        if not parameter.dimension.when or parameter in rest or open_fields & parameter.dimension.when.keys():
            return True
        return (parameter.name in params) == self.active(parameter, self.values(params))

    def shares(self, n: int, seed: int) -> list[dict[str, float]]:
        """`n` points of a scrambled Sobol sequence: the share of each parameter. The first are the same for every n."""
        import warnings

        from scipy.stats import qmc

        if n == 0 or not self.parameters:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # n need not be a power of two here
            points = qmc.Sobol(len(self.parameters), scramble=True, rng=seed).random(n)
        return [dict(zip(self.by_name, map(float, point), strict=True)) for point in points]

    def at(self, shares: Mapping[str, float]) -> dict[str, Any]:
        """The parameters that exist at a point."""
        params: dict[str, Any] = {}
        chosen: dict[str, Any] = {}
        for p in self.ordered():
            if self.active(p, chosen):
                params[p.name] = p.at(shares[p.name])
                chosen[p.field] = p.value(params[p.name])
        return params

    def middle(self) -> Cell:
        """The cell in the middle of every dimension."""
        return self.cell(self.at({p.name: 0.5 for p in self.parameters}))

    def largest(self) -> Cell:
        """The cell with the most latents and the largest k, the middle otherwise: it needs the most memory."""
        sizes = ("saes.dict_size_to_input_ratio", "saes.k", "saes.target_l0")
        return self.cell(self.at({p.name: 0.999 if p.field in sizes else 0.5 for p in self.parameters}))

    def varies(self, field: str) -> bool:
        """Whether some parameter sets this field."""
        return any(p.field.partition("@")[0] == field for p in self.parameters)

    def corners(self) -> list[Cell]:
        """Each parameter's ends or values once, everything else in the middle; :class:`UserError` if one is invalid."""
        cells = []
        for p in self.parameters:
            shares = [i / len(p.choices) for i in range(len(p.choices))] if p.dimension.values else [0.0, 1.0]
            for conditions in self._conditions(p):
                for share in shares:
                    middle = {q.name: 0.5 for q in self.parameters}
                    cells.append(self.cell(self.at({**middle, **conditions, p.name: share})))
        return cells

    def _conditions(self, parameter: Parameter) -> Iterator[dict[str, float]]:
        """Shares of the parents under which a parameter exists."""
        axes = []
        for parent, accepted in parameter.dimension.when.items():
            for q in self.parameters:
                if q.field == parent:
                    n = len(q.choices)
                    axes.append([(q.name, (i + 0.5) / n) for i in range(n) if q.value(q.choices[i]) in accepted])
        yield from (dict(choice) for choice in itertools.product(*axes))

    def is_complete(self, params: dict[str, Any]) -> bool:
        """Whether every parameter that exists under these values has one."""
        chosen = self.values(params)
        return all(p.name in params for p in self.parameters if self.active(p, chosen))

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """Parameters for a trial from its sampler, parents first."""
        params: dict[str, Any] = {}
        chosen: dict[str, Any] = {}
        for p in self.ordered():
            if self.active(p, chosen):
                params[p.name] = p.suggest(trial)
                chosen[p.field] = p.value(params[p.name])
        return params


def _parameters(field: str, dimensions: list[Dimension]) -> list[Parameter]:
    if len(dimensions) == 1:
        return [Parameter(field, field, dimensions[0])]
    found = []
    for i, dimension in enumerate(dimensions):
        label = ",".join(str(v) for values in dimension.when.values() for v in values) or str(i)
        found.append(Parameter(f"{field}[{label}]", field, dimension))
    names = [p.name for p in found]
    if len(set(names)) < len(names):
        raise UserError(f"'space.{field}': two alternatives hold under the same condition")
    return found


def _index(choices: Sequence[Any], stored: Any) -> int:
    """Position of a stored value; true and 1 are different."""
    for i, choice in enumerate(choices):
        if choice == stored and isinstance(choice, bool) == isinstance(stored, bool):
            return i
    raise UserError(f"the stored value {stored!r} is not in the space any more")


class _Steps(Sequence[Any]):
    """The values of a range with a step, made when they are asked for."""

    def __init__(self, d: Dimension) -> None:
        assert d.low is not None
        assert d.high is not None
        self.low, self.step, self.integer = d.low, d.step or 1.0, d.integer
        self.n = int((d.high - d.low) / self.step + 1e-9) + 1

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self.n:
            raise IndexError(i)
        value = round(self.low + i * self.step, 12)
        return int(value) if self.integer else value


def key_of(params: Mapping[str, Any]) -> str:
    """Equal for equal parameters, also where a whole number is a float."""
    plain = {n: int(v) if isinstance(v, float) and v.is_integer() else v for n, v in params.items()}
    return json.dumps(plain, sort_keys=True)


def _plain(value: Any) -> Any:
    return value if isinstance(value, int) else float(value)
