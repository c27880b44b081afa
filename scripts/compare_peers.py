"""saeopt's fronts beside sae-lens' and dictionary_learning's, on the same tokens in the same order.

    scripts/interop_envs.sh                  # their environments, once
    python scripts/compare_peers.py --model ../shared/models/stories260K \
        --data ../shared/data/tinystories-1000/tinystories_1000.json --out output/peers

Activations are harvested once and fed to all, without masked tokens. saeopt trains the configs that it ships, as packs;
each peer trains by its own trainer and its authors' recipe. Everybody gets the same sparsities per unit of penalty, the
same seeds and as many learning rates; the learning rate is chosen at each L0, with the first seed on one half of the
held-out documents (the other seeds train at the chosen rates alone), and the table, the plot, `points.csv` and
`result.json` report the other half. Weights that lie in --out already are not trained again. `--harvest` stops once
OUT/activations.safetensors is there; `--harvested FILE` goes on from such a file where there is no model.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from peers.comparison import OWN, Comparison, Job
from peers.fronts import Point, at_chosen_lrs, write
from peers.workers import train_peers

from saeopt.config.io import parse_override
from saeopt.console import log, set_up_logging

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("sae-lens", "dictionary-learning")
SPARSITIES = {
    "relu": (0.075, 0.15, 0.3, 0.5, 0.8, 1.3, 2.6),
    "gated": (0.075, 0.15, 0.3, 0.5, 0.8, 1.3, 2.6),
    "topk": (4.0, 8.0, 16.0, 32.0, 64.0),
    "batch_topk": (4.0, 8.0, 16.0, 32.0, 64.0),
    "matryoshka_batch_topk": (4.0, 8.0, 16.0, 32.0, 64.0),
    "jumprelu": (0.02, 0.04, 0.08, 0.16, 0.32),
    "dictionary-learning:jumprelu": (4.0, 8.0, 16.0, 32.0, 64.0),
}
"""λ or k in saeopt's units; dictionary_learning's jumprelu asks for an L0, as saeopt's `penalty: quadratic` does."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="Hugging Face directory of the language model")
    add("--data", help="data set, as data.dataset_name")
    add("--harvest", action="store_true", help="harvest the activations and stop")
    add(
        "--harvested", metavar="FILE", help="activations instead of a model (no CE then): train, chosen_on, reported_on"
    )
    add("--column", default="text")
    add("--hook", default="blocks.2.hook_resid_pre")
    add("--train", default="0:900", help="documents to train on")
    add("--held-out", default="900:1000", help="documents held out: one half to choose on, one to report on")
    add(
        "--configs",
        default=str(ROOT / "configs/stories260k/stories260k-{}.yaml"),
        help="saeopt's config per {sae_type}",
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change saeopt's configs")
    add("--tokens", type=int, help="training tokens; default: as the config says")
    add("--ratio", type=float, help="h / d; default: as the config says")
    add("--architectures", default="relu,gated,topk")
    add("--peers", default=",".join(PEERS))
    add("--seeds", default="0,1,2", help="the first one chooses the learning rate")
    add(
        "--lrs", default="2.5e-3,5e-3,1e-2,2e-2,4e-2", help="for everybody; one library's own: --lrs sae-lens=1e-3,3e-3"
    )
    add(
        "--sparsity",
        action="append",
        default=[],
        metavar="[SYSTEM:]TYPE=A,B",
        help="sparsities, in saeopt's units; a system's own before those of all",
    )
    add("--ablate", action="append", default=[], metavar="NAME[@TYPE+TYPE]:KEY=VALUE,…", help="saeopt, changed")
    add("--device", default="cpu")
    add("--jobs", default="1", help="trainers of peers at a time, on --device; or per device: cuda=6,cpu=9")
    add("--env", default=str(ROOT / ".interop/{}/bin/python"), help="Python of each {peer}'s environment")
    add("--deadline", type=float, help="seconds after which no further SAE of a peer is begun")
    add("--out", type=Path, default=Path("output/peers"))
    options = parser.parse_args()
    if not options.harvested and not (options.model and options.data):
        parser.error("--model and --data, or --harvested")
    return options


def jobs_of(options: argparse.Namespace, system: str, sae_type: str) -> list[Job]:
    """The same search for everybody, unless told otherwise; the seed stays open."""
    own, given = f"{system}:{sae_type}", dict(SPARSITIES)
    for text in options.sparsity:
        name, _, values = text.partition("=")
        given[name] = tuple(map(float, values.split(",")))
    sparsities = given.get(own) or given.get(sae_type, ())
    lrs = ""
    for text in options.lrs.split(";"):
        name, sign, values = text.rpartition("=")
        lrs = values if (not sign and not lrs) or name == system else lrs
    return [Job(system, sae_type, sparsity, float(lr), 0) for lr in lrs.split(",") for sparsity in sparsities]


def main() -> None:
    """The whole comparison."""
    options, started = arguments(), time.perf_counter()
    set_up_logging()
    options.out.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(options)
    log.info(
        "%d tokens of width %d harvested, %.0f s", len(comparison.x_Nd), comparison.d, time.perf_counter() - started
    )
    if options.harvest:
        return
    systems = (OWN, *(name for name in options.peers.split(",") if name))
    cells = [(system, kind) for system in systems for kind in comparison.architectures]
    searched = [job for cell in cells for job in jobs_of(options, *cell)]
    seeds = [int(seed) for seed in options.seeds.split(",")]
    if len({(job.system, job.sae_type, job.lr) for job in searched}) == len(cells):  # no learning rate to choose
        found = _trained(comparison, [replace(job, seed=seed) for seed in seeds for job in searched], started)
    else:
        found = _trained(comparison, [replace(job, seed=seeds[0]) for job in searched], started)
        write(options.out, found)  # what a run that is cut leaves
        shown = {(p.system, p.sae_type, p.lr) for p in at_chosen_lrs(found)}
        again = [job for job in searched if (job.system, job.sae_type, job.lr) in shown]
        found += _trained(comparison, [replace(job, seed=seed) for seed in seeds[1:] for job in again], started)
    write(options.out, found)
    points = found + _ablations(comparison, [p for p in found if p.system == OWN], started)
    comparison.add_cross_entropy(at_chosen_lrs(points))
    log.info("cross-entropies: done after %.0f s", time.perf_counter() - started)
    sys.stdout.write(write(options.out, points))


def _trained(comparison: Comparison, jobs: list[Job], started: float) -> list[Point]:
    """Points of the jobs: the peers' processes train beside saeopt's packs."""
    threads = train_peers(comparison, [job for job in jobs if job.system != OWN], started)
    for kind in comparison.architectures:
        comparison.train_own([job for job in jobs if (job.system, job.sae_type) == (OWN, kind)])
        log.info("saeopt %s: done after %.0f s", kind, time.perf_counter() - started)
    for thread in threads:
        thread.join()
    log.info("peers: done after %.0f s", time.perf_counter() - started)
    return comparison.measure(jobs)


def _ablations(comparison: Comparison, own: list[Point], started: float) -> list[Point]:
    """saeopt with one thing changed, at the learning rate that was chosen for what it ships."""
    points: list[Point] = []
    options = comparison.options
    for text in options.ablate:
        head, _, changes = text.partition(":")
        name, _, only = head.partition("@")
        for kind in only.split("+") if only else comparison.architectures:
            if options.deadline is not None and time.perf_counter() - started > options.deadline:
                return points
            shown = at_chosen_lrs([p for p in own if p.sae_type == kind])
            jobs = [Job(f"{OWN}, {name}", p.sae_type, p.sparsity, p.lr, p.seed) for p in shown]
            comparison.train_own(jobs, dict(map(parse_override, changes.split(","))))
            points += comparison.measure(jobs)
    return points


if __name__ == "__main__":
    main()
