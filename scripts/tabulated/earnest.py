"""The table's space searched for real: a grid of every cell beside TPE + halving, each a study with its own worker.

    python scripts/compare_search.py earnest --folder output/earnest

Both studies are made by `saeopt study create` from the files that are written to the folder, and trained at the same
time by a `saeopt worker` each, so that both have the same load beside them. While they train, what each has spent and
reached is read from its store.
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
from dataclasses import asdict, dataclass
from typing import Any

import yaml
from rich.table import Table

from saeopt.config.study import StudySpec
from saeopt.console import console
from saeopt.trials.storage import Store
from saeopt.views.points import candidates, hypervolume, study_points
from saeopt.views.status import gather
from tabulated.study import REPOSITORY, WIDTH, base, table_spec

_SECONDS = 3.0
"""Between two looks at a study."""


@dataclass(frozen=True)
class Look:
    """A study at some time."""

    seconds: float
    """Since its worker was started."""
    tokens: float
    ended: int
    volume: float


def specs(options: argparse.Namespace) -> list[StudySpec]:
    """The grid and the search, of the same cells."""
    changes = {"threads": options.threads, "log_every_n_grad_steps": 20}
    config = base(options.shared.resolve(), options.samples, changes)
    config["data"] |= {"context_length": options.context, "n_eval_samples": options.held_out}
    common: dict[str, Any] = {"pack": options.pack, "output_dir": str(options.folder.resolve())}
    search = {
        "early_stopping": {"type": "halving"},
        "sampler": {"type": "tpe", "seed": options.seed},
        "max_trials": options.trials,
    }
    return [
        table_spec(config, options.ratios, **common, **more).model_copy(update={"name": name})
        for name, more in (("grid", {}), ("tpe-halving", search))
    ]


def volume(store: Store, spec: StudySpec, ratios: Sequence[int]) -> float:
    """Hypervolume of the held-out evaluations over (log L0, FVU) up to (log h, 1); an L0 under 1 counts as 1."""
    points = candidates(study_points(store.engine, store.study_id(spec.name), spec))
    pairs = [(math.log(max(p["l0"], 1.0)), p["fvu"]) for p in points]
    return hypervolume(pairs, (math.log(max(ratios) * WIDTH), 1.0))


class Arm:
    """A study, the worker that trains it, and how it went."""

    def __init__(self, spec: StudySpec, options: argparse.Namespace) -> None:
        self.spec, self.options, self.looks = spec, options, list[Look]()
        self.environment = os.environ | {
            "SAEOPT_STORAGE": f"sqlite:///{options.folder.resolve()}/{spec.name}.db",
            "PYTHONPATH": str(REPOSITORY),
        }
        file = options.folder / f"{spec.name}.yaml"
        raw = spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
        file.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
        self._saeopt("study", "create", str(file)).wait()
        self.store = Store.open(self.environment["SAEOPT_STORAGE"])
        self.log = (options.folder / f"{spec.name}.log").open("w", encoding="utf-8")
        self.started = time.monotonic()
        self.worker = self._saeopt("worker", spec.name, "--devices", "cpu", stdout=self.log, stderr=self.log)

    def _saeopt(self, *words: str, **to: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "saeopt", *words], env=self.environment, **to)

    def look(self) -> bool:
        """Note how it stands; whether its worker has ended."""
        seconds, over = time.monotonic() - self.started, self.worker.poll() is not None
        found = gather(self.store, self.spec.name)
        ended, tokens = found.count("COMPLETE"), found.spending.account.spent.get("tokens", 0.0)
        same = bool(self.looks) and self.looks[-1].ended == ended
        reached = self.looks[-1].volume if same else volume(self.store, self.spec, self.options.ratios)
        self.looks.append(Look(seconds, tokens, ended, reached))
        return over


def report(arms: Sequence[Arm]) -> None:
    """Both side by side: to the end, and to 95 and 99 % of what the grid came to."""
    whole = arms[0].looks[-1].volume
    table = Table(title="both trained at the same time, a worker each", title_justify="left")
    for name in ("study", "until", "trained to the end", "tokens", "wall time", "hypervolume"):
        table.add_column(name, justify="left" if name == "study" else "right")
    for arm in arms:
        for share in (0.95, 0.99, None):
            look = arm.looks[-1]
            if share is not None:
                look = next((one for one in arm.looks if one.volume >= share * whole), look)
            reached = share is None or look.volume >= share * whole
            row = [str(look.ended), f"{look.tokens:,.0f}", f"{look.seconds:.0f} s", f"{look.volume:.4f}"]
            table.add_row(
                arm.spec.name, "its end" if share is None else f"{share:.0%}", *(row if reached else ["–"] * 4)
            )
    console.print(table)


def main(options: argparse.Namespace) -> None:
    """Train both and print them; the looks go to `FOLDER/looks.json`."""
    options.folder.mkdir(parents=True, exist_ok=True)
    arms = [Arm(spec, options) for spec in specs(options)]
    left = list(arms)
    while left:
        time.sleep(_SECONDS)
        left = [arm for arm in left if not arm.look()]
    told = {arm.spec.name: [asdict(look) for look in arm.looks] for arm in arms}
    (options.folder / "looks.json").write_text(json.dumps(told), encoding="utf-8")
    report(arms)
