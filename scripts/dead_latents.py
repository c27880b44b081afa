"""How many latents are dead at the end of a run, for several architectures and settings at once, as a table.

All SAEs are trained as one pack on one stream: every architecture under every variant at every hook point. Dead is
what fired on none of the last `--silent` training tokens (the counter that every weights file holds). Example:

    python scripts/dead_latents.py --model ../shared/models/stories260K --out output/dead \\
        --data ../shared/data/tinystories-1000/tinystories_1000.txt --types relu topk --l0 16 \\
        --positions blocks.2.hook_resid_pre --variant recipe2:recipe=2 --variant recipe3:recipe=3
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import product
from math import exp, log
from pathlib import Path
from typing import Any

from numpy import interp

from saeopt.config import RunConfig, apply_overrides, load_run_config
from saeopt.config.io import parse_override
from saeopt.files import write_json
from saeopt.runs.weights import load_run
from saeopt.saes.registry import ARCHITECTURES, sae_config_class
from saeopt.training import TrialPlan, train_pack
from saeopt.training.launch import make_runtime

BASE = Path(__file__).resolve().parents[1] / "configs" / "stories260k" / "stories260k-relu.yaml"
"""Of this only what is not the SAE's: every architecture has the defaults of its fields."""


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("--model", required=True, help="a Hugging Face directory")
    parser.add_argument("--data", required=True, help="text, as data.dataset_name takes it")
    parser.add_argument("--positions", nargs="+", required=True)
    parser.add_argument("--types", nargs="+", default=list(ARCHITECTURES), help="all, where nothing is said")
    parser.add_argument("--l0", nargs="+", type=float, default=[16.0], help="targets; several: a front per variant")
    parser.add_argument(
        "--variant",
        action="append",
        required=True,
        metavar="NAME:FIELD=VALUE,…",
        help="settings to try; fields that an architecture does not have are left out for it",
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="for all of them")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=512, help="tokens per step")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--ratio", type=float, default=32)
    parser.add_argument("--silent", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0, help="of the data's order")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the SAEs: the table has their means")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def jobs(given: argparse.Namespace) -> Iterator[tuple[dict[str, Any], RunConfig]]:
    """What every run is, and its config."""
    raw = load_run_config(BASE).model_dump(mode="json", exclude_unset=True, exclude={"as_typed", "saes", "recipe"})
    given.out.mkdir(parents=True, exist_ok=True)
    for sae_type, text, seed, l0 in product(given.types, given.variant, given.seeds, given.l0):
        name, _, fields = text.partition(":")
        changes = {"seed": seed, "saes.sae_type": sae_type, "saes.target_l0": l0}
        changes |= dict(parse_override(field) for field in fields.split(",") if field)
        known = {f"saes.{field}" for field in sae_config_class(sae_type).model_fields}
        changes = {key: value for key, value in changes.items() if not key.startswith("saes.") or key in known}
        path = given.out / f"{name}-{sae_type}-{seed}-{l0:g}.json"
        path.write_text(json.dumps(apply_overrides(raw, common(given) | changes)), encoding="utf-8")
        yield {"type": sae_type, "variant": name, "seed": seed, "target": l0}, load_run_config(path)


def common(given: argparse.Namespace) -> dict[str, Any]:
    """What all runs have."""
    samples = given.tokens // given.context
    return {
        "tlens_model_path": given.model, "save_dir": str(given.out), "save_every_n_samples": 0,
        "data.seed": given.seed, "data.dataset_name": given.data, "data.context_length": given.context,
        "data.n_train_samples": samples, "data.n_eval_samples": 100, "warmup_samples": samples // 100,
        "data.train_batch_size": given.batch // given.context, "saes.sae_positions": given.positions,
        "saes.dict_size_to_input_ratio": given.ratio, **dict(map(parse_override, given.set)),
    }  # fmt: skip


def rows(given: argparse.Namespace) -> list[Any]:
    """Train, and measure every SAE."""
    plans = []
    for number, (what, config) in enumerate(jobs(given)):
        plans.append((what, TrialPlan(f"run-{number}", config, given.out / f"run-{number}")))
    results = train_pack([plan for _, plan in plans], make_runtime(given.device))
    found: list[Any] = []
    for what, plan in plans:
        for hook, sae in load_run(plan.run_dir)[1].items():
            metrics = results[plan.name].evaluation.get(hook, {})
            dead = (sae.tokens_since_fired >= given.silent).double().mean().item()
            numbers = {key: metrics.get(key) for key in ("l0", "fvu", "ce_recovered", "gamma")}
            found.append({**what, "hook": hook, "dead": dead, **numbers})
    return found


def table(found: list[Any]) -> str:
    """Markdown: a line per architecture, variant and target, a column per hook point: dead share (L0, FVU)."""
    hooks = list(dict.fromkeys(row["hook"] for row in found))
    lines = [f"| | | | {' | '.join(hooks)} |", "| --- | --- | --- |" + " --- |" * len(hooks)]
    for line in dict.fromkeys((row["type"], row["variant"], row["target"]) for row in found):
        cells = []
        for hook in hooks:
            same = [r for r in found if (r["type"], r["variant"], r["target"], r["hook"]) == (*line, hook)]
            dead, l0, fvu = (sum(r[key] for r in same) / len(same) for key in ("dead", "l0", "fvu"))
            cells.append(f"{dead:.1%} ({l0:.1f}, {fvu:.4f})")
        lines.append(f"| {line[0]} | {line[1]} | {line[2]:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def at_equal_l0(found: list[Any]) -> str:
    """Each variant's FVU in units of the first one's at the L0 that the first one's middle target gave, per seed."""
    variants = list(dict.fromkeys(row["variant"] for row in found))
    lines = ["", f"FVU over {variants[0]}'s at equal L0, mean over seeds (least … most):"]
    for sae_type, hook in dict.fromkeys((row["type"], row["hook"]) for row in found):
        fronts: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for row in found:
            if (row["type"], row["hook"]) == (sae_type, hook):
                fronts.setdefault((row["variant"], row["seed"]), []).append((log(row["l0"]), log(row["fvu"])))
        for variant in variants[1:]:
            ratios = []
            for seed in dict.fromkeys(row["seed"] for row in found):
                first, other = (sorted(fronts[name, seed]) for name in (variants[0], variant))
                at, fvu = first[len(first) // 2]
                l0s, fvus = [l0 for l0, _ in other], [value for _, value in other]
                ratios.append(exp(float(interp(at, l0s, fvus)) - fvu))
            mean = sum(ratios) / len(ratios)
            lines.append(f"{sae_type} {hook} {variant}: {mean:.3f} ({min(ratios):.3f} … {max(ratios):.3f})")
    return "\n".join(lines)


def main() -> None:
    """Print the table and keep the numbers beside the runs."""
    given = options()
    found = rows(given)
    write_json(given.out / f"dead-{given.seed}.json", found)
    sys.stdout.write(table(found) + "\n")
    if len(given.l0) > 1:
        sys.stdout.write(at_equal_l0(found) + "\n")


if __name__ == "__main__":
    main()
