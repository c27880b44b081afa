"""Pull trials of a study and train them: `saeopt worker STUDY`, or `python -m saeopt.worker`."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from saeopt.config.settings import settings
from saeopt.errors import UserError
from saeopt.options import Storage, StudyArgument, either, new_app, run_cli

app = new_app()
_SAME_REQUEST = 1.0


Devices = Annotated[
    str,
    typer.Option(
        envvar="SAEOPT_DEVICES", metavar="LIST", help="auto, or a list (cuda:0,cuda:1 or cpu,cpu): a process each."
    ),
]
Limit = Annotated[int | None, typer.Option(metavar="N", min=1, help="End after N trials (of all devices together).")]
PackSize = Annotated[str | None, typer.Option(metavar="N", help="Most trials at once, or auto; default: the study's.")]
IdleTimeout = Annotated[
    float,
    typer.Option(
        envvar="SAEOPT_IDLE_TIMEOUT", metavar="SECONDS", min=0, help="End when no trial has waited for this long."
    ),
]
Sequential = Annotated[
    bool, typer.Option("--sequential", help="One trial at a time; the first error ends the worker, with traceback.")
]
OnlyBuiltin = Annotated[
    bool,
    typer.Option("--only-builtin", envvar="SAEOPT_ONLY_BUILTIN", help="Import no architecture that a study names."),
]
OutputRoot = Annotated[
    Path | None,
    typer.Option(envvar="SAEOPT_OUTPUT_ROOT", metavar="DIR", help="Refuse studies that write outside of DIR."),
]


@app.command()
def worker(
    name: StudyArgument = None,
    study: Annotated[str | None, typer.Option("--study", metavar="NAME", help="The same as an option.")] = None,
    storage: Storage = None,
    devices: Devices = "auto",
    limit: Limit = None,
    max_trials: Annotated[int | None, typer.Option(min=1, hidden=True)] = None,  # the old name of --limit
    pack: PackSize = None,
    idle_timeout: IdleTimeout = 0.0,
    sequential: Sequential = False,
    only_builtin: OnlyBuiltin = False,
    output_root: OutputRoot = None,
    show_devices: Annotated[bool, typer.Option("--show-devices", help="List the devices and end.")] = False,
    poll: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.05, help="Time between looks at an empty queue.")
    ] = 1.0,
) -> None:
    """Train the trials of a study until none is left."""
    from saeopt.console import console
    from saeopt.workers import devices as dev
    from saeopt.workers.loop import Options
    from saeopt.workers.on_device import work

    if show_devices:
        for device, text in dev.show_devices():
            console.print(f"{device:10}{text}")
        return
    study = either(name, study, "--study") or os.environ.get("SAEOPT_STUDY")
    if study is None:
        raise UserError("STUDY is missing: the name of the study whose trials are to be trained")
    limit, size = limit or max_trials, pack_size(pack)
    interrupted = _prepare(storage, only_builtin, output_root)
    with _own_gpu(devices, interrupted) as own:
        names = [own] if own else dev.parse_devices(devices)
        if len(names) > 1 and sequential and devices != "auto":
            raise UserError(f"--devices {devices}: with --sequential there is one device, which trains one trial")
        if len(names) > 1 and not sequential:
            arguments = ["--study", study, "--idle-timeout", str(idle_timeout), "--poll", str(poll)]
            arguments += ["--pack", pack] if pack is not None else []
            raise typer.Exit(dev.run_children(names, arguments, dev.split(limit, len(names)), interrupted))
        options = Options(names[0], limit, idle_timeout, poll, sequential)
        fault = _faulty(lambda: work(storage, study, options, size, interrupted))
    if fault is not None:  # without the GPU in its hands
        _pause(fault, interrupted)
        raise fault


def _prepare(storage: str | None, only_builtin: bool, output_root: Path | None) -> threading.Event:
    """What every worker does before it trains, for its children too; the event says that it is to end."""
    from saeopt.config.settings import export_tokens
    from saeopt.console import set_up_logging
    from saeopt.host.launcher import be_alone
    from saeopt.training.environment import check_environment
    from saeopt.trials.allowed import ONLY_BUILTIN, OUTPUT_ROOT
    from saeopt.workers.devices import watch_parent

    be_alone("a worker", "--devices says which devices to work on, and any number of workers may run")
    check_environment()
    set_up_logging()
    export_tokens()
    interrupted = stop_on_signals()
    watch_parent(interrupted)
    if only_builtin:
        os.environ[ONLY_BUILTIN] = "1"
    if output_root is not None:
        os.environ[OUTPUT_ROOT] = str(output_root)
    if storage is not None:  # a command line would show its password
        os.environ["SAEOPT_STORAGE"] = storage
    return interrupted


def _faulty(action: Callable[[], object]) -> UserError | None:
    """What keeps this worker from training anything: a fault, a study that is not there or not allowed."""
    try:
        action()
    except UserError as fault:
        return fault
    return None


def _pause(fault: UserError, interrupted: threading.Event) -> None:
    """Some container engines start what has ended again at once, for ever: the end comes later (a signal's at once)."""
    from saeopt.config.settings import redact
    from saeopt.console import log

    if seconds := settings().fault_pause:
        log.error("%s; this worker ends in %.0f s (SAEOPT_FAULT_PAUSE)", redact(str(fault)), seconds)
        interrupted.wait(seconds)


def pack_size(text: str | None) -> int | str | None:
    """`--pack`: a number, `auto`, or the study's."""
    if text is None or text == "auto":
        return text
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--pack {text}: must be a whole number above 0, or auto")
    return int(text)


def stop_on_signals() -> threading.Event:
    """SIGTERM and SIGINT set the event; a second one ends the process at once.

    Schedulers and shells may deliver one request twice, to a process and to its group: that is no second one.
    """
    interrupted = threading.Event()
    first: list[float] = []

    def handle(signum: int, _frame: FrameType | None) -> None:
        if first and time.monotonic() - first[0] > _SAME_REQUEST:
            os._exit(128 + signum)
        first[:] = first or [time.monotonic()]
        interrupted.set()

    if threading.current_thread() is threading.main_thread():  # Python gives signals to no other
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, handle)
    return interrupted


@contextmanager
def _own_gpu(devices: str, interrupted: threading.Event) -> Iterator[str | None]:
    """With `SAEOPT_GPU_LOCKS` and `--devices auto`: a GPU that no other worker of this host has."""
    from saeopt.host.gpu_lock import lock_folder, take_gpu

    folder = lock_folder()
    lock = take_gpu(folder, stop=interrupted.is_set) if folder is not None and devices == "auto" else None
    try:
        yield lock.device if lock is not None else None
    finally:
        if lock is not None:
            lock.release()


def main() -> None:
    """The command."""
    run_cli(app)


if __name__ == "__main__":
    main()
