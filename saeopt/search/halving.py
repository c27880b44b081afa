"""Who goes on at a rung: the ranking of all trials that reached it. No database, no torch.

Trials are ranked by non-dominated sorting: the front of all first, then the front of the rest, and so on; within a
front, whoever adds more to the front's hypervolume first (of those values, each divided by its range). Objectives of
one hook point are ranked by themselves. Whoever is on the front of the study, or of one hook point, goes on in any
case. Collapsed trials come last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from saeopt.config.stopping import EarlyStopping
from saeopt.config.study import StudySpec
from saeopt.search.objectives import expanded, hook_points, objective_names
from saeopt.search.ranking import hypervolume
from saeopt.search.stopping import unmeasured

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Standing:
    """A trial at a rung: its values of the objectives of :func:`ranked_by`, in their own directions; None: it has
    collapsed, or has none."""

    number: int
    values: Sequence[float] | None


@dataclass(frozen=True)
class Place:
    """Where a trial comes among all at its rung."""

    place: int
    """From 1 on."""
    beaten_by: int | None
    """The best of those that are better in some objective and worse in none; None: it is on a front."""


def rungs_in_samples(rule: EarlyStopping, total: int, window: int) -> tuple[int, ...]:
    """The rungs of a trial of `total` samples that are consumed a window at a time: whole windows, below the end."""
    found = {-(-math.ceil(share * total) // window) * window for share in rule.shares}
    return tuple(sorted(samples for samples in found if 0 < samples < total))


def ranked_by(spec: StudySpec) -> StudySpec:
    """The study with the objectives that trials are ranked by: those of each hook point too, where they are means over
    several. Who is on the front of one is wanted there."""
    hooks = hook_points(spec)
    named = len(hooks) > 1 and not any(c in hook for hook in hooks for c in "*?[")
    if not named or any(o.hook_points != "mean" for o in spec.objectives):
        return spec
    of_one = [o.model_copy(update={"hook_points": hook}) for hook in hooks for o in spec.objectives]
    return spec.model_copy(update={"objectives": [*spec.objectives, *of_one]})


def held_out(spec: StudySpec) -> int:
    """Held-out samples that are evaluated at a rung: none where training measures all objectives."""
    return spec.early_stopping.rung_samples if unmeasured(spec) else 0


class Ranking:
    """The ranking of one study."""

    def __init__(self, spec: StudySpec) -> None:
        self.keep, self.labels = spec.early_stopping.keep, objective_names(spec)
        objectives = [objective for _, objective in expanded(ranked_by(spec))]
        self.signs = [-1.0 if objective.maximised else 1.0 for objective in objectives]
        groups: dict[str, list[int]] = {}
        for i, objective in enumerate(objectives):
            groups.setdefault(str(objective.hook_points), []).append(i)
        self.groups = list(groups.values())
        self.counting = 1 if len(objectives) > len(self.labels) else len(groups)

    def order(self, standings: Sequence[Standing]) -> list[int]:
        """The numbers of all, best first."""
        places = self.places(standings)
        return sorted(places, key=lambda number: (places[number].place, number))

    def places(self, standings: Sequence[Standing]) -> dict[int, Place]:
        """Number → where each comes. Of several hook points with objectives of their own, the sum of places counts."""
        alive = [s for s in standings if s.values]
        numbers = [s.number for s in alive]
        costs = np.array([s.values for s in alive], dtype=np.float64).reshape(len(alive), len(self.signs)) * self.signs
        total, free, by = np.zeros(len(alive)), np.zeros(len(alive), dtype=bool), dict[int, int]()
        for n, group in enumerate(self.groups if alive else ()):
            beats = _beats(costs[:, group])
            ranked = _ordered(costs[:, group], beats, numbers)
            free |= ~beats.any(0)
            total[ranked] += np.arange(len(ranked)) if n < self.counting else 0
            for i in range(len(alive)):
                by.setdefault(i, ranked[int(beats[ranked, i].argmax())])
        best_first = sorted(range(len(alive)), key=lambda i: (total[i], numbers[i]))
        found = {numbers[i]: Place(place, None if free[i] else numbers[by[i]]) for place, i in enumerate(best_first, 1)}
        best = numbers[best_first[0]] if alive else None
        for standing in standings:
            found.setdefault(standing.number, Place(len(standings), best))
        return found

    def verdicts(self, standings: Sequence[Standing], asked: Sequence[int]) -> dict[int, str]:
        """Number → why it is paused, of those `asked` for; the others go on.

        Whom nobody dominates goes on, and so do the first `keep` of all that came to the rung.
        """
        places, most = self.places(standings), math.ceil(self.keep * len(standings) - 1e-9)
        values = {s.number: s.values for s in standings}
        found = {}
        for number in asked:
            here = places[number]
            if here.beaten_by is None or here.place <= most:
                continue
            there = f"place {here.place} of {len(standings)}, of which {most} go{'es' if most == 1 else ''} on"
            found[number] = f"{there}: {self._beaten(number, here.beaten_by, values)}"
        return found

    def _beaten(self, number: int, by: int, values: Mapping[int, Sequence[float] | None]) -> str:
        mine, theirs = values[number], values[by]
        if mine is None or theirs is None:
            return f"its SAEs have collapsed or have no finite values, those of trial {by} do not"
        much = (f"{name} {b:.4g} against {a:.4g}" for name, a, b in zip(self.labels, mine, theirs, strict=False))
        return f"trial {by} is ahead ({', '.join(much)})"


def _beats(costs: Array) -> npt.NDArray[np.bool_]:
    """[i, j]: costs i are nowhere higher than costs j, and somewhere lower."""
    lower = (costs[:, None] <= costs[None]).all(-1)
    return np.asarray(lower & (costs[:, None] < costs[None]).any(-1))


def _ordered(costs: Array, beats: npt.NDArray[np.bool_], numbers: Sequence[int]) -> list[int]:
    """Indices by fronts, and within a front by what each adds to its hypervolume; then by number."""
    low, span = costs.min(0), np.ptp(costs, axis=0)
    scaled = (costs - low) / np.where(span > 0, span, 1.0)
    left, found = np.ones(len(costs), dtype=bool), list[int]()
    while left.any():
        front = np.flatnonzero(left & ~beats[left].any(0)).tolist()
        added = gains(scaled[front])
        found += [i for _, _, i in sorted((-gain, numbers[i], i) for gain, i in zip(added, front, strict=True))]
        left[front] = False
    return found


def gains(points: Array) -> list[float]:
    """What each point of a front adds to the volume that they dominate, below 1.1 in every coordinate."""
    if points.shape[1] == 2:  # a box between its neighbours; a study's front may have thousands of points
        order = np.lexsort(points.T[::-1])
        x, y = points[order].T
        boxes = np.empty(len(points))
        boxes[order] = (np.append(x[1:], 1.1) - x) * (np.insert(y[:-1], 0, 1.1) - y)
        return [float(box) for box in boxes]
    reference = [1.1] * points.shape[1]
    whole = hypervolume(points.tolist(), reference)
    return [whole - hypervolume(np.delete(points, i, axis=0).tolist(), reference) for i in range(len(points))]
