"""One run from one config: `saeopt train CONFIG`.

Also `python -m saeopt.train`, `python saeopt/train.py`, and `accelerate launch saeopt/train.py` for several processes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if __name__ == "__main__" and not __package__:
    # Started as a file, Python searches saeopt/ first, where a module could hide a package of the same name.
    _HERE = Path(__file__).resolve().parent
    sys.path[:] = [str(_HERE.parent), *(p for p in sys.path if Path(p).resolve() != _HERE)]

import typer

from saeopt.errors import UserError
from saeopt.host.launcher import launched
from saeopt.options import Changes, ConfigArgument, Device, either, new_app, run_cli

if TYPE_CHECKING:
    from saeopt.config import RunConfig
    from saeopt.training.plan import TrialPlan, TrialResult
    from saeopt.training.runtime import Runtime

app = new_app()


@app.command()
def train(
    file: ConfigArgument = None,
    config: Annotated[
        Path | None, typer.Option("--config", "--config-path", "-c", metavar="FILE", help="The same as an option.")
    ] = None,
    overrides: Changes = None,
    device: Device = "auto",
    wandb_project: Annotated[str | None, typer.Option(metavar="NAME", help="W&B project; null: none.")] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN_DIR", help="Go on from the last checkpoint of this run folder.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print config, SAEs and estimated memory; train nothing.")
    ] = False,
    num_processes: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Fail unless so many processes run.")
    ] = None,
) -> None:
    """Train the SAEs of one config on one language model."""
    from saeopt.config import told_of
    from saeopt.console import set_up_logging
    from saeopt.runs.folder import RunFolder
    from saeopt.training.environment import check_accumulation, check_environment
    from saeopt.training.launch import check_processes, resolve
    from saeopt.training.loggers import check_sinks

    set_up_logging()
    changes = list(overrides or [])
    if wandb_project is not None:
        changes.append(f"wandb_project={wandb_project}")
    path = either(file, config, "--config")
    run_config, run_dir = resolve(path, changes, resume)
    with told_of(run_config, path or RunFolder(run_dir or Path()).config_path, changes):
        check_sinks(run_config)
        check_environment()
        check_accumulation(run_config)
        check_processes(num_processes)
        if dry_run:
            from saeopt.training.dry_run import print_dry_run

            if launched().rank == 0:
                print_dry_run(run_config, device)
            return
        if run_dir is not None and _already_ended(run_dir):
            return
        code = _run(run_config, run_dir, device)
    raise typer.Exit(code)


def _already_ended(run_dir: Path) -> bool:
    """Say how a run folder's run ended, if it did."""
    from saeopt.console import log
    from saeopt.runs.folder import RunFolder
    from saeopt.views.report import print_run

    status = RunFolder(run_dir).status()
    if status.get("status") not in ("finished", "stopped", "diverged"):
        return False
    reason = f" ({status['reason']})" if status.get("reason") else ""
    log.info("%s: this run has %s%s; there is nothing to resume", run_dir, status["status"], reason)
    if RunFolder(run_dir).evaluation_path.exists() and launched().rank == 0:
        print_run(run_dir)
    return True


def _run(config: RunConfig, run_dir: Path | None, device: str) -> int:
    """Train; the exit code: 0 finished, 1 diverged, 128 + signal interrupted."""
    from saeopt.training.progress import Interrupt, leave, run_observer

    interrupt = Interrupt()
    interrupt.install()
    with run_observer(interrupt, _pictures) as observer:  # the bar appears before the slow imports
        from saeopt.training.launch import train_one

        def made(folder: Path) -> None:
            interrupt.unused.append(folder)

        try:
            plan, result, runtime = train_one(config, run_dir, device, observer, made)
        except BaseException:
            interrupt.remove_unused()
            raise
    code = _close(plan, result, runtime)
    if interrupt.signum is not None and result.status == "interrupted":
        leave(128 + interrupt.signum)
    runtime.leave()
    return code


def _pictures(folder: Path) -> None:
    from saeopt.views.plots import plot_run

    plot_run(folder)


def _close(plan: TrialPlan, result: TrialResult, runtime: Runtime) -> int:
    """The table and where the files are."""
    from saeopt.console import log
    from saeopt.views.report import print_run

    if not runtime.ranks.is_first:
        return int(result.status == "diverged")
    if result.status == "interrupted":
        log.info("interrupted after %s samples; go on with --resume %s", f"{result.samples:,}", plan.run_dir)
        return 0
    if result.status == "lost":
        raise UserError(f"{plan.run_dir}: another process has taken this run over")
    if result.reason:
        log.warning("%s: %s", result.status, result.reason)
    print_run(plan.run_dir, result.evaluation)
    return int(result.status == "diverged")


def main() -> None:
    """The command."""
    run_cli(app)


if __name__ == "__main__":
    main()
