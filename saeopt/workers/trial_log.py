"""The library's log of a pack, beside each of its runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from logging.handlers import RotatingFileHandler
from pathlib import Path

from saeopt.config.settings import redact
from saeopt.console import log
from saeopt.files import is_owned

NAME = "trial.log"


class _Redacted(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _still_ours(folder: Path, _record: logging.LogRecord) -> bool:
    return is_owned(folder)


@contextmanager
def trial_logs(folders: Iterable[Path]) -> Iterator[None]:
    """Write the log into `trial.log` of every folder, while it is ours; one that cannot be written is left out.

    Nested (a part of a pack is trained again), the outer one writes.
    """
    open_now = {getattr(handler, "baseFilename", "") for handler in log.handlers}
    with ExitStack() as stack:
        if log.level == logging.NOTSET:  # used without a command line, whose level would hold
            log.setLevel(logging.INFO)
            stack.callback(log.setLevel, logging.NOTSET)
        for folder in folders:
            if os.path.abspath(folder / NAME) in open_now:
                continue
            try:
                folder.mkdir(parents=True, exist_ok=True)
                handler = RotatingFileHandler(folder / NAME, maxBytes=2_000_000, backupCount=1, encoding="utf-8")
            except OSError as error:
                log.warning("no log in %s: %s", folder, error.strerror)
                continue
            handler.addFilter(partial(_still_ours, folder))
            handler.setFormatter(_Redacted("%(asctime)s %(levelname)s %(message)s"))
            log.addHandler(handler)
            stack.callback(handler.close)
            stack.callback(log.removeHandler, handler)
        yield
