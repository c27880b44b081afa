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
