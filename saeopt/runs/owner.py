"""Whose a run folder is: of several processes that hold it for theirs, one writes and the others find out.

The owner has a folder of its own in the run folder, `.owner-<who>-<turn>-<token>`. Every file is written in there first
and then renamed to its place (`saeopt.files`). Whoever takes a run folder over renames its predecessor's folder away,
in one instant: from then on each rename of the predecessor fails, however long it was stopped in the middle of a write.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from saeopt import files
from saeopt.files import LostRun, write_error

_NAME = re.compile(r"\.owner-(?P<who>[0-9a-z]+)-(?P<turn>\d+)-(?P<token>[0-9a-z]+)")


@dataclass(frozen=True)
class Owner:
    """Who writes into a run folder. Of two owners with the same `who`, the one with the higher turn is right."""

    who: str = "user"
    turn: int = 0
    token: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    def folder(self, run_dir: Path) -> Path:
        """The owner's own folder in a run folder."""
        return run_dir / f".owner-{self.who}-{self.turn}-{self.token}"

    def owns(self, run_dir: Path) -> bool:
        """Whether nobody has taken the run folder over."""
        return self.folder(run_dir).is_dir()

    def take(self, run_dir: Path) -> None:
        """Make the run folder (where it is missing) this owner's.

        Raises:
            LostRun: somebody with the same `who` and a higher turn has it.
            HostError: the folder cannot be written.
        """
        mine = self.folder(run_dir)
        try:
            mine.mkdir(parents=True, exist_ok=True)
            for other, theirs in owners(run_dir):
                if other == self:
                    continue
                if other.who == self.who and other.turn > self.turn:
                    self.leave(run_dir)
                    raise LostRun(f"{run_dir}: another worker has taken it over")
                with suppress(FileNotFoundError):
                    theirs.rename(mine / f"before{theirs.name}")
            for before in mine.iterdir():
                shutil.rmtree(before, ignore_errors=True)
        except OSError as error:
            raise write_error(run_dir, error) from error
        files.fence(run_dir, mine)

    def adopt(self, run_dir: Path) -> None:
        """Write into a run folder that this owner has taken in another process."""
        files.fence(run_dir, self.folder(run_dir))

    def leave(self, run_dir: Path) -> None:
        """It is nobody's now; a run folder in which nothing was written goes."""
        files.unfence(run_dir)
        shutil.rmtree(self.folder(run_dir), ignore_errors=True)
        with suppress(OSError):
            os.rmdir(run_dir)


def owners(run_dir: Path) -> list[tuple[Owner, Path]]:
    """Everybody who has taken a run folder and not left it, with their own folders."""
    found = []
    for path in run_dir.iterdir():
        if match := _NAME.fullmatch(path.name):
            found.append((Owner(match["who"], int(match["turn"]), match["token"]), path))
    return found
