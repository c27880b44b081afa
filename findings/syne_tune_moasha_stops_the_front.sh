#!/usr/bin/env bash
# Syne Tune 0.16.0: MOASHA stops trials that no other trial dominates.
#
# Multi-objective ASHA (Schmucker et al., arXiv 2106.12639) sorts the trials at a rung by non-dominated sorting and lets
# the first 1 / reduction_factor of them go on. Of trials that trade one objective for the other (a grid of sparsities
# over L0 and FVU) nearly all are on the front, and a front of more than a third of the trials is cut all the same,
# whatever the order within it. So the front that was asked for has gaps, which depend on the order in which trials
# came. Below, nine trials that are all on the front report at the first rung, one after another: most of
# them are stopped for good although none beats them.
#
# Output seen:
#   stopped although nobody dominates them: 6 of 9
# Exit code 1 when no trial of the front is stopped any more.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q "syne-tune==0.16.0" "numpy<3" "pandas<3"
cd "$folder"
"$folder/env/bin/python" - <<'PYTHON' 2>/dev/null
import datetime
import random
import sys

import numpy as np
from syne_tune.backend.trial_status import Trial
from syne_tune.config_space import choice
from syne_tune.optimizer.scheduler import SchedulerDecision
from syne_tune.optimizer.schedulers.multiobjective.moasha import MOASHA

random.seed(0)
np.random.seed(0)
scheduler = MOASHA(
    {"cell": choice(list(range(9)))}, ["a", "b"], time_attr="epoch", max_t=9, grace_period=1, reduction_factor=3, random_seed=0
)
stopped = 0
for number, a in enumerate([4, 0, 8, 2, 6, 1, 7, 3, 5]):
    trial = Trial(number, {"cell": number}, datetime.datetime.now())
    scheduler.on_trial_add(trial)
    decision = scheduler.on_trial_result(trial, {"epoch": 1, "a": float(a), "b": float(8 - a)})
    stopped += decision == SchedulerDecision.STOP
print(f"stopped although nobody dominates them: {stopped} of 9")
sys.exit(0 if stopped else 1)
PYTHON
