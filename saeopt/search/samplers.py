"""Samplers and pruners of a study as Optuna objects."""

from __future__ import annotations

import hashlib

import optuna

from saeopt.config.study import StudySpec


def trial_seed(seed: int, number: int) -> int:
    """A seed for one trial: two workers never propose the same first trial, and a study can be repeated."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:4], "big")


def make_sampler(spec: StudySpec, number: int, attempt: int = 0) -> optuna.samplers.BaseSampler:
    """Who proposes trial `number`. Collapsed trials are infeasible: their constraints are stored with them."""
    seed = trial_seed(spec.sampler.seed + attempt * 1_000_003, number)
    if attempt > 2:
        return optuna.samplers.RandomSampler(seed=seed)
    startup = max(spec.sampler.n_startup_trials, 1)
    population = max(4, min(50, (spec.max_trials or 50) // 5))
    match spec.sampler.type:
        case "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
        case "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=population)
        case "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
        case "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
        case _:
            return optuna.samplers.RandomSampler(seed=seed)


def n_designed(spec: StudySpec) -> int:
    """How many of the first trials are spread by the quasi-random design instead of being proposed."""
    total = spec.max_trials or 0
    if spec.sampler.type == "qmc":
        return total
    return 0 if spec.sampler.type in ("grid", "random") else min(spec.sampler.n_startup_trials, total)


def n_known(spec: StudySpec) -> int:
    """How many of the first trials have their values from the beginning: those that are given count as spread ones."""
    return max(n_designed(spec), min(spec.n_starts, spec.max_trials or 0))
