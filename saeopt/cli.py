"""The installed command `saeopt`: a sub-command is imported when it is called, so that `status` starts at once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from saeopt.console import console
from saeopt.errors import fail

COMMANDS = {
    "train": ("saeopt.train", "train the SAEs of one config"),
    "study": ("saeopt.study", "create, watch, mend and export studies"),
    "worker": ("saeopt.worker", "train the trials of a study"),
    "evaluate": ("saeopt.evaluation.__main__", "evaluate what a run saved"),
}
_ALIASES = {"evaluation": "evaluate"}


def main(args: Sequence[str] | None = None) -> None:
    """Hand the rest of the command line to one sub-command."""
    from saeopt.config.base import nearest

    given = list(sys.argv[1:] if args is None else args)
    if not given or given[0] in ("-h", "--help", "help"):
        console.print("Usage: saeopt COMMAND [ARGUMENTS]; saeopt COMMAND --help says more\n", markup=False)
        for name, (_, text) in COMMANDS.items():
            console.print(f"  {name:10}{text}")
        return
    name = _ALIASES.get(given[0], given[0])
    if name == "--version":
        from importlib.metadata import version

        console.print(version("saeopt"))
        return
    if name not in COMMANDS:
        fail(f"unknown command '{name}'{nearest(name, list(COMMANDS))} (known: {', '.join(COMMANDS)})")
    sys.argv = [f"saeopt {name}", *given[1:]]  # what usage texts show
    importlib.import_module(COMMANDS[name][0]).main()


if __name__ == "__main__":
    main()
