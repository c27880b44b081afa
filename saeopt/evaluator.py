"""`saeopt evaluate RUN_DIR`, also `python -m saeopt.evaluation RUN_DIR`: evaluate what any run saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from saeopt.console import console, set_up_logging
from saeopt.host.launcher import check_alone
from saeopt.options import AsJson, Changes, Device, new_app, run_cli
from saeopt.runs.names import EVALUATION

app = new_app()


@app.command()
def evaluate_run(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="A run folder, or a samples_<N>.safetensors file.")
    ],
    checkpoint: Annotated[
        str | None, typer.Option(metavar="N", help="Number of samples or file; default: the newest that is whole.")
    ] = None,
    device: Device = "auto",
    n_eval_samples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Held-out samples; default: those of the run's config.")
    ] = None,
    overrides: Changes = None,
    data: Annotated[
        str | None, typer.Option(metavar="FILE", help="Other data than the run's: a file, folder or hub name.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All samples that --data holds, or the run's own held-out data set.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write here; default: a name in the run folder.")
    ] = None,
    cross_entropy: Annotated[
        bool, typer.Option("--cross-entropy/--no-cross-entropy", help="Also splice x̂ into the language model.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Evaluate what a run saved on its held-out samples.

    Writes evaluation.json and plots into the run folder; other data and other settings go to a file of their own.
    """
    from saeopt.evaluation.conditions import file_for, settings, with_conditions
    from saeopt.evaluation.held_out import config_of, is_older, measure, on_other_data
    from saeopt.files import write_json
    from saeopt.host.devices import choose_device
    from saeopt.imports.find import refuse_foreign
    from saeopt.runs.weights import load_checkpoint
    from saeopt.views.plots import plot_run

    set_up_logging()
    check_alone("evaluate", "call it without a launcher")
    chosen = choose_device(device)
    refuse_foreign(run_dir)
    loaded = load_checkpoint(run_dir, checkpoint, chosen)
    config = config_of(run_dir, loaded, [*(overrides or []), *on_other_data(loaded, data)])
    metrics, told = measure(loaded, config, chosen, n_eval_samples, cross_entropy, everything)
    folder, run = loaded.path.parent, config_of(run_dir, loaded, [])
    own = settings(run, run.data.n_eval_samples)
    target = output or file_for(told, own, folder, [str(loaded.samples)] if is_older(loaded) else [])
    write_json(target, with_conditions(metrics, told))
    if target == folder / EVALUATION:
        plot_run(folder)
    _show(folder, target, metrics, told, as_json)


def _show(folder: Path, target: Path, metrics: Mapping[str, Any], conditions: Mapping[str, Any], as_json: bool) -> None:
    """The metrics, which file they are in, where that is not the usual one, and what was evaluated on."""
    from saeopt.views.report import print_run

    if as_json:
        console.print_json(target.read_text(encoding="utf-8"))
        return
    print_run(folder, metrics)
    if target != folder / EVALUATION:
        console.print(f"{'this one':>10}  {target}", soft_wrap=True)
    size = f"{conditions['n_samples']:,} samples of {conditions['context_length']} tokens"
    console.print(f"{'data':>10}  {conditions['data']}: {size}", soft_wrap=True)


def main() -> None:
    """The command."""
    run_cli(app)


if __name__ == "__main__":
    main()
