#!/usr/bin/env python
"""What halving saves: a study trained twice, without early stopping and with halving, on the same devices in turn, or
at the same time on two that are alike.

    python scripts/bench_halving.py studies/smollm2-halving.yaml --devices cuda:0
    python scripts/bench_halving.py FILE --set data.n_train_samples=2000 --rounds 3
    python scripts/bench_halving.py FILE --devices cuda:0 --beside cuda:1

Both are made by `saeopt study create` and trained by `saeopt worker`. Told are trials per device-hour (a trial that was
stopped or paused until the end counts as one, as it does for whoever searches), and the hypervolume of each site's
front over (log L0, FVU) up to (log h, 1), of held-out evaluations.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from rich.table import Table

from saeopt.config.io import apply_overrides, parse_override
from saeopt.config.study import StudySpec
from saeopt.config.study_file import load_study_spec
from saeopt.console import console, set_up_logging
from saeopt.errors import UserError, fail
from saeopt.runs.folder import RunFolder
from saeopt.runs.tensor_file import read_metadata
from saeopt.trials import internals as db
from saeopt.trials.attributes import RUN_DIR
from saeopt.trials.internals import queries
from saeopt.trials.storage import Store
from saeopt.views.points import fronts, hypervolume, study_points
from saeopt.views.spending import spending

REPOSITORY = Path(__file__).resolve().parents[1]
ARMS = ("without", "halving")


@dataclass(frozen=True)
class Outcome:
    """How one study went."""

    arm: str
    wall_s: float
    """From the worker's start to its end."""
    device_s: float
    """While packs held a device: loading, compiling and evaluation included."""
    tokens: float
    trials: int
    complete: int
    volumes: dict[str, float]
    """Site → hypervolume of its front."""


def train(arm: str, spec: StudySpec, folder: Path, devices: str) -> Outcome:
    """Create the study of an arm, train it to its end, and read how it went."""
    folder.mkdir(parents=True)
    raw = spec.model_dump(mode="json", by_alias=True, exclude_unset=True) | {"name": arm, "output_dir": str(folder)}
    given = raw.get("early_stopping") if spec.early_stopping.type == "halving" else {"type": "halving"}
    raw["early_stopping"] = given if arm == "halving" else {"type": "none"}
    (folder / "study.yaml").write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    url = f"sqlite:///{folder}/study.db"
    caches = {name: str(folder / "cache") for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}  # both cold
    path = {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path[1:]])}
    environment = os.environ | {"SAEOPT_STORAGE": url} | caches | path
    saeopt = [sys.executable, "-m", "saeopt"]
    subprocess.run([*saeopt, "study", "create", str(folder / "study.yaml")], env=environment, check=True)
    started = time.perf_counter()
    subprocess.run([*saeopt, "worker", arm, "--devices", devices], env=environment, check=True)
    wall = time.perf_counter() - started
    store = Store.open(url)
    study_id = store.study_id(arm)
    with store.read() as connection:
        counts = db.counts(connection, study_id)
    spent = spending(store, study_id, spec).account.spent
    return Outcome(
        arm,
        wall,
        3600 * spent.get("gpu_hours", 0.0),
        spent.get("tokens", 0.0),
        sum(counts[state] for state in ("COMPLETE", "PRUNED", "FAIL")),
        counts["COMPLETE"],
        volumes(store, study_id, spec),
    )


def volumes(store: Store, study_id: int, spec: StudySpec) -> dict[str, float]:
    """Site → hypervolume of its front over (log L0, FVU) up to (log h, 1); an L0 under 1 counts as 1."""
    rows = [row for row in queries.trial_rows(store.engine, study_id) if row.state == "COMPLETE"]
    newest = RunFolder(Path(rows[0].attributes[RUN_DIR]))
    about: Any = read_metadata(newest.weights_path(newest.weights()[0]))["hook_points"]
    found = fronts(study_points(store.engine, study_id, spec))
    return {
        site: hypervolume([(math.log(max(p["l0"], 1.0)), p["fvu"]) for p in front], (math.log(about[site]["h"]), 1.0))
        for site, front in found.items()
    }


def report(outcomes: Sequence[Outcome]) -> None:
    """Medians over the rounds, and what halving is to the study without."""
    table = Table(title="medians over the rounds", title_justify="left")
    for name in ("study", "wall", "device", "trials/device-hour", "trained to the end", "tokens", "hypervolume"):
        table.add_column(name, justify="left" if name == "study" else "right")
    rates, areas = {}, {}
    for arm in ARMS:
        own = [one for one in outcomes if one.arm == arm]
        wall, device, tokens = (median(getattr(one, name) for one in own) for name in ("wall_s", "device_s", "tokens"))
        rates[arm] = median(3600 * one.trials / one.device_s for one in own)
        areas[arm] = median(sum(one.volumes.values()) for one in own)
        complete = " ".join(f"{one.complete}/{one.trials}" for one in own)
        row = [f"{wall:.0f} s", f"{device:.0f} s", f"{rates[arm]:.0f}", complete, f"{tokens:.3g}", f"{areas[arm]:.4f}"]
        table.add_row(arm, *row)
    console.print(table)
    for site in outcomes[0].volumes:
        area = {arm: median(one.volumes[site] for one in outcomes if one.arm == arm) for arm in ARMS}
        console.print(f"{site}: {area['halving'] / area['without']:.1%} of the hypervolume")
    ratio = rates["halving"] / rates["without"]
    console.print(
        f"halving: {ratio:.2f} x the trials per device-hour, {areas['halving'] / areas['without']:.1%} in all"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="a study file; its early_stopping counts where it is halving")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change the base config")
    parser.add_argument("--devices", default="auto", help="as for saeopt worker")
    parser.add_argument("--beside", help="train the study without early stopping there, at the same time")
    parser.add_argument("--rounds", type=int, default=1, help="how often both are trained, in turn")
    parser.add_argument("--folder", type=Path, default=Path("output/bench-halving"), help="must not be there yet")
    options = parser.parse_args()
    if options.folder.exists():
        raise UserError(f"--folder {options.folder}: is there already: name a new folder, or remove it")
    spec = load_study_spec(options.study)
    base = apply_overrides(spec.base, dict(map(parse_override, options.set)))
    spec = spec.model_copy(update={"base": base})
    outcomes: list[Outcome] = []
    for number in range(options.rounds):
        jobs = {
            arm: (spec, options.folder.resolve() / f"{number}-{arm}", options.devices)
            for arm in (ARMS if number % 2 == 0 else reversed(ARMS))
        }
        if options.beside is not None:
            jobs["without"] = (*jobs["without"][:2], options.beside)
        with ThreadPoolExecutor(1 if options.beside is None else 2) as pool:
            for done in as_completed([pool.submit(train, arm, *job) for arm, job in jobs.items()]):
                outcomes.append(done.result())
                told = json.dumps([asdict(one) for one in outcomes], indent=1)
                (options.folder / "outcomes.json").write_text(told, encoding="utf-8")
    report(outcomes)


if __name__ == "__main__":
    set_up_logging()
    try:
        main()
    except UserError as error:
        fail(str(error))
    except subprocess.CalledProcessError as error:  # it has said what is wrong
        sys.exit(error.returncode)
