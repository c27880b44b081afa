"""A search against the replaced system's grid, under the same budget per trial, on a small real language model.

    python scripts/compare_search.py old-grid                   # 40 trials of TPE and the old grid; prints both
    python scripts/compare_search.py old-grid --samples 1600    # a shorter training of every trial

The search: TPE over λ (0.05 to 10, logarithmic, normalised units) and the dictionary ratio (8, 16, 32), a quasi-random
design first, L0 and FVU as objectives, collapsed trials infeasible. The old grid: its nine λ with its scaling of the
loss terms, at ratio 8 alone and at all three ratios. Everything else (tokens, batch, learning rate, held-out text) is
the same. An SAE has collapsed when L0 < 1 or FVU >= 0.9. A second call goes on where the first ended.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from saeopt.config.study import StudySpec
from saeopt.config.study_file import study_spec
from saeopt.console import console
from saeopt.search.pareto import Point
from saeopt.trials.create import create_study
from saeopt.trials.storage import Store
from saeopt.views.points import candidates, hypervolume, study_points
from saeopt.views.status import gather

REPOSITORY = Path(__file__).resolve().parents[2]
OLD_GRID = [5, 1, 0.5, 0.1, 0.05, 0.01, 0.005, 1e-4, 5e-5]
RATIOS = [8, 16, 32]
REFERENCE_L0, REFERENCE_FVU = 128.0, 0.9
LAMBDA, RATIO = "saes.sparsity_coeff", "saes.dict_size_to_input_ratio"


def specs(options: argparse.Namespace) -> tuple[StudySpec, StudySpec]:
    """The search and the old grid."""
    import yaml

    source = REPOSITORY / "configs" / "stories260k" / "stories260k-relu.yaml"
    base: dict[str, Any] = yaml.safe_load(source.read_text(encoding="utf-8"))
    base |= {"threads": options.threads, "save_every_n_samples": 0, "warmup_samples": options.samples // 20}
    base["tlens_model_path"] = str(options.shared / "models" / "stories260K")
    base["data"]["dataset_name"] = str(options.shared / "data" / "tinystories-1000" / "tinystories_1000.txt")
    base["data"] |= {"n_train_samples": options.samples, "n_eval_samples": 100}
    common = {
        "objectives": [{"metric": "l0"}, {"metric": "fvu"}],
        "output_dir": str(options.folder),
        "pack": options.pack,
    }
    collapse = {"min_l0": 1.0, "max_fvu": 0.9}
    search = {
        "name": f"tpe-{options.samples}",
        "base": base,
        "space": {LAMBDA: {"low": 0.05, "high": 10, "log": True}, RATIO: RATIOS},
        "sampler": {"type": "tpe", "n_startup_trials": 10, "seed": options.seed},
        "early_stopping": {"type": "none", "collapse": collapse},
        "max_trials": options.trials,
    }
    grid = {
        "name": f"old-grid-{options.samples}",
        "base": base | {"legacy_scaling": True},
        "space": {RATIO: RATIOS, LAMBDA: OLD_GRID},
        "early_stopping": {"type": "none", "collapse": None},
    }
    return study_spec({**search, **common}, source), study_spec({**grid, **common}, source)


def train(url: str, spec: StudySpec) -> list[tuple[Point, dict[str, Any]]]:
    """Create the study, run one worker until it is done, return its SAEs with their parameters."""
    from saeopt.views.best import load_points

    store = Store.open(url)
    create_study(store, spec)
    if gather(store, spec.name).remaining:
        command = [sys.executable, "-m", "saeopt.worker", "--study", spec.name, "--devices", "cpu"]
        environment = os.environ | {"SAEOPT_STORAGE": url, "PYTHONPATH": str(REPOSITORY)}
        subprocess.run(command, check=True, env=environment)
    _, trials = load_points(store, spec.name)
    found = [(p, trials[p.label].params) for p in study_points(store.engine, store.study_id(spec.name), spec)]
    store.close()
    return found


def covered(points: Sequence[Point], *, logarithmic: bool) -> float:
    """Hypervolume of the SAEs that have not collapsed, as a share of the box L0 1…128, FVU 0…0.9."""
    scale = math.log if logarithmic else float
    pairs = [(scale(p["l0"]) - scale(1.0), p["fvu"]) for p in candidates(points) if p["l0"] >= 1.0]
    reference = (scale(REFERENCE_L0) - scale(1.0), REFERENCE_FVU)
    return hypervolume(pairs, reference) / (reference[0] * reference[1])


def report(rows: Sequence[tuple[str, int, Sequence[Point]]]) -> None:
    """Trials, share not collapsed, hypervolumes; a trial without an evaluation counts as collapsed."""
    table = Table(title=f"box: L0 1 to {REFERENCE_L0:g}, FVU 0 to {REFERENCE_FVU:g}", title_justify="left")
    table.add_column("study")
    for name in ("trials", "not collapsed", "inside the box", "hypervolume (L0)", "hypervolume (log L0)"):
        table.add_column(name, justify="right")
    for name, n, points in rows:
        usable = candidates(points)
        inside = [p for p in usable if 1.0 <= p["l0"] < REFERENCE_L0]
        shares = [f"{len(usable) / n:.0%}", f"{len(inside) / n:.0%}"] if n else ["–", "–"]
        volumes = [f"{covered(points, logarithmic=flag):.4f}" for flag in (False, True)]
        table.add_row(name, str(n), *shares, *volumes)
    console.print(table)


def main(arguments: Sequence[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser("compare_search.py old-grid", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=9_400, help="training samples of 128 tokens per trial")
    parser.add_argument("--trials", type=int, default=40, help="trials of the search")
    parser.add_argument("--pack", type=int, default=8, help="trials that share one stream")
    parser.add_argument("--seed", type=int, default=0, help="of the sampler")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--folder", type=Path, default=Path("output/compare_search"), help="store and run folders")
    shared = os.environ.get("SAEOPT_SHARED") or REPOSITORY.parent / "shared"
    parser.add_argument("--shared", type=Path, default=Path(shared), help="folder with models/ and data/")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    url = f"sqlite:///{options.folder.resolve()}/studies.db"
    search, grid = specs(options)
    found = [p for p, _ in train(url, search)]
    old = train(url, grid)
    small = [p for p, params in old if params[RATIO] == RATIOS[0]]
    report([
        (f"search ({search.name})", options.trials, found),
        (f"first {len(OLD_GRID)} trials of the search", len(OLD_GRID), [p for p in found if int(p.label[1:]) < 9]),
        ("old grid, ratio 8", len(OLD_GRID), small),
        ("old grid, all ratios", len(OLD_GRID) * len(RATIOS), [p for p, _ in old]),
    ])  # fmt: skip
