"""Fronts from measured SAEs: the learning rate chosen on one half of the held-out text, L0 against error on the other.

A point is one trained SAE with its metrics on both halves. A front is interpolated between the points of one seed and
learning rate, piecewise linear in the logarithms of L0 and of the error (FVU, or 1 − CE recovered), never beyond them.
The learning rate is chosen at each L0, as somebody who wants that L0 would choose it.

    python scripts/peers/fronts.py RESULT.json FOLDER     # table.md and fronts.png again, from a comparison's result
"""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

LEVELS = (4, 6, 8, 12, 16, 24, 32, 48, 64)
Half = Literal["chosen_on", "reported_on"]
Error = Literal["fvu", "ce_lost", "dead", "fraction_dead"]
TITLES: dict[Error, str] = {"fvu": "FVU", "ce_lost": "CE recovered"}
SHARES: tuple[Error, ...] = ("dead", "fraction_dead")
"""Shares of latents that did not fire on the last training tokens, or on the half that is reported; may be 0."""
ERRORS: tuple[Error, ...] = (*TITLES, *SHARES)
METRICS = ("l0", "fvu", "ce_recovered", "dead", "fraction_dead", "cosine", "norm_ratio")
COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#8d6a9f", "#edae49", "#444444")


@dataclass(frozen=True)
class Point:
    """One SAE."""

    system: str
    sae_type: str
    lr: float
    seed: int
    sparsity: float
    metrics: dict[str, dict[str, float]]
    """Half → l0, fvu, ce_recovered, fraction_dead (of the half), dead (of the last training tokens)."""


def error_of(metrics: dict[str, float], error: Error) -> float:
    """What is to be small; NaN where it was not measured."""
    return 1 - metrics.get("ce_recovered", np.nan) if error == "ce_lost" else metrics.get(error, np.nan)


def interpolated(points: list[Point], half: Half, error: Error, levels: tuple[float, ...] = LEVELS) -> np.ndarray:
    """The error at each L0 from the points of one seed; NaN beyond them. Of several at one L0 the best counts."""
    by_l0: dict[float, float] = {}
    for point in points:
        measured = point.metrics[half]
        value, l0 = error_of(measured, error), measured["l0"]
        if l0 > 0 and np.isfinite(value) and (value > 0 or error in SHARES):
            by_l0[l0] = min(value, by_l0.get(l0, np.inf))
    if len(by_l0) < 2:
        return np.full(len(levels), np.nan)
    l0s = np.array(sorted(by_l0))
    errors = np.array([by_l0[l0] for l0 in l0s])
    # a few zeros among the k largest leave the L0 of k = 64 just below 64: the ends reach five percent further
    inside = np.clip(levels, l0s[0], l0s[-1])
    if error in SHARES:
        found = np.interp(np.log(inside), np.log(l0s), errors)
    else:
        found = np.exp(np.interp(np.log(inside), np.log(l0s), np.log(errors)))
    return np.where(np.abs(np.log(inside / np.array(levels))) <= 0.05, found, np.nan)


def by_seed(points: list[Point], half: Half, error: Error) -> np.ndarray:
    """(seeds, levels)."""
    seeds = sorted({p.seed for p in points})
    return np.array([interpolated([p for p in points if p.seed == s], half, error) for s in seeds])


def chosen_lrs(points: list[Point]) -> np.ndarray:
    """For each L0 the learning rate whose front lies lowest there on the half for choosing; NaN where none reaches.

    Judged by the seeds that every learning rate has.
    """
    lrs = sorted({p.lr for p in points})
    seeds = set.intersection(*({p.seed for p in points if p.lr == lr} for lr in lrs))
    points = [p for p in points if p.seed in seeds]
    fronts = np.array([_mean(by_seed([p for p in points if p.lr == lr], "chosen_on", "fvu")) for lr in lrs])
    best = np.where(np.isfinite(fronts), fronts, np.inf).argmin(0)
    return np.where(np.isfinite(fronts).any(0), np.array(lrs)[best], np.nan)


def at_chosen_lrs(points: list[Point]) -> list[Point]:
    """The points that a table shows: each system's and architecture's at the learning rates chosen for some L0."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.system, point.sae_type), []).append(point)
    return [p for group in groups.values() for lrs in [chosen_lrs(group)] for p in group if p.lr in lrs]


def _mean(rows: np.ndarray) -> np.ndarray:
    """Over seeds, where every seed has a value."""
    return rows.mean(0)  # NaN where one is missing


def summary(points: list[Point]) -> dict[str, dict[str, dict[str, Any]]]:
    """Architecture → system → learning rates, fronts with spread (standard deviation over seeds), dead shares."""
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for sae_type in dict.fromkeys(p.sae_type for p in points):
        for system in dict.fromkeys(p.system for p in points if p.sae_type == sae_type):
            own = [p for p in points if p.sae_type == sae_type and p.system == system]
            result.setdefault(sae_type, {})[system] = _entry(own)
    return result


def _entry(own: list[Point]) -> dict[str, Any]:
    chosen, tried = chosen_lrs(own), sorted({p.lr for p in own})
    used = [lr for lr in tried if lr in chosen]
    at_lr = {lr: [p for p in own if p.lr == lr] for lr in used}
    edges = {tried[0], tried[-1]} if len(tried) > 1 else set()
    entry: dict[str, Any] = {"lr": [None if np.isnan(lr) else lr for lr in chosen.tolist()], "levels": list(LEVELS)}
    entry |= {"lr_on_edge": [lr in edges for lr in chosen.tolist()], "seeds": sorted({p.seed for p in own})}
    for error in ERRORS:
        mean, spread = np.full(len(LEVELS), np.nan), np.zeros(len(LEVELS))
        for lr, found in at_lr.items():
            rows = by_seed(found, "reported_on", error)
            mean = np.where(chosen == lr, _mean(rows), mean)
            if len(rows) > 1:
                spread = np.where(chosen == lr, rows.std(0, ddof=1), spread)
        entry[error], entry[error + "_spread"] = mean.tolist(), spread.tolist()
    entry["n_held_out"] = max(p.metrics["reported_on"].get("n_tokens", 0) for p in own)
    return entry


def verdict(entry: dict[str, Any], others: list[dict[str, Any]], error: Error) -> list[str]:
    """Per level: `=` within the spread of the best other, `+` better, `++` by more than twice the spread, `−` worse."""
    found = []
    for i in range(len(LEVELS)):
        rivals = [o for o in others if np.isfinite(o[error][i])]
        if not rivals or not np.isfinite(entry[error][i]):
            found.append("")
            continue
        best = min(rivals, key=lambda o: o[error][i])
        spread = float(np.hypot(entry[error + "_spread"][i], best[error + "_spread"][i]))
        gain = best[error][i] - entry[error][i]
        found.append("++" if gain > 2 * spread else "+" if gain > 0 else "=" if gain >= -spread else "−")
    return found


def markdown(result: dict[str, dict[str, dict[str, Any]]], own: str) -> str:
    """A table per architecture: FVU, CE recovered and dead latents at each L0, mean ± spread."""
    lines = []
    for sae_type, systems in result.items():
        head = " | ".join(f"{level:g}" for level in LEVELS)
        lines += [f"\n**{sae_type}**\n", f"| | {head} |", "| --- " * (len(LEVELS) + 1) + "|"]
        for error, title in TITLES.items():
            for system, entry in systems.items():
                if np.isfinite(entry[error]).any():
                    lines.append(_row(f"{title}, {system}", [_cell(entry, i, error) for i in range(len(LEVELS))]))
            others = [entry for system, entry in systems.items() if system != own]
            if own in systems and others and np.isfinite(systems[own][error]).any():
                lines.append(_row(f"{title}, {own}¹", verdict(systems[own], others, error)))
        for system, entry in systems.items():
            lines.append(_row(f"lr, {system}", [_lr(entry, i) for i in range(len(LEVELS))]))
        for system, entry in systems.items():
            lines.append(_row(f"dead, {system}³", [_dead(entry, i) for i in range(len(LEVELS))]))
    n = max((entry["n_held_out"] for systems in result.values() for entry in systems.values()), default=0)
    notes = [
        "² at an edge of the learning rates that were tried.",
        f"³ did not fire on the last 200,000 training tokens / on the {n:.0f} tokens that are reported on.",
    ]
    if own:
        gain = (
            "¹ against the best of the others: ++ better by more than twice the spread, + better, = within it, − worse."
        )
        notes.insert(0, gain)
    return "\n".join([*lines, "", *notes]) + "\n"


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def _cell(entry: dict[str, Any], i: int, error: Error) -> str:
    value, spread = entry[error][i], entry[error + "_spread"][i]
    if not np.isfinite(value):
        return ""
    return f"{value if error == 'fvu' else 1 - value:.4f} ± {spread:.4f}"


def _lr(entry: dict[str, Any], i: int) -> str:
    lr = entry["lr"][i]
    return "" if lr is None else f"{lr:g}" + ("²" if entry["lr_on_edge"][i] else "")


def _dead(entry: dict[str, Any], i: int) -> str:
    dead, held_out = entry["dead"][i], entry["fraction_dead"][i]
    return f"{dead:.1%} / {held_out:.1%}" if np.isfinite(dead) else ""


def plot(result: dict[str, dict[str, dict[str, Any]]], points: list[Point], path: Path) -> None:
    """FVU and lost CE against L0, a column per architecture; bars are the spread over seeds, dots the SAEs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(result), figsize=(4.2 * len(result), 7), squeeze=False, layout="constrained")
    for column, (sae_type, systems) in enumerate(result.items()):
        for row, (error, title) in enumerate(TITLES.items()):
            ax = axes[row][column]
            for colour, (system, entry) in zip(COLOURS, systems.items(), strict=False):
                ax.errorbar(
                    LEVELS, entry[error], yerr=entry[error + "_spread"], color=colour, capsize=2, lw=1.2,
                    label=system,
                )  # fmt: skip
                own = [p.metrics["reported_on"] for p in points
                       if (p.system, p.sae_type) == (system, sae_type) and p.lr in entry["lr"]]  # fmt: skip
                ax.plot([m["l0"] for m in own], [error_of(m, error) for m in own], ".", color=colour, ms=3, alpha=0.5)
            if not (ax.dataLim.get_points()[1] > 0).all():  # nobody reached any of the levels
                continue
            ax.set(
                xscale="log",
                yscale="log",
                xlabel="L0",
                ylabel="FVU" if row == 0 else f"1 − {title}",
                title=sae_type,
                xlim=(3, 90),
            )
            ax.grid(alpha=0.3, which="both")
            ax.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(out: Path, points: list[Point], own: str = "saeopt") -> str:
    """`table.md`, `fronts.png`, `points.csv`, `result.json`; gives the table. Systems `own, …` are its ablations."""
    compared = [p for p in points if not p.system.startswith(own + ",")]
    result = summary(compared)
    lrs = {kind: systems[own]["lr"] for kind, systems in result.items() if own in systems}  # those chosen somewhere
    changed = [p for p in points if p not in compared]
    shipped = [p for p in compared if p.system == own and p.lr in lrs[p.sae_type]]
    ablations = summary(shipped + changed) if changed else {}
    text = markdown(result, own) + ("\n## Ablations\n" + markdown(ablations, own="") if ablations else "")
    (out / "table.md").write_text(text, encoding="utf-8")
    everything = {"summary": result, "ablations": ablations, "points": [vars(p) for p in points]}
    with (out / "points.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["system", "sae_type", "lr", "seed", "sparsity", "half", *METRICS])
        for p in points:
            for half, measured in p.metrics.items():
                values = [measured.get(name, "") for name in METRICS]
                table.writerow([p.system, p.sae_type, p.lr, p.seed, p.sparsity, half, *values])
    (out / "result.json").write_text(json.dumps(everything, indent=1).replace("NaN", "null"), encoding="utf-8")
    try:
        plot(result, compared, out / "fronts.png")
    except ModuleNotFoundError:
        text += "\n(no matplotlib: no plot)\n"
    return text


if __name__ == "__main__":
    points_read = [Point(**row) for row in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["points"]]
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.write(write(folder, points_read))
