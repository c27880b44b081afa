"""The installed command `saeopt`, one application of all commands. Each imports what is slow when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from saeopt import dashboard, evaluator, exporter, project, study, train, worker
from saeopt.options import new_app, run_cli

app = new_app(add_completion=True, no_args_is_help=True)
app.command("train")(train.train)
app.add_typer(study.app, name="study")
app.command("worker")(worker.worker)
app.command("evaluate")(evaluator.evaluate_run)
app.command("evaluation", hidden=True)(evaluator.evaluate_run)
app.command("export")(exporter.export)
app.command("dashboard")(dashboard.dashboard)
app.command("init")(project.init)
app.add_typer(project.app, name="configs")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("saeopt"))
        raise typer.Exit


@app.callback()
def saeopt(
    _wanted: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
) -> None:
    """Train and evaluate sparse autoencoders on language-model activations, at the scale of sweeps."""


def main() -> None:
    """The command."""
    run_cli(app)


if __name__ == "__main__":
    main()
