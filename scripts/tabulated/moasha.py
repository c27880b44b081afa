"""Syne Tune's MOASHA on a table of curves: a process of Syne Tune's own environment; nothing of saeopt is imported.

stdin, a line of JSON per repetition: `curves` (a list of [[l0, fvu], …] per cell, null where a value is not finite),
`workers`, `grace`, `factor`, `seed`, `steps` (most reports in all). stdout, a line each: a list of [reports so far,
cell, its own reports] of the trials that came to their end or were stopped. The library's scheduler decides; here it is
only asked and told. `workers` trials advance together, a report each in turn, as trials of one device would; a cell
that has been tried is not tried again.
"""

import datetime
import json
import random
import sys
from typing import Any

import numpy as np
from syne_tune.backend.trial_status import Trial
from syne_tune.config_space import choice
from syne_tune.optimizer.scheduler import SchedulerDecision
from syne_tune.optimizer.schedulers.multiobjective.moasha import MOASHA

BAD = 1e9


def replay(asked: dict[str, Any]) -> list[list[int]]:
    """The ended trials."""
    curves, length = asked["curves"], max(len(curve) for curve in asked["curves"])
    random.seed(asked["seed"])
    np.random.seed(asked["seed"])  # the library draws from it besides its own
    scheduler = MOASHA(
        {"cell": choice(list(range(len(curves))))}, ["l0", "fvu"], time_attr="report", max_t=length,
        grace_period=asked["grace"], reduction_factor=asked["factor"], random_seed=asked["seed"],
    )  # fmt: skip
    seen, running, ended = set[int](), list[list[Any]](), list[list[int]]()
    reports = number = 0
    while reports < asked["steps"]:
        while len(running) < asked["workers"] and len(seen) < len(curves):
            cell = scheduler.suggest().config["cell"]
            if cell in seen:
                continue
            seen.add(cell)
            trial = Trial(number, {"cell": cell}, datetime.datetime.now())
            scheduler.on_trial_add(trial)
            running.append([trial, cell, 0])
            number += 1
        if not running:
            break
        for entry in list(running):
            trial, cell, step = entry
            entry[2] = step = step + 1
            reports += 1
            values = [BAD if v is None else v for v in curves[cell][step - 1]]
            result = {"report": step, "l0": values[0], "fvu": values[1]}
            if step == len(curves[cell]):
                scheduler.on_trial_complete(trial, result)
            elif scheduler.on_trial_result(trial, result) == SchedulerDecision.CONTINUE:
                continue
            running.remove(entry)
            ended.append([reports, cell, step])
    return ended


for line in sys.stdin:
    sys.stdout.write(json.dumps(replay(json.loads(line))) + "\n")
    sys.stdout.flush()
