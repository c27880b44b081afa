"""Optuna's ASHA and Syne Tune's MOASHA on a table."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import optuna

from saeopt.search.space import Space, key_of
from tabulated.curves import Log, Pair, Tabulated


def optuna_asha(table: Tabulated, seed: int, first_report: int, factor: int, share: float) -> Log:
    """Optuna's own loop: TPE and SuccessiveHalvingPruner, which take one value: the box that an SAE dominates alone,
    (log h - log L0) (1 - FVU), of which the hypervolume is made; larger is better. Trials run one after another."""
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=first_report, reduction_factor=factor),
    )
    space, log, seen = Space(table.spec), Log(table), set[str]()
    while log.spent < share * table.tokens and len(seen) < len(table.curves):
        trial = study.ask()
        curve = table.curve(params := space.suggest(trial))
        if key_of(params) in seen:  # not trained twice: it is told what came of it before, as a user would
            study.tell(trial, _box(table, curve.final))
            if trial.number > 3 * len(table.curves):
                break
            continue
        seen.add(key_of(params))
        before, stopped = 0, False
        for step, (samples, pair) in enumerate(zip(curve.samples, curve.values, strict=True), 1):
            trial.report(_box(table, pair), step)
            log.spent, before = log.spent + samples - before, samples
            stopped = step < len(curve.samples) and trial.should_prune()
            if stopped:
                break
        study.tell(trial, _box(table, curve.values[step - 1] if stopped else curve.final))
        if stopped:
            log.stopped.append((log.spent, curve.values[step - 1]))
        else:
            log.ended.append((log.spent, curve.final))
    return log


def _box(table: Tabulated, pair: Pair | None) -> float:
    if pair is None or not all(map(math.isfinite, pair)):
        return -1.0
    return (table.reference[0] - math.log(max(pair[0], 1.0))) * (table.reference[1] - pair[1])


class Moasha:
    """A process in Syne Tune's environment, asked once per repetition."""

    def __init__(self, python: Path) -> None:
        script = Path(__file__).with_name("moasha.py")
        self.process = subprocess.Popen(
            [str(python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, table: Tabulated, seed: int, workers: int, grace: int, factor: int, share: float) -> Log:
        """One repetition."""
        curves, log = list(table.curves.values()), Log(table)
        spacing = table.total / max(len(curve.samples) for curve in curves)
        asked = {
            "curves": [[[v if math.isfinite(v) else None for v in pair] for pair in curve.values] for curve in curves],
            "workers": workers,
            "grace": grace,
            "factor": factor,
            "seed": seed,
            "steps": int(share * table.tokens / spacing),
        }
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        for reports, cell, step in json.loads(self.process.stdout.readline()):
            whole, log.spent = step == len(curves[cell].samples), int(reports * spacing)
            ended = log.ended if whole else log.stopped
            ended.append((log.spent, curves[cell].final if whole else curves[cell].values[step - 1]))
        return log
