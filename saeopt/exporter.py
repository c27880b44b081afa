"""`saeopt export`: trained SAEs in the formats of other tools, in a folder and on the hub."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from saeopt.console import say, set_up_logging
from saeopt.errors import UserError
from saeopt.exports.formats import FORMATS, get_format
from saeopt.options import Storage, in_results, new_app, run_cli

app = new_app()


@app.command()
def export(
    paths: Annotated[
        list[Path], typer.Argument(metavar="[RUN_DIR] DIR", help="A run folder or weights file; the folder to write.")
    ],
    to: Annotated[str | None, typer.Option("--to", metavar="FORMAT", help=f"One of {', '.join(FORMATS)}.")] = None,
    study: Annotated[str | None, typer.Option("--study", metavar="NAME", help="Of this study, not a run.")] = None,
    front: Annotated[
        bool, typer.Option("--front", help="The study's Pareto front at every site (so without --trial, too).")
    ] = False,
    trials: Annotated[list[int] | None, typer.Option("--trial", metavar="N", help="These trials instead.")] = None,
    site: Annotated[str | None, typer.Option("--site", metavar="KEY", help="Only at this site or hook point.")] = None,
    checkpoint: Annotated[
        int | None, typer.Option("--checkpoint", metavar="N", help="After N samples; default: the newest.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Of runs with several seeds; default: the first.")
    ] = None,
    unit_decoder: Annotated[
        bool, typer.Option("--unit-decoder", help="Decoder rows of norm 1 in raw units, the code longer by as much.")
    ] = False,
    license: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="For the model cards, e.g. mit; default: unknown.")
    ] = None,
    push: Annotated[
        str | None, typer.Option("--push", metavar="OWNER/NAME", help="Then upload DIR there; alone: DIR as it is.")
    ] = None,
    storage: Storage = None,
) -> None:
    """Write SAEs as other tools read them, with model cards.

    What a format cannot say exactly is refused before anything is written.
    """
    from saeopt.exports import sources
    from saeopt.exports.making import How, export_saes
    from saeopt.exports.push import check_repo
    from saeopt.exports.push import push as upload

    set_up_logging()
    *rest, last = paths
    folder = in_results(last) or last
    run_dir = rest[0] if rest else None
    if push is not None:
        check_repo(push)
    if to is not None:
        get_format(to)
        _check(rest, study, front, trials)
        if study is not None:
            from saeopt.trials.storage import Store

            store = Store.open(storage, create=False, patience=10.0)
            wanted = sources.of_study(store, study, trials, site)
        else:
            assert run_dir is not None
            wanted = sources.of_run(run_dir, site)
        chosen = {"site": site, "checkpoint": checkpoint, "seed": seed, "to": to}
        told = _command(run_dir, study, trials, {**chosen, "unit-decoder": unit_decoder}, folder)
        keys = [key for one in wanted for key in one.keys or ()]
        how = How(to, unit_decoder, license, push, told)
        release = export_saes(sources.leaving(wanted, checkpoint, seed), keys, how, folder)
        n = len(release.placed)
        say(f"{n} SAE{'' if n == 1 else 's'} as {to} in {folder}")
    elif push is None or rest or study is not None:
        raise UserError(f"--to is missing: {', '.join(FORMATS)}")
    if push is not None:
        say(f"pushed: {upload(folder, push)}")


def _check(rest: list[Path], study: str | None, front: bool, trials: list[int] | None) -> None:
    """Refuse what contradicts itself."""
    if len(rest) > 1 or (study is None) == (not rest):
        raise UserError("export needs RUN_DIR and DIR, or --study NAME and DIR")
    if study is None and (front or trials):
        raise UserError("--front and --trial are for --study NAME")
    if front and trials:
        raise UserError("--front and --trial: give one of them")


def _command(
    run_dir: Path | None, study: str | None, trials: list[int] | None, options: Mapping[str, object], folder: Path
) -> str:
    """The command as it may stand in a model card: names without the folders of this host."""
    words = ["saeopt", "export"]
    if study is not None:
        words += ["--study", study, *([] if trials else ["--front"]), *(f"--trial={n}" for n in trials or [])]
    elif run_dir is not None:
        words.append(run_dir.absolute().name)
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [] if value in (None, False) else [f"--{name}", str(value)]
    return shlex.join([*words, folder.absolute().name])


def main() -> None:
    """The command."""
    run_cli(app)


if __name__ == "__main__":
    main()
