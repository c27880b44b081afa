"""What a person sees: results on stdout, notices and progress on stderr. Secrets never pass through."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.logging import RichHandler

from saeopt.config.settings import redact

console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)
log = logging.getLogger("saeopt")


class _Redacting(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), ()
        return True


def set_up_logging(level: int = logging.INFO) -> None:
    """Send the library's log to stderr once; safe to call again."""
    if log.handlers:
        return
    handler = RichHandler(console=error_console, show_path=False, rich_tracebacks=False)
    handler.addFilter(_Redacting())
    log.addHandler(handler)
    log.setLevel(level)
    log.propagate = False
