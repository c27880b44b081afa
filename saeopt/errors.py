"""Errors that a user can mend: one line on stderr, exit code 2, no traceback."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import NoReturn

_LONGEST = 1000
_OTHER_RANK_SECONDS = 5
"""Every rank finds the same mistake: rank 0 tells it, and the launcher ends the others meanwhile."""


class UserError(Exception):
    """Bad input. The message is one line that names the file or field and says what would be right.

    `more` has a line for each other mistake that was found with it (`saeopt study validate` tells them all).
    """

    exit_code = 2

    def __init__(self, message: str = "", more: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.more = tuple(more)


class HostError(UserError):
    """A fault of the host, not of what it was asked to do: a full disk, a folder that cannot be written."""


class WorkerFault(UserError):
    """This worker can train nothing of its study, and another could: a fault of its host, its store or its version.

    An exit code of its own, so that supervisors wait before they start it again.
    """

    exit_code = 3


class DeviceFault(RuntimeError):
    """The device stopped by itself (an assertion in a kernel, an illegal access): this process can use it no more."""


_DEVICE_FAULTS = ("device-side assert", "illegal memory access", "illegal instruction", "misaligned address",
                  "unspecified launch failure", "hardware stack error")  # fmt: skip


def is_device_fault(error: BaseException) -> bool:
    """Whether an error of torch means that the CUDA context is lost."""
    return isinstance(error, DeviceFault) or any(words in str(error) for words in _DEVICE_FAULTS)


def fail(message: str, code: int = 2) -> NoReturn:
    """Write one line to stderr and exit; of several ranks rank 0 speaks first."""
    from saeopt.host.launcher import speaks_first

    if not speaks_first():
        time.sleep(_OTHER_RANK_SECONDS)
    tell(message)
    sys.exit(code)


def tell(message: str) -> None:
    """Write one line to stderr."""
    line = " ".join(message.split())
    sys.stderr.write("saeopt: error: " + (line if len(line) <= _LONGEST else line[:_LONGEST] + " …") + "\n")
    sys.stderr.flush()


def redact_tracebacks() -> None:
    """Whatever ends this process or one of its threads is told without passwords."""
    from saeopt.config.settings import redact

    def told(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))

    def told_of_thread(args: threading.ExceptHookArgs) -> None:
        if not issubclass(args.exc_type, SystemExit):
            told(args.exc_type, args.exc_value, args.exc_traceback)

    sys.excepthook, threading.excepthook = told, told_of_thread
