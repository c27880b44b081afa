"""Trials in order of several objectives, by Optuna's own non-dominated sorting and hypervolume."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from optuna._hypervolume import _solve_hssp, compute_hypervolume
from optuna.study._multi_objective import _fast_non_domination_rank


def ranked(values: Sequence[Sequence[float]], most: int) -> list[int]:
    """Positions of rows of values, all to be minimised, the best first; at most so many.

    Front by front; within a front each next row is the one that adds most to the hypervolume of those before it, on the
    ranks of the values, so that no objective's scale counts. Of equal rows the first is first.
    """
    if not values:
        return []
    costs = np.asarray(values, dtype=float)
    if costs.shape[1] == 1:
        return [int(i) for i in np.argsort(costs[:, 0], kind="stable")][:most]
    layers = _fast_non_domination_rank(costs)
    found: list[int] = []
    for layer in range(int(layers.max()) + 1):
        rows = np.flatnonzero(layers == layer)
        places = np.stack([np.unique(column, return_inverse=True)[1] for column in costs[rows].T], axis=1)
        scaled = places / np.maximum(places.max(axis=0), 1)
        for n in range(1, min(len(rows), most - len(found)) + 1):  # greedy: each subset holds the one before it
            chosen = _solve_hssp(scaled, rows, n, np.full(costs.shape[1], 1.1))
            found += [int(i) for i in np.sort(chosen) if int(i) not in found]
    return found


def hypervolume(values: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """What rows of values, all to be minimised, dominate up to a reference point; rows beyond it count nothing."""
    inside = [row for row in values if all(v < limit for v, limit in zip(row, reference, strict=True))]
    return float(compute_hypervolume(np.asarray(inside, dtype=float), np.asarray(reference))) if inside else 0.0


def non_dominated(values: Sequence[Sequence[float]]) -> list[int]:
    """Positions of the rows that no other is better than in something and worse in nothing."""
    if not values:
        return []
    return [int(i) for i in np.flatnonzero(_fast_non_domination_rank(np.asarray(values, dtype=float)) == 0)]
