"""What a launcher of several processes (`accelerate launch`, torchrun, a cluster) says in the environment."""

from __future__ import annotations

import os

from saeopt.errors import UserError


def launched(name: str, otherwise: int) -> int:
    """A number that a launcher sets: `WORLD_SIZE`, `RANK`, ….

    Raises:
        UserError: it is none.
    """
    text = os.environ.get(name, "").strip()
    if text and not text.isdecimal():
        raise UserError(f"{name}={text}: must be a number (a launcher of several processes sets this variable)")
    return int(text or otherwise)


def check_alone(command: str, instead: str) -> None:
    """Refuse several processes for a command that is one: each would do, and write, the same."""
    if (started := launched("WORLD_SIZE", 1)) > 1:
        raise UserError(f"{command} is one process, {started} were started (WORLD_SIZE): {instead}")


def be_alone(command: str, instead: str) -> None:
    """Refuse copies that a launcher started. What a cluster says of its nodes starts nothing: it is dropped, here and
    for child processes, where Accelerate would wait for the others."""
    if "LOCAL_RANK" in os.environ:
        check_alone(command, instead)
        return
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
