"""How many latents are dead at the end of a run, for several architectures and settings at once, as a table.

All SAEs are trained as one pack on one stream: every architecture under every variant at every hook point. Dead is
what fired on none of the last `--silent` training tokens (the counter that every weights file holds). Example:

    python scripts/dead_latents.py --model ../shared/models/stories260K --out output/dead \\
        --data ../shared/data/tinystories-1000/tinystories_1000.txt --types relu topk \\
        --positions blocks.2.hook_resid_pre --variant recipe2:recipe=2 --variant recipe3:recipe=3
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saeopt.config import RunConfig, apply_overrides, load_run_config
from saeopt.config.io import parse_override
from saeopt.files import write_json
from saeopt.runs.weights import load_run
from saeopt.training import TrialPlan, train_pack
from saeopt.training.launch import make_runtime

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "stories260k"
TYPES = ("relu", "gated", "hard_concrete", "gated_hard_concrete", "topk")


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("--model", required=True, help="a Hugging Face directory")
    parser.add_argument("--data", required=True, help="text, as data.dataset_name takes it")
    parser.add_argument("--positions", nargs="+", required=True)
    parser.add_argument(
        "--types",
        nargs="+",
        default=list(TYPES),
        help="each starts from configs/stories260k (those that have no file there: topk's or relu's)",
    )
    parser.add_argument(
        "--variant",
        action="append",
        required=True,
        metavar="NAME:FIELD=VALUE,…",
        help="settings to try; fields that an architecture does not have are left out for it",
    )
    parser.add_argument("--sparsity", nargs="*", default=[], metavar="TYPE=VALUE", help="λ, or k of a selection")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="for all of them")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=512, help="tokens per step")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--ratio", type=float, default=32)
    parser.add_argument("--silent", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def jobs(given: argparse.Namespace) -> Iterator[tuple[str, str, RunConfig]]:
    """Variant, architecture and config of every run."""
    sparsity = dict(item.split("=") for item in given.sparsity)
    for sae_type in given.types:
        base = CONFIGS / f"stories260k-{sae_type}.yaml"
        if not base.exists():
            base = CONFIGS / f"stories260k-{'topk' if 'topk' in sae_type else 'relu'}.yaml"
        common: dict[str, Any] = {
            "tlens_model_path": given.model, "save_dir": str(given.out), "save_every_n_samples": 0,
            "seed": given.seed, "data.seed": given.seed, "data.dataset_name": given.data,
            "data.context_length": given.context, "data.n_train_samples": given.tokens // given.context,
            "data.n_eval_samples": 100, "data.train_batch_size": given.batch // given.context,
            "saes.sae_positions": given.positions, "saes.dict_size_to_input_ratio": given.ratio,
            "warmup_samples": given.tokens // given.context // 100,
        }  # fmt: skip
        common |= dict(map(parse_override, given.set))
        if sae_type in sparsity:
            field = "saes.k" if "topk" in sae_type else "saes.sparsity_coeff"
            common[field] = float(sparsity[sae_type])
        config = load_run_config(base, [f"saes.sae_type={sae_type}"])
        raw = config.model_dump(mode="json", exclude_unset=True, exclude={"as_typed"})
        known = {f"saes.{name}" for name in type(config.saes).model_fields}
        for text in given.variant:
            name, _, fields = text.partition(":")
            changes = dict(parse_override(field) for field in fields.split(",") if field)
            changes = {k: v for k, v in changes.items() if not k.startswith("saes.") or k in known}
            for field in ("normalize_activations", "init"):  # what the base's recipe wrote out
                raw["saes"].pop(field, None)
            given.out.mkdir(parents=True, exist_ok=True)
            path = given.out / f"{name}-{sae_type}.json"
            path.write_text(json.dumps(apply_overrides(raw, common | changes)), encoding="utf-8")
            yield name, sae_type, load_run_config(path)


def rows(given: argparse.Namespace) -> list[Any]:
    """Train, and measure every SAE."""
    plans = {f"{v}-{t}": (v, t, TrialPlan(f"{v}-{t}", c, given.out / f"{v}-{t}")) for v, t, c in jobs(given)}
    results = train_pack([plan for _, _, plan in plans.values()], make_runtime(given.device))
    found: list[Any] = []
    for name, (variant, sae_type, plan) in plans.items():
        for hook, sae in load_run(plan.run_dir)[1].items():
            metrics = results[name].evaluation.get(hook, {})
            dead = (sae.tokens_since_fired >= given.silent).double().mean().item()
            numbers = {key: metrics.get(key) for key in ("l0", "fvu", "ce_recovered", "gamma")}
            found.append({"variant": variant, "type": sae_type, "hook": hook, "dead": dead, **numbers})
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a line per architecture and variant, a column per hook point: dead share (L0, FVU)."""
    hooks = list(dict.fromkeys(row["hook"] for row in found))
    lines = [f"| | | {' | '.join(hooks)} |", "| --- | --- |" + " --- |" * len(hooks)]
    for sae_type, variant in dict.fromkeys((row["type"], row["variant"]) for row in found):
        cells = []
        for hook in hooks:
            row = next(r for r in found if (r["type"], r["variant"], r["hook"]) == (sae_type, variant, hook))
            cells.append(f"{row['dead']:.1%} ({row['l0']:.1f}, {row['fvu']:.3f})")
        lines.append(f"| {sae_type} | {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table and keep the numbers beside the runs."""
    given = options()
    found = rows(given)
    write_json(given.out / f"dead-{given.seed}.json", found)
    sys.stdout.write(table(found) + "\n")


if __name__ == "__main__":
    main()
