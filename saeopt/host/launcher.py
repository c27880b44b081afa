"""What a launcher of several processes (`accelerate launch`, torchrun, a cluster) says in the environment."""

from __future__ import annotations

import os
from typing import NamedTuple

from saeopt.errors import UserError


class Launched(NamedTuple):
    """This process's rank, how many were started, and how many of them on this machine."""

    rank: int
    size: int
    here: int


def launched() -> Launched:
    """What a launcher has set. The one place where the environment is asked for ranks.

    Raises:
        UserError: something that must be a number is none.
    """
    return Launched(_number("RANK", 0), _number("WORLD_SIZE", 1), _number("LOCAL_WORLD_SIZE", 1))


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "").strip()
    if text and not text.isdecimal():
        raise UserError(f"{name}={text}: must be a number (a launcher of several processes sets this variable)")
    return int(text or otherwise)


def speaks_first() -> bool:
    """Whether this process tells what all of them find; never fails."""
    return os.environ.get("RANK", "0").strip() in ("", "0")


def check_alone(command: str, instead: str) -> None:
    """Refuse several processes for a command that is one: each would do, and write, the same."""
    if (started := launched().size) > 1:
        raise UserError(f"{command} is one process, {started} were started (WORLD_SIZE): {instead}")


def be_alone(command: str, instead: str) -> None:
    """Refuse copies that a launcher started. What a cluster says of its nodes starts nothing: it is dropped, here and
    for child processes, where Accelerate would wait for the others."""
    if "LOCAL_RANK" in os.environ:
        check_alone(command, instead)
        return
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
