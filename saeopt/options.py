"""What the commands share: one kind of application, how it ends, and the options that several of them take."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from saeopt.errors import UserError, fail, redact_tracebacks

T = TypeVar("T")

# newer versions of typer bring a click of their own, older ones use the installed one: find its errors through typer
_USAGE_ERROR = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

_UNREADABLE = re.compile("[\\ud800-\\udfff]")
_TILDE = re.compile(r"^(--[\w-]+=|)(~[^/]*)")
"""Shells leave the `~` of `--option=~/file` as it is."""


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


def in_results(path: Path | None) -> Path | None:
    """Containers can write in few places: `SAEOPT_RESULTS` is where relative paths of results start."""
    folder = os.environ.get("SAEOPT_RESULTS")
    return Path(folder) / path if folder and path is not None else path


def result(help: str, metavar: str = "FILE") -> Any:
    """The option that names a file or folder to write."""
    return typer.Option(metavar=metavar, help=help, callback=in_results)


def either(argument: T | None, option: T | None, name: str) -> T | None:
    """What may be given as an argument or as an option. :class:`UserError` where both are given and differ."""
    if argument is not None and option is not None and argument != option:
        raise UserError(f"{argument} and {name} {option}: give one of them")
    return option if argument is None else argument


def _usage(error: Exception) -> str:
    """What was wrong with a command line, and with which word: typer's own message for numbers does not say it."""
    text = str(getattr(error, "format_message", error.__str__)())
    details: Callable[[], list[dict[str, Any]]] | None = getattr(error.__cause__, "errors", None)
    return text if details is None else f"{text.partition(', unable')[0]}, not '{details()[0]['input']}'"


def run_cli(app: Callable[..., object], args: list[str] | None = None) -> NoReturn:
    """Run a typer application; usage errors and :class:`UserError` become one line and exit code 2."""
    from saeopt.config.settings import export_tokens, redact

    given = sys.argv[1:] if args is None else args
    words = [_TILDE.sub(lambda m: m[1] + os.path.expanduser(m[2]), word) for word in given]
    redact_tracebacks()
    if broken := next(filter(_UNREADABLE.search, words), None):
        fail(f"{broken!a} is no UTF-8 text")
    try:
        export_tokens()
        code = app(args=words, standalone_mode=False)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except UserError as error:
        fail(redact(str(error)), error.exit_code)
    except OSError as error:
        if error.filename is None:
            raise
        fail(redact(f"{error.filename}: {error.strerror}"))  # permissions, a full disk, a file system that went away
    except Exception as error:
        if not isinstance(error, _USAGE_ERROR):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help: not one line
            typer.echo(_usage(error), err=True)
            sys.exit(2)
        fail(redact(_usage(error)))
    sys.exit(code if isinstance(code, int) else 0)
