"""Repetitions of every search on a table, and what they reach."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from rich.table import Table

from saeopt.config.stopping import EarlyStopping
from saeopt.config.study import StudySpec
from saeopt.console import console, log
from tabulated.curves import Log, Tabulated
from tabulated.others import Moasha, optuna_asha
from tabulated.searches import Search
from tabulated.study import RATIOS, SEEDS
from tabulated.warm import Narrow

LEVELS = [0.9, 0.95, 0.99]
Mode = Callable[[Tabulated, int], Log]


def spec_of(table: Tabulated, sampler: str, seed: int, most: int, halving: dict[str, Any] | None) -> StudySpec:
    """The table's study with a sampler and an early stopping."""
    rule: dict[str, Any] = {"type": "none"} if halving is None else {"type": "halving", **halving}
    raw = table.spec.model_dump(by_alias=True)
    raw |= {"sampler": {"type": sampler, "seed": seed}, "early_stopping": rule, "max_trials": most}
    return StudySpec.model_validate(raw)


def search(table: Tabulated, seed: int, sampler: str, options: Any, halving: dict[str, Any] | None, **more: Any) -> Log:
    """One repetition of a mode of saeopt; promotion begins a third of the cells."""
    most = min(len(table.curves), options.tpe_trials if sampler == "tpe" else len(table.curves))
    if more.get("promote_after"):
        most = max(1, len(table.curves) // 3)
    return Search(table, spec_of(table, sampler, seed, most, halving), options.pack, **more).run(options.budget)


def warm(
    table: Tabulated, seed: int, options: Any, halving: dict[str, Any], narrow: Narrow, *, searched: bool, **which: Any
) -> Log:
    """TPE + halving that starts from a study of the narrow cells: of all of them, which has cost nothing here, or with
    `searched` of what TPE + halving trains there to its end, whose samples count too."""
    most, before, study = min(len(table.curves), options.tpe_trials), 0, "narrow"
    if searched:
        of = narrow.table
        spec = spec_of(of, "tpe", seed, min(len(of.curves), options.tpe_trials), halving)
        first = Search(of, spec, options.pack)
        before, study = first.run(options.budget).spent, f"narrow-{seed}"
        narrow.study(study, [trial.params or {} for trial in first.trials if trial.ended])
    else:
        narrow.study(study)
    search = Search(table, narrow.started(spec_of(table, "tpe", seed, most, halving), study, **which), options.pack)
    search.log.spent = before
    return search.run(options.budget)


def warm_modes(options: Any, halving: dict[str, Any]) -> dict[str, Mode]:
    """The same for searches that start from a study of other widths."""
    narrow = {seed: Narrow(Tabulated(options.table, seed, options.start_ratios)) for seed in options.seeds or SEEDS}

    def mode(searched: bool, **which: Any) -> Mode:
        return lambda t, s: warm(t, s, options, halving, narrow[t.seed], searched=searched, **which)

    return {
        "warm: front": mode(False, front=True),
        f"warm: top {options.start_top}": mode(False, top=options.start_top),
        "both searched": mode(True, front=True),
    }


def modes(options: Any, halving: dict[str, Any]) -> dict[str, Mode]:
    """Name → one repetition."""
    found: dict[str, Mode] = {
        "random": lambda t, s: search(t, s, "random", options, None),
        "TPE": lambda t, s: search(t, s, "tpe", options, None),
        "halving (random)": lambda t, s: search(t, s, "random", options, halving),
        "TPE + halving": lambda t, s: search(t, s, "tpe", options, halving),
        "halving + promotion": lambda t, s: search(t, s, "random", options, halving, promote_after=True),
    }
    if options.start_ratios:
        found |= warm_modes(options, halving)
    first = EarlyStopping(type="halving", **halving).shares[0]

    def reports(table: Tabulated) -> int:
        return max(1, round(first * max(len(c.samples) for c in table.curves.values())))

    found["Optuna ASHA"] = lambda t, s: optuna_asha(t, s, reports(t), options.factor, options.budget)
    if options.syne_tune:
        moasha = Moasha(options.syne_tune)
        found["MOASHA"] = lambda t, s: moasha.run(t, s, options.pack, reports(t), options.factor, options.budget)
    return {name: mode for name, mode in found.items() if not options.only or name in options.only}


def replay(path: Path, options: Any) -> None:
    """Print the table, and a line of JSON per mode to `options.json`."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tables = {seed: Tabulated(path, seed, options.ratios or RATIOS) for seed in options.seeds or SEEDS}
    halving = {"rungs": options.rungs, "keep": options.keep} if options.rungs else {"keep": options.keep}
    halving = {name: value for name, value in halving.items() if value is not None}
    shown = Table(title=f"share of the grid's training tokens to a share of its hypervolume; {halving or 'defaults'}")
    for name in ("search", *(f"to {level:.0%}" for level in LEVELS), "volume at 20 %"):
        shown.add_column(name, justify="left" if name == "search" else "right")
    for name, mode in modes(options, halving).items():
        logs = {
            seed: [mode(table, 1000 + r).counted(stopped=options.count_stopped) for r in range(options.repetitions)]
            for seed, table in tables.items()
        }
        row = summary(logs)
        shown.add_row(name, *row["text"])
        log.info("%s: %s", name, "; ".join(row["text"]))
        if options.json:
            with options.json.open("a", encoding="utf-8") as file:
                file.write(
                    json.dumps(
                        {"mode": name, "halving": halving, "pack": options.pack, "stopped_count": options.count_stopped}
                        | row
                    )
                    + "\n"
                )
    console.print(shown)


def summary(logs: dict[int, list[Log]]) -> dict[str, Any]:
    """Per level the median over the repetitions of the mean of the seeds, and the quartiles; the same per seed."""
    shares = {seed: [one.shares(LEVELS) for one in many] for seed, many in logs.items()}
    volumes = {seed: [one.volume_at(0.2) for one in many] for seed, many in logs.items()}
    found: dict[str, Any] = {"levels": LEVELS, "text": [], "per_seed": {}}
    for i in range(len(LEVELS)):
        found["text"].append(
            _spread(
                [statistics.fmean(r) for r in zip(*([s[i] for s in many] for many in shares.values()), strict=True)]
            )
        )
    found["text"].append(_spread([statistics.fmean(r) for r in zip(*volumes.values(), strict=True)]))
    for seed, many in shares.items():
        found["per_seed"][seed] = [_spread([s[i] for s in many]) for i in range(len(LEVELS))] + [_spread(volumes[seed])]
    return found


def _spread(values: list[float]) -> str:
    """Median and quartiles, in percent; a dash where it was not reached."""
    values = sorted(values)
    low, middle, high = (values[round(q * (len(values) - 1))] for q in (0.25, 0.5, 0.75))
    return f"{_percent(middle)} ({_percent(low)}…{_percent(high)})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if math.isfinite(value) else "–"
