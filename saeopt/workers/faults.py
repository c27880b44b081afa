"""Whose fault it is when a training fails: the trial's, the host's, or a process's that ended by itself."""

from __future__ import annotations

import errno
import gc
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from saeopt.errors import HostError, UserError
from saeopt.training.launch import EXHAUSTED

SAME_REASON = 3
"""So many different trials that fail of the same make it the worker's fault."""
_HOST_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EMFILE}
_HOST_WORDS = (
    "no CUDA-capable device", "CUDA driver version is insufficient", "CUDA-capable device(s) is/are busy",
    "CUDA unknown error", "system not yet initialized", "GPU is lost", "No space left on device",
)  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """What went wrong in a training."""

    kind: Literal["memory", "host", "fatal", "trial"]
    """memory: too little on device or host; host: not the trial's fault; fatal: the process is of no more use."""
    reason: str
    text: str
    """The traceback."""


class TrainingFailed(Exception):
    """A training failed in another process."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


class TrainingDied(Exception):
    """The process that trained ended by itself."""


class TrainingStalled(Exception):
    """The process that trained made no progress for long; it has been ended."""


class TrainingLeft(Exception):
    """The worker leaves before the training has begun."""


def failure_of(error: BaseException) -> Failure:
    """What an error means for its trials."""
    if isinstance(error, TrainingFailed):
        return error.failure
    text = "".join(traceback.format_exception(error))
    said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    reason = (said.splitlines() or [""])[0][:300]
    if is_out_of_memory(error):
        return Failure("memory", reason, text)
    if _is_host_fault(error):
        return Failure("host", reason, text)
    return Failure("fatal" if _device_is_broken() else "trial", reason, text)


def is_out_of_memory(error: BaseException) -> bool:
    """The device's memory or the host's."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in EXHAUSTED))
    )


def _is_host_fault(error: BaseException) -> bool:
    return any(
        isinstance(e, HostError)
        or (isinstance(e, OSError) and e.errno in _HOST_ERRNOS)
        or (isinstance(e, RuntimeError) and any(words in str(e) for words in _HOST_WORDS))
        for e in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _device_is_broken() -> bool:
    """After an assertion on the device every further call of this process fails."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def free_memory() -> None:
    """Give back what the failed pack held."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@dataclass
class Faults:
    """The failures since a trial last came to its end, by reason (without numbers, which name files and trials)."""

    _trials: dict[str, set[int]] = field(default_factory=dict)
    _host: int = 0

    def note(self, reason: str, trials: Iterable[int], *, host: bool = False) -> bool:
        """Another failure; True when it is no longer the trials' fault: three different ones, or a host's third."""
        seen = self._trials.setdefault(re.sub(r"\d+", "#", reason), set())
        seen.update(trials)
        self._host += host
        return len(seen) >= SAME_REASON or self._host >= SAME_REASON

    def clear(self) -> None:
        """A trial has come to its end: this host can train."""
        self._trials.clear()
        self._host = 0
