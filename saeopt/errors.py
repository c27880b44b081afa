"""Errors that a user can mend: one line on stderr, exit code 2, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

import click


class UserError(Exception):
    """Bad input. The message is one line that names the file or field and says what would be right."""


def fail(message: str) -> NoReturn:
    """Write one line to stderr and exit with code 2."""
    sys.stderr.write("saeopt: error: " + " ".join(message.split()) + "\n")
    sys.exit(2)


def run_cli(app: Callable[..., object], args: list[str] | None = None) -> NoReturn:
    """Run a typer application; usage errors and :class:`UserError` become one line and exit code 2."""
    from saeopt.config.settings import redact

    try:
        code = app(args=args, standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        sys.exit(130)
    except (click.exceptions.ClickException, UserError) as error:
        text = error.format_message() if isinstance(error, click.exceptions.ClickException) else str(error)
        fail(redact(text))
    sys.exit(code if isinstance(code, int) else 0)
