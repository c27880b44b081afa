"""What the commands share: one kind of application, and the options that several of them take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from saeopt.errors import UserError

T = TypeVar("T")


def new_app(**settings: Any) -> typer.Typer:
    """An application whose help fits into 80 columns; `--dry_run` is `--dry-run`, `-h` is `--help`."""
    context = {"help_option_names": ["-h", "--help"], "token_normalize_func": lambda name: name.replace("_", "-")}
    return typer.Typer(
        **{"add_completion": False} | settings,
        context_settings=context,
        rich_markup_mode=None,  # its panels cut the names of options
        pretty_exceptions_enable=False,
    )


def _studies(ctx: Any, incomplete: str) -> list[str]:
    """Completion of a study's name; an unreachable store completes nothing."""
    from saeopt.trials.storage import Store

    try:
        names = Store.open(ctx.params.get("storage"), create=False, patience=2).study_names()
    except UserError:
        return []
    return [name for name in names if name.startswith(incomplete)]


Storage = Annotated[
    str | None,
    typer.Option("--storage", metavar="URL", help="Default: SAEOPT_STORAGE, else sqlite:///studies/saeopt.db"),
]
StudyName = Annotated[str, typer.Argument(metavar="NAME", help="The study's name.", autocompletion=_studies)]
StudyArgument = Annotated[
    str | None, typer.Argument(metavar="STUDY", help="The study's name.", autocompletion=_studies)
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the config, e.g. data.n_train_samples=1000."),
]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, …")]
ConfigArgument = Annotated[Path | None, typer.Argument(metavar="CONFIG", help="The run's YAML file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def _in_results(path: Path | None) -> Path | None:
    """Containers can write in few places: `SAEOPT_RESULTS` is where relative paths of results start."""
    folder = os.environ.get("SAEOPT_RESULTS")
    return Path(folder) / path if folder and path is not None else path


def result(help: str, metavar: str = "FILE") -> Any:
    """The option that names a file or folder to write."""
    return typer.Option(metavar=metavar, help=help, callback=_in_results)


def either(argument: T | None, option: T | None, name: str) -> T | None:
    """What may be given as an argument or as an option. :class:`UserError` where both are given and differ."""
    if argument is not None and option is not None and argument != option:
        raise UserError(f"{argument} and {name} {option}: give one of them")
    return option if argument is None else argument
