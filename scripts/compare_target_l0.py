"""`saes.target_l0` beside a front of constant λ: how far L0 is off on held-out text, and what it costs in FVU.

Per architecture, one pack: every target and every λ of the front, each with every seed, on one stream. FVU is compared
with the front of the same seed at the L0 that came out (ln L0 against ln FVU, monotone cubic: straight pieces lie below
a front that bends; nothing beyond its ends). `OUT/result.json` and the table are written after every architecture.

    python scripts/compare_target_l0.py --model ../shared/models/stories260K --out output/target-l0 \\
        --data ../shared/data/tinystories-1000/tinystories_1000.json --train 100:1000 --held-out 0:100 --seeds 21 22 23
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator

from saeopt.config import RunConfig, apply_overrides, load_run_config
from saeopt.config.io import parse_override
from saeopt.files import write_json
from saeopt.saes.registry import sae_config_class
from saeopt.training import TrialPlan, train_pack
from saeopt.training.launch import make_runtime

BASE = Path(__file__).resolve().parents[1] / "configs" / "stories260k" / "stories260k-relu.yaml"
"""Of this only what is not the SAE's: every architecture has the defaults of its fields."""
FRONT = {
    "relu": (0.11, 0.16, 0.24, 0.36, 0.54, 0.8, 1.2),
    "gated": (0.36, 0.54, 0.8, 1.2, 1.8, 2.6),
    "jumprelu": (0.015, 0.025, 0.04, 0.065, 0.1, 0.17, 0.3),
    "hard_concrete": (0.06, 0.09, 0.14, 0.22, 0.35, 0.55),
    "gated_hard_concrete": (0.04, 0.07, 0.12, 0.2, 0.33, 0.55),
}
"""λ at d 64."""


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="a Hugging Face directory")
    add("--data", required=True, help="documents, as data.dataset_name takes them")
    add("--held-data", help="documents held out; default: --data")
    add("--train", default="100:1000", metavar="A:B", help="documents to train on")
    add("--held-out", default="0:100", metavar="A:B", help="documents held out")
    add("--hook", default="blocks.2.hook_resid_pre")
    add("--types", nargs="+", default=list(FRONT))
    add("--l0", nargs="+", type=float, default=[8.0, 16.0, 32.0])
    add("--front", action="append", default=[], metavar="TYPE=λ,λ,…", help="instead of the λ of stories260K")
    add("--no-front", action="store_true", help="targets alone")
    add("--seeds", nargs="+", type=int, default=[21, 22, 23])
    add("--tokens", type=int, default=1_203_200)
    add("--batch", type=int, default=512, help="tokens per step")
    add("--lr", type=float, default=5e-3)
    add("--ratio", type=float, default=8)
    add("--held-out-samples", type=int, default=150)
    add("--recipe", type=int, default=3)
    add("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="for all of them")
    add("--device", default="auto")
    add("--out", type=Path, required=True)
    return parser.parse_args()


def jobs(given: argparse.Namespace, sae_type: str) -> Iterator[tuple[dict[str, Any], RunConfig]]:
    """What every run of an architecture is, and its config."""
    raw = load_run_config(BASE).model_dump(mode="json", exclude_unset=True, exclude={"as_typed", "saes", "recipe"})
    own = dict(text.split("=") for text in given.front)
    front = tuple(map(float, own[sae_type].split(","))) if sae_type in own else FRONT[sae_type]
    known = {f"saes.{field}" for field in sae_config_class(sae_type).model_fields}
    wanted = [("target_l0", value) for value in given.l0]
    wanted += [] if given.no_front else [("sparsity_coeff", value) for value in front]
    for seed in given.seeds:
        for field, value in wanted:
            changes = common(given) | {"seed": seed, "saes.sae_type": sae_type, f"saes.{field}": value}
            changes = {key: v for key, v in changes.items() if not key.startswith("saes.") or key in known}
            path = given.out / f"{sae_type}-{field}-{value:g}-{seed}.json"
            path.write_text(json.dumps(apply_overrides(raw, changes)), encoding="utf-8")
            yield {"type": sae_type, "seed": seed, field: value}, load_run_config(path)


def common(given: argparse.Namespace) -> dict[str, Any]:
    """What all runs have."""
    samples = given.tokens // 128
    return {
        "tlens_model_path": given.model, "save_dir": str(given.out), "save_every_n_samples": 0, "recipe": given.recipe,
        "lr": given.lr, "warmup_samples": samples // 100, "data.dataset_name": given.data,
        "data.split": f"train[{given.train}]", "data.eval_dataset_name": given.held_data or given.data,
        "data.eval_split": f"train[{given.held_out}]", "data.context_length": 128, "data.n_train_samples": samples,
        "data.n_eval_samples": given.held_out_samples, "data.train_batch_size": given.batch // 128,
        "saes.sae_positions": [given.hook], "saes.dict_size_to_input_ratio": given.ratio,
        **dict(map(parse_override, given.set)),
    }  # fmt: skip


def trained(given: argparse.Namespace, sae_type: str) -> list[dict[str, Any]]:
    """One pack; a row per SAE."""
    plans = []
    for number, (what, config) in enumerate(jobs(given, sae_type)):
        name = f"{sae_type}-{number}"
        plans.append((what, TrialPlan(name, config, given.out / "runs" / name)))
    results = train_pack([plan for _, plan in plans], make_runtime(given.device))
    rows = []
    for what, plan in plans:
        result = results[plan.name]
        (measured,) = result.evaluation.values() or ({},)
        numbers = {key: measured.get(key) for key in ("l0", "fvu", "ce_recovered", "fraction_dead", "gamma")}
        rows.append({**what, **numbers, **path_of(plan.run_dir), "said": result.reason})
    return rows


def path_of(run_dir: Path) -> dict[str, Any]:
    """λ and L0 in training, at 40 places of the run."""
    lines = (json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    rows = [(row["samples"], row.get("sparsity_coeff"), row["l0"]) for row in lines if "grad_norm" in row]
    kept = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, 40).astype(int))] if rows else []
    return {"path": [[n, coeff and float(f"{coeff:.4g}"), float(f"{l0:.4g}")] for n, coeff, l0 in kept]}


def above_front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per architecture and target: L0 off by, and FVU over the front, of each seed; how far its seeds are apart."""
    found = []
    for sae_type, target in dict.fromkeys((r["type"], r["target_l0"]) for r in rows if "target_l0" in r):
        own = [r for r in rows if r["type"] == sae_type and r.get("target_l0") == target]
        curves = {r["seed"]: curve([p for p in rows if p["type"] == sae_type and p["seed"] == r["seed"]]) for r in own}
        above = [r["fvu"] / math.exp(curves[r["seed"]](math.log(r["l0"]))) - 1 for r in own]
        at_target = [math.exp(curve(math.log(target))) for curve in curves.values()]
        spread = max(at_target) / min(at_target) - 1 if len(at_target) > 1 else math.nan
        what = {"type": sae_type, "target": target, "front_spread": spread, "dead": [r["fraction_dead"] for r in own]}
        found.append(what | {"l0_off": [r["l0"] / target - 1 for r in own], "fvu_above": above})
    return found


def curve(rows: list[dict[str, Any]]) -> Any:
    """ln L0 → ln FVU through the SAEs of constant λ; NaN beyond them."""
    points = sorted((math.log(r["l0"]), math.log(r["fvu"])) for r in rows if "target_l0" not in r and r["l0"])
    if len(points) < 2:
        return lambda at: math.nan
    return PchipInterpolator(*zip(*points, strict=True), extrapolate=False)


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| | target | L0 off by, % | FVU above the front, % (its seeds) | met |", "| --- " * 5 + "|"]
    for row in found:
        off, above, spread = row["l0_off"], float(np.mean(row["fvu_above"])), row["front_spread"]
        met = max(map(abs, off)) <= 0.05, above <= max(0.01, 0 if math.isnan(spread) else spread)
        lines.append(
            f"| {row['type']} | {row['target']:g} | {100 * min(off):+.1f} … {100 * max(off):+.1f} | {100 * above:+.1f}"
            f" ({100 * spread:.1f}) | {' '.join('yes' if m else 'no' for m in met)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Train, write, print."""
    given = options()
    given.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for sae_type in given.types:
        started = time.perf_counter()
        rows += trained(given, sae_type)
        found = above_front(rows)
        write_json(given.out / "result.json", {"summary": found, "rows": rows})
        sys.stdout.write(f"{sae_type}: {time.perf_counter() - started:.0f} s\n{table(found)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
