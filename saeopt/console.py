"""What a person sees: results on stdout, notices and progress on stderr. Secrets never pass through."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from saeopt.config.settings import redact
from saeopt.host.launcher import launched

console = Console(highlight=False, emoji=False)  # ":100:" is a size
error_console = Console(stderr=True, highlight=False, emoji=False)
log = logging.getLogger("saeopt")


class _Redacting(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if record.exc_info:
            text, record.exc_info = f"{text}\n{logging.Formatter().formatException(record.exc_info)}", None
        record.msg, record.args = redact(text), ()
        return True


class _Lines(logging.Handler):
    """One line each, never broken: a path in it can be copied. A terminal is told the time as well."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        start = time.strftime("%H:%M:%S ") if error_console.is_terminal else "saeopt: "
        try:  # above a bar, if there is one
            error_console.print(f"{start}{level}{record.getMessage()}", markup=False, soft_wrap=True)
        except OSError:
            self.handleError(record)


def set_up_logging(level: int = logging.INFO) -> None:
    """Send the library's log to stderr once; safe to call again. Of several ranks only the first says everything."""
    if log.handlers:
        return
    handler = _Lines()
    handler.addFilter(_Redacting())
    log.addHandler(handler)
    log.setLevel(level if launched().rank == 0 else logging.ERROR)
    log.propagate = False
    # five lines for each try at a hub that does not answer: what came of it is told in our own line
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # torch.compile's advice: what runs in float32 here is meant to
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")


def unbroken(text: str) -> Text:
    """A line that a narrow window does not break: commands and paths are there to be copied (print with crop=False)."""
    return Text(text, no_wrap=True, overflow="ignore")


def wrapped(text: str) -> str:
    """A sentence, which a terminal is given broken between words and set in; in a file it stays one line."""
    if not console.is_terminal:
        return text
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    return textwrap.fill(text, console.width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def titled(title: str, table: RenderableType) -> RenderableType:
    """A table under a title that may be wider than it."""
    return Group(unbroken(title), table)


def fits(table: Table) -> bool:
    """Whether the window is wide enough for it to break nothing."""
    return console.measure(table, options=console.options.update_width(10_000)).maximum <= console.width


def program() -> str:
    """How this installation's `saeopt` is called from the shell that this process was started from."""
    own = Path(sys.executable).with_name("saeopt")
    found = shutil.which("saeopt")
    if found is not None and os.path.realpath(found) == os.path.realpath(own):
        return "saeopt"
    if own.exists():
        return shlex.quote(str(own))
    return f"{shlex.quote(sys.executable)} -m saeopt"


def say(text: str) -> None:
    """A result for a person, without passwords."""
    console.print(redact(text), markup=False, soft_wrap=True)


def say_json(value: Any) -> None:
    """A result for programs."""
    say(json.dumps(value, indent=2, ensure_ascii=False))
