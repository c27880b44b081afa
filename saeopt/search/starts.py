"""The first trials of a sampled study: points that are given, what was found in another study, and what fills them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saeopt.config.study import TARGET, StudySpec
from saeopt.errors import UserError
from saeopt.search.space import Cell, Parameter, Space, key_of

NEAR = 0.1
"""An L0 that was reached may lie so far beyond the targets of the new space: it counts as the nearest of them then."""
_SHOWN = 4


class Outside(UserError):
    """A value that a parameter cannot have."""


def stored(parameter: Parameter, value: Any) -> Any:
    """The parameter's value as Optuna stores it.

    Raises:
        Outside: it is none of the list, or not in the range or on its steps.
    """
    d = parameter.dimension
    if d.values is not None:
        for choice, known in zip(parameter.choices, d.values, strict=True):
            if known == value and isinstance(known, bool) == isinstance(value, bool):
                return choice
        raise Outside(f"{value!r} is none of {', '.join(map(str, d.values))}")
    assert d.low is not None
    assert d.high is not None
    ends = f"{d.low:g} to {d.high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not d.low <= value <= d.high:
        raise Outside(f"{value!r} is not in {ends}")
    step = d.step or (1.0 if d.integer else None)
    if step is not None and abs((value - d.low) / step - round((value - d.low) / step)) > 1e-9:
        raise Outside(f"{value!r} is not on the steps of {step:g} in {ends}")
    return int(value) if d.integer else float(value)


def filled(space: Space, shares: Mapping[str, float], take: Callable[[Parameter], Any]) -> dict[str, Any]:
    """Stored parameters, parents first: what `take` gives, and where it gives nothing (`KeyError`) what the shares of
    the design say."""
    params: dict[str, Any] = {}
    chosen: dict[str, Any] = {}
    for p in space.ordered():
        if space.active(p, chosen):
            try:
                params[p.name] = take(p)
            except KeyError:
                params[p.name] = p.at(shares[p.name])
            chosen[p.field] = p.value(params[p.name])
    return params


def given(space: Space, point: Mapping[str, Any], shares: Mapping[str, float]) -> dict[str, Any]:
    """The parameters of a point of `enqueue`.

    Raises:
        UserError: a value outside the space, or a field that does not exist under the others.
    """
    for field in point:
        parents = {parent for p in space.parameters if p.field == field for parent in p.dimension.when}
        if missing := sorted(parent for parent in parents if space.varies(parent) and parent not in point):
            raise UserError(f"'{field}' depends on '{missing[0]}': the point must name both")
    taken = set()

    def take(p: Parameter) -> Any:
        value = point[p.field]
        taken.add(p.field)
        try:
            return stored(p, value)
        except Outside as error:
            raise UserError(f"'{p.field}': {error}") from None

    params = filled(space, shares, take)
    if absent := [field for field in point if field not in taken]:
        raise UserError(f"'{absent[0]}' does not exist under the other values of the point")
    return params


def first_cells(spec: StudySpec, space: Space, n: int) -> list[Cell]:
    """The trials whose values are known: `enqueue`, what was found for `start_from`, and the design up to `n` in all.

    Raises:
        UserError: a point that lies outside the space, or is no valid config.
    """
    begun = _given_cells(spec, space)
    doubles = spec.n_starts - len(begun)  # the design has a point more for each
    shares = space.shares(max(n, spec.n_starts) + doubles, spec.sampler.seed)
    design = [space.cell(space.at(point)) for point in shares[spec.n_starts : n + doubles]]
    return [*begun.values(), *(cell for cell in design if key_of(cell.params) not in begun)]


def doubles_text(spec: StudySpec, space: Space) -> str | None:
    """What `create` says of given trials that stand twice; None where there are none."""
    doubles = spec.n_starts - len(_given_cells(spec, space)) if spec.n_starts else 0
    among = " and ".join(
        name for name, there in (("'enqueue'", spec.enqueue), ("'start_from'", spec.start_from)) if there
    )
    return f"left out: {doubles} duplicate{'s'[: doubles != 1]} in {among}" if doubles else None


def _given_cells(spec: StudySpec, space: Space) -> dict[str, Cell]:
    """Key → cell, of `enqueue` and `start_from`; what stands twice is one."""
    found = (spec.start_from and spec.start_from.found) or []
    shares = space.shares(spec.n_starts, spec.sampler.seed)
    cells: dict[str, Cell] = {}
    for i, point in enumerate(spec.enqueue):
        where = f"study {spec.name}: 'enqueue.{i}'"
        try:
            cell = space.cell(given(space, point, shares[i]))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        cells.setdefault(key_of(cell.params), cell)
    for one in found:
        cells.setdefault(key_of(one.params), space.cell(one.params))
    return cells


@dataclass
class Known:
    """What is known of a trial of another study: its values, its fields that are no values, and the L0 it reached."""

    number: int
    values: Mapping[str, Any]
    """`field[@hook point]` → value."""
    unusable: Mapping[str, str]
    """Field → why its value means nothing here."""
    l0: Mapping[str, float]
    """Hook point → L0; under "" the mean."""


class Translation:
    """Trials of another study as trials of this one, and what was left out."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self._out: dict[str, dict[int, str]] = {}
        self.same: dict[int, int] = {}
        """Trial → the trial before it that is the same here."""

    def params(self, trial: Known, shares: Mapping[str, float]) -> dict[str, Any]:
        """The trial's parameters here; what cannot be taken over is filled from the design."""

        def take(p: Parameter) -> Any:
            try:
                return self._value(p, trial)
            except Outside as error:
                self._out.setdefault(p.field, {})[trial.number] = str(error)
                raise KeyError(p.field) from None

        return filled(self.space, shares, take)

    def _value(self, p: Parameter, trial: Known) -> Any:
        field, _, hook = p.field.partition("@")
        if field == TARGET:
            return _target(p, trial.l0.get(hook))
        if p.field in trial.unusable:
            raise Outside(trial.unusable[p.field])
        if p.field not in trial.values:
            raise Outside("it has no such field")
        return stored(p, trial.values[p.field])

    def told(self) -> list[str]:
        """A line for each field of which something was left out."""
        lines = []
        for field, trials in self._out.items():
            reasons = dict.fromkeys(trials.values())
            shown = "; ".join([*list(reasons)[:_SHOWN], *(["…"] if len(reasons) > _SHOWN else [])])
            lines.append(f"{field} of {numbers(list(trials))} is left to the design: {shown}")
        if self.same:
            lines.append(f"left out, the same here as one before it: {numbers(list(self.same))}")
        return lines


def numbers(trials: Sequence[int]) -> str:
    """`#3, #7, …`"""
    return ", ".join([*(f"#{n}" for n in trials[:8]), *(["…"] if len(trials) > 8 else [])])


def _target(p: Parameter, l0: float | None) -> Any:
    """The target that is nearest to an L0 that was reached."""
    if l0 is None or not math.isfinite(l0) or l0 <= 0:
        raise Outside("its L0 is not known")
    d = p.dimension
    targets = [float(v) for v in d.values if v is not None] if d.values is not None else [d.low or 0.0, d.high or 0.0]
    if not targets or not min(targets) * (1 - NEAR) <= l0 <= max(targets) * (1 + NEAR):
        raise Outside(f"the L0 that it reached, {l0:.3g}, is not in {min(targets):g} to {max(targets):g}")
    if d.values is not None:
        known = [v for v in d.values if v is not None]
        return stored(p, known[min(range(len(known)), key=lambda i: abs(math.log(targets[i] / l0)))])
    low, high = targets
    if d.integer or d.step is not None:
        step = d.step or 1.0
        last = math.floor((high - low) / step + 1e-9)
        return stored(p, low + min(max(round((l0 - low) / step), 0), last) * step)
    return stored(p, min(max(l0, low), high))
