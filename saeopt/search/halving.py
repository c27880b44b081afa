"""Who goes on at a rung: the ranking of all trials that reached it. No database, no torch.

Trials are ranked by non-dominated sorting: the front of all first, then the front of the rest, and so on; within a
front, whoever adds more to the front's hypervolume first (of those values, each divided by its range). Objectives of
one hook point are ranked by themselves, and so are those that are means over hook points: what counts for a trial is
where it does best. Collapsed trials come last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from saeopt.config.study import EarlyStopping, StudySpec
from saeopt.search.objectives import expanded, objective_names
from saeopt.search.stopping import unmeasured


@dataclass(frozen=True)
class Standing:
    """A trial at a rung: its objective values there, in their own directions; None: it has collapsed, or has none."""

    number: int
    values: Sequence[float] | None


@dataclass(frozen=True)
class Place:
    """Where a trial comes among all at its rung, where it does best."""

    place: int
    """From 1 on."""
    beaten_by: int | None
    """The best of those that are better in some objective and worse in none; None: nobody dominates it."""


def rungs_in_samples(rule: EarlyStopping, total: int, window: int) -> tuple[int, ...]:
    """The rungs of a trial of `total` samples that are consumed a window at a time: whole windows, below the end."""
    found = {-(-math.ceil(share * total) // window) * window for share in rule.shares}
    return tuple(sorted(samples for samples in found if 0 < samples < total))


def held_out(spec: StudySpec) -> int:
    """Held-out samples that are evaluated at a rung: none where training measures all objectives."""
    return spec.early_stopping.rung_samples if unmeasured(spec) else 0


class Ranking:
    """The ranking of one study."""

    def __init__(self, spec: StudySpec) -> None:
        self.keep, self.labels = spec.early_stopping.keep, objective_names(spec)
        objectives = [objective for _, objective in expanded(spec)]
        self.signs = [-1.0 if objective.maximised else 1.0 for objective in objectives]
        groups: dict[str, list[int]] = {}
        for i, objective in enumerate(objectives):
            groups.setdefault(str(objective.hook_points), []).append(i)
        self.groups = list(groups.values())

    def order(self, standings: Sequence[Standing]) -> list[int]:
        """The numbers of all, best first."""
        places = self.places(standings)
        return sorted(places, key=lambda number: (places[number].place, number))

    def places(self, standings: Sequence[Standing]) -> dict[int, Place]:
        """Number → where each comes."""
        alive = {
            s.number: [v * sign for v, sign in zip(s.values, self.signs, strict=True)] for s in standings if s.values
        }
        found: dict[int, Place] = {}
        for group in self.groups:
            costs = {number: tuple(values[i] for i in group) for number, values in alive.items()}
            ranked = ordered(costs)
            for place, number in enumerate(ranked, 1):
                by = next((other for other in ranked if dominates(costs[other], costs[number])), None)
                here, before = Place(place, by), found.get(number)
                if before is None or (here.beaten_by is not None, place) < (before.beaten_by is not None, before.place):
                    found[number] = here
        first = min(alive, default=None)
        best = next((number for number, place in found.items() if place.place == 1), first)
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
        much = (f"{name} {b:.4g} against {a:.4g}" for name, a, b in zip(self.labels, mine, theirs, strict=True))
        return f"trial {by} is ahead ({', '.join(much)})"


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether costs `a` are nowhere higher than `b`, and somewhere lower."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def ordered(costs: Mapping[int, tuple[float, ...]]) -> list[int]:
    """The numbers by fronts, and within a front by what each adds to its hypervolume; then by number."""
    left, found = dict(costs), list[int]()
    spans = [(min(column), max(column)) for column in zip(*costs.values(), strict=True)]
    scaled = {
        number: tuple(
            (v - low) / (high - low) if high > low else 0.0 for v, (low, high) in zip(row, spans, strict=True)
        )
        for number, row in costs.items()
    }
    while left:
        front = [n for n, mine in left.items() if not any(dominates(other, mine) for other in left.values())]
        points = {n: scaled[n] for n in front}
        whole = hypervolume(list(points.values()))
        gain = {n: whole - hypervolume([p for other, p in points.items() if other != n]) for n in front}
        found += sorted(front, key=lambda n: (-gain[n], n))
        left = {n: row for n, row in left.items() if n not in points}
    return found


def hypervolume(points: Sequence[tuple[float, ...]], reference: float = 1.1) -> float:
    """The volume that points (costs) dominate below `reference` in every coordinate: by slices along the last one."""
    inside = sorted({p for p in points if all(v < reference for v in p)}, key=lambda p: p[-1])
    if not inside:
        return 0.0
    if len(inside[0]) == 1:
        return reference - inside[0][0]
    total = 0.0
    for i, point in enumerate(inside):
        above = inside[i + 1][-1] if i + 1 < len(inside) else reference
        if above > point[-1]:
            total += (above - point[-1]) * hypervolume([p[:-1] for p in inside[: i + 1]], reference)
    return total
