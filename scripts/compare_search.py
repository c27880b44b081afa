#!/usr/bin/env python
"""How good a search is: replayed on a study that was trained in full once, and for real against a grid.

    python scripts/compare_search.py table --out table.parquet     # train every cell once, in packs; minutes on a GPU
    python scripts/compare_search.py replay table.parquet          # 20 repetitions of each search on it
    python scripts/compare_search.py earnest                       # TPE + halving beside the whole grid, trained
    python scripts/compare_search.py old-grid                      # TPE against the replaced system's grid, trained

`COMMAND -h` lists a command's options.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tabulated.study import RATIOS, REPOSITORY, SAE_TYPES, SMALL_RATIOS

from saeopt.config.io import apply_overrides, parse_override
from saeopt.console import set_up_logging
from saeopt.errors import UserError, fail


def _table(options: argparse.Namespace) -> None:
    from tabulated import study, table

    changes = {"threads": options.threads, "log_every_n_grad_steps": options.log_every}
    config = apply_overrides(
        study.base(options.shared, options.samples, changes), dict(map(parse_override, options.set))
    )
    parts = options.out.with_name(options.out.name + ".parts")
    jobs = [
        table.Job(config, name, ratio, parts / f"{name}-{ratio}.parquet", options.device)
        for ratio in sorted(options.ratios, reverse=True)
        for name in options.sae_types
    ]
    table.make(jobs, options.out, options.jobs)


def _replay(options: argparse.Namespace) -> None:
    from tabulated import replay

    replay.replay(options.table, options)


def _earnest(options: argparse.Namespace) -> None:
    from tabulated import earnest

    earnest.main(options)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shared = Path(os.environ.get("SAEOPT_SHARED") or REPOSITORY.parent / "shared")

    table = commands.add_parser("table", help="train every cell of the study once; one parquet file of all curves")
    table.set_defaults(run=_table)
    table.add_argument("--out", type=Path, default=Path("output/table.parquet"), help="packs lie beside it until then")
    table.add_argument("--samples", type=int, default=9_400, help="training samples of 128 tokens per cell")
    table.add_argument("--log-every", type=int, default=20, help="training steps between two rows of a curve")
    every = sorted({*RATIOS, *SMALL_RATIOS})
    table.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the config")
    table.add_argument("--ratios", type=int, nargs="+", default=every, help="widths (h / d)")
    table.add_argument("--sae-types", nargs="+", choices=SAE_TYPES, default=SAE_TYPES, help="architectures")
    table.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, …")
    table.add_argument("--jobs", type=int, default=1, help="packs that train at once")
    table.add_argument("--threads", type=int, default=2, help="CPU threads of each")
    table.add_argument("--shared", type=Path, default=shared, help="folder with models/ and data/")

    replay = commands.add_parser("replay", help="repetitions of each search on a table")
    replay.set_defaults(run=_replay)
    replay.add_argument("table", type=Path, help="what `table` made")
    replay.add_argument("--repetitions", type=int, default=20)
    replay.add_argument("--seeds", type=int, nargs="+", help="of the table; default: all, of which the mean counts")
    replay.add_argument("--ratios", type=int, nargs="+", help=f"widths of the space (default: {RATIOS})")
    replay.add_argument(
        "--start-ratios", type=int, nargs="+", help="also searches that start from a study at these widths"
    )
    replay.add_argument("--start-top", type=int, default=16, help="… or from so many of its trials, not its front")
    replay.add_argument("--pack", type=int, default=8, help="trials that train together (workers, for MOASHA)")
    replay.add_argument("--rungs", type=float, nargs="+", help="instead of early_stopping's default")
    replay.add_argument("--keep", type=float, help="instead of early_stopping's default")
    replay.add_argument("--factor", type=int, default=3, help="reduction factor of ASHA and MOASHA")
    replay.add_argument("--budget", type=float, default=1.0, help="share of the full grid's tokens to stop after")
    replay.add_argument("--tpe-trials", type=int, default=100, help="most trials of a TPE search")
    replay.add_argument(
        "--count-stopped", action="store_true", help="SAEs that were stopped or paused count as they are"
    )
    replay.add_argument("--only", nargs="+", help="these searches, by the names in the printed table")
    replay.add_argument("--syne-tune", type=Path, help="Python of an environment with syne-tune==0.16.0 (for MOASHA)")
    replay.add_argument("--json", type=Path, help="a line per search is added here")

    earnest = commands.add_parser("earnest", help="the whole grid and TPE + halving, trained at the same time")
    earnest.set_defaults(run=_earnest)
    earnest.add_argument("--folder", type=Path, default=Path("output/earnest"), help="stores, run folders, logs")
    earnest.add_argument("--samples", type=int, default=800, help="training samples per trial")
    earnest.add_argument("--context", type=int, default=64, help="tokens of a sample")
    earnest.add_argument("--held-out", type=int, default=50, help="held-out samples")
    earnest.add_argument("--ratios", type=int, nargs="+", default=[4, 8], help="widths (h / d)")
    earnest.add_argument("--trials", type=int, default=100, help="trials of the search")
    earnest.add_argument("--pack", type=int, default=8, help="trials that train together")
    earnest.add_argument("--seed", type=int, default=0, help="of the sampler")
    earnest.add_argument("--threads", type=int, default=1, help="CPU threads of each worker")
    earnest.add_argument("--shared", type=Path, default=shared, help="folder with models/ and data/")

    old = commands.add_parser("old-grid", help="TPE against the replaced system's grid, trained", add_help=False)
    old.set_defaults(run=None)

    options, rest = parser.parse_known_args()
    if options.run is None:
        from tabulated import old_grid

        old_grid.main(rest)
        return
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    set_up_logging()
    options.run(options)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        fail(str(error))
