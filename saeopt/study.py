"""Studies: `saeopt study COMMAND`, also `python -m saeopt.study`. A thin command line over `saeopt.search`."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from saeopt.console import console, log, say, say_json, set_up_logging, wrapped
from saeopt.errors import UserError
from saeopt.options import AsJson, Changes, Storage, StudyName, new_app, result, run_cli
from saeopt.runs.names import METRICS_FILE
from saeopt.validation import validate

if TYPE_CHECKING:
    from saeopt.trials.storage import Store

app = new_app(no_args_is_help=True, help="Create, watch, mend and export studies.")
app.command()(validate)
PATIENCE_S = 10.0  # that a store which does not answer is asked again


def _open(storage: str | None, *, create: bool = False) -> Store:
    from saeopt.trials.storage import Store

    set_up_logging()
    return Store.open(storage, create=create, patience=PATIENCE_S)


@app.command()
def create(
    file: Annotated[Path | None, typer.Argument(metavar="STUDY_FILE", help="A study's YAML file.")] = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Default: the name of the (base) file.")] = None,
    base_config: Annotated[Path | None, typer.Option(metavar="FILE", help="A run's YAML file.")] = None,
    sweep_config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Lists of values for it: a grid study.")
    ] = None,
    output_dir: Annotated[str | None, typer.Option(metavar="DIR", help="Run folders go to DIR/NAME/TRIAL.")] = None,
    max_trials: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="The study has at most N trials: of a grid the first.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, hidden=True)] = None,  # its old name
    overrides: Changes = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print cells, packs, estimated memory and time; store nothing.")
    ] = False,
    elsewhere: Annotated[
        bool, typer.Option("--elsewhere", help="Model and data lie on the workers' hosts: do not look for them here.")
    ] = False,
    storage: Storage = None,
) -> None:
    """Create a study from a study file, or from two configs.

    Two configs are --base-config and --sweep-config. The same command again makes no new cells.
    """
    from saeopt.config.given_study import given_spec, with_base
    from saeopt.creation import created, looked_up, planned_trials
    from saeopt.search.stopping import with_default_rule

    def is_there(name: str) -> bool:
        with suppress(UserError):
            return name in _open(storage).study_names()
        return False

    spec = given_spec(file, name, base_config, sweep_config, output_dir, max_trials or limit)
    if overrides:
        spec = with_base(spec, overrides, file or base_config)
    spec = with_default_rule(spec)
    spec, said = looked_up(spec, dry_run, elsewhere, is_there, storage)
    if dry_run:
        from saeopt.views.preview import print_preview

        planned_trials(spec, elsewhere, is_there)  # what is refused is refused before anything is printed
        print_preview(spec)
        for about in said:
            say(about)
    else:
        for line in created(spec, elsewhere, is_there, lambda: _open(storage, create=True), said):
            say(line)


@app.command("list")
def list_studies(as_json: AsJson = False, storage: Storage = None) -> None:
    """All studies of a store."""
    from saeopt.views.studies import list_rows, list_table

    store = _open(storage)
    if as_json:
        say_json(list_rows(store))
    else:
        console.print(list_table(store), crop=False)


@app.command()
def show(name: StudyName, as_json: AsJson = False, storage: Storage = None) -> None:
    """What a study searches and where its files are, as YAML."""
    import yaml

    from saeopt.views.monitoring import artifact_dir

    store = _open(storage)
    spec = store.spec(name)
    if as_json:
        where = {"storage": store.shown, "run_folders": str(spec.runs), "artifacts": str(artifact_dir(spec))}
        say_json({**spec.model_dump(mode="json", by_alias=True), **where})
        return
    say(yaml.safe_dump(spec.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True).rstrip())
    say(f"# storage: {store.shown}\n# run folders: {spec.runs}\n# artifacts: {artifact_dir(spec)}")
    say(f"# dashboard: {store.command('dashboard')}")


@app.command()
def status(
    name: StudyName,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep the table up to date until Ctrl-C.")] = False,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.2, help="Seconds between two looks with --watch.")
    ] = 5.0,
    as_json: AsJson = False,
    storage: Storage = None,
) -> None:
    """Trials, workers, time left, and the best SAEs so far."""
    from saeopt.views import status as views
    from saeopt.views.status import gather, render

    store = _open(storage)
    if as_json:
        say_json(views.as_json(gather(store, name)))
        return
    if not watch:
        console.print(render(gather(store, name)), crop=False)
        return
    from rich.live import Live

    from saeopt.trials.storage import persistently

    found = gather(store, name)
    with Live(render(found), console=console, auto_refresh=False) as live:
        while found.remaining or found.refines:
            time.sleep(interval)
            found = persistently(lambda: gather(store, name), "status")
            live.update(render(found), refresh=True)


@app.command()
def best(
    name: StudyName,
    hook: Annotated[str | None, typer.Option("--hook", metavar="NAME", help="Only this hook point.")] = None,
    by: Annotated[
        str, typer.Option(metavar="METRIC", help="Metric that the best of a range of L0 has, e.g. ce_recovered.")
    ] = "fvu",
    png: Annotated[Path | None, result("Also draw the fronts into this file (.pdf and .svg too).")] = None,
    importances: Annotated[
        bool, typer.Option("--importances", help="Also which parameters mattered, per hook point and objective.")
    ] = False,
    infeasible: Annotated[
        bool, typer.Option("--infeasible", help="Also those that violate a constraint of the study.")
    ] = False,
    copy: Annotated[Path | None, result("Also copy their weights and configs to DIR/NAME-TRIAL/.", "DIR")] = None,
    as_json: AsJson = False,
    storage: Storage = None,
) -> None:
    """The Pareto front and the best SAE per range of L0.

    Also their parameters, and where their weights lie.
    """
    from saeopt.views import best as views
    from saeopt.views import importance as shares
    from saeopt.views import recommended as auto

    store = _open(storage)
    points, trials = views.load_points(store, name, infeasible)
    advice = auto.read(store, name, hook)
    points = views.chosen(points, hook)
    found = views.find_best(points, by)
    mattered = shares.find_importances(store, name, points, trials) if importances else []
    if as_json:
        told = views.as_json(found, trials, advice)
        for hook_point, objectives in shares.as_json(mattered).items():
            told[hook_point]["importances"] = objectives
        say_json(told)
    else:
        console.print(views.best_tables(found, trials, by, store.command("study", "best", name)), crop=False)
        if (table := auto.recommended_table(advice)) is not None:
            console.print(table, crop=False)
        if mattered:
            console.print(shares.importance_tables(mattered), crop=False)
    tell = log.info if as_json else say
    if png is not None:
        from saeopt.views.plots import pareto_plot

        tell(f"front: {pareto_plot(points, png)}")
    if copy is not None:
        tell(f"{len(views.copy_best(found, trials, copy, name))} run folders in {copy}")


@app.command()
def export(
    name: StudyName,
    configs: Annotated[Path | None, result("One runnable YAML per cell.", "DIR")] = None,
    csv: Annotated[Path | None, result("A row per trial and hook point.")] = None,
    parquet: Annotated[Path | None, result("The same as Parquet.")] = None,
    wandb_sweep: Annotated[Path | None, result("A W&B sweep definition of the same space.")] = None,
    storage: Storage = None,
) -> None:
    """Write a study to files."""
    from saeopt.views import export as files

    if configs is None and csv is None and parquet is None and wandb_sweep is None:
        raise UserError("export needs --configs DIR, --csv FILE, --parquet FILE or --wandb-sweep FILE")
    store = _open(storage)
    if configs is not None:
        say(f"{len(files.export_configs(store, name, configs))} configs in {configs}")
    if csv is not None:
        say(f"{files.export_csv(store, name, csv)} rows in {csv}")
    if parquet is not None:
        say(f"{files.export_parquet(store, name, parquet)} rows in {parquet}")
    if wandb_sweep is not None:
        from saeopt.views.wandb_sweep import export_wandb_sweep

        (*sweeps, base), notices = export_wandb_sweep(store.spec(name), wandb_sweep)
        for sweep in sweeps:
            say(f"W&B sweep in {sweep}, its base config in {base}; start it with: wandb sweep {sweep}")
        for notice in notices:
            log.info(notice)


@app.command()
def why(
    name: StudyName,
    trial: Annotated[int | None, typer.Argument(metavar="TRIAL", help="Default: all that have ended early.")] = None,
    as_json: AsJson = False,
    storage: Storage = None,
) -> None:
    """Why trials ended early, and who beat them by how much."""
    from saeopt.views import why as views

    rows = views.explained(_open(storage), name, trial)
    if as_json:
        say_json([row.as_json() for row in rows])
        return
    for row in rows:
        say(wrapped(row.text))
    if not rows:
        say(f"no trial of study {name} was stopped, collapsed or failed")


@app.command()
def retry(
    name: StudyName,
    trials: Annotated[list[int] | None, typer.Argument(metavar="TRIAL", help="Default: all failed trials.")] = None,
    storage: Storage = None,
) -> None:
    """Put failed trials back into the queue.

    They go on from their last checkpoint.
    """
    from saeopt.trials import endings
    from saeopt.views.logs import find_trial
    from saeopt.views.spending import waiting_again

    store = _open(storage)
    study_id = store.study_id(name)
    for number in trials or []:
        row, _ = find_trial(store, name, str(number))
        if row.state != "FAIL":
            go_on = f"; '{store.command('study', 'promote', name, number)}' lets it go on"
            more = go_on if row.state == "PAUSED" else ""
            raise UserError(f"trial {number} of study '{name}' has not failed: it is {row.state}{more}")
    say(waiting_again(name, endings.retry(store, study_id, trials or None)))


@app.command()
def promote(
    name: StudyName,
    trials: Annotated[list[int], typer.Argument(metavar="TRIAL", help="Numbers of paused trials.")],
    storage: Storage = None,
) -> None:
    """Let paused trials go on from their rung.

    Also those that were paused when the study ended. They train to their end: no later rung pauses them.
    """
    from saeopt.trials import paused
    from saeopt.views.logs import find_trial
    from saeopt.views.spending import going_on

    store = _open(storage)
    study_id = store.study_id(name)
    with store.read() as connection:
        known = paused.numbers(connection, study_id)
    for number in trials:
        row, _ = find_trial(store, name, str(number))
        if number not in known:
            paused_ones = f" (paused are {', '.join(map(str, sorted(known)))})" if known else " (none is)"
            raise UserError(f"trial {number} of study '{name}' is not paused: it is {row.state}{paused_ones}")
    for line in going_on(store, name, paused.promote(store, study_id, trials)):
        say(line)


@app.command()
def stop(name: StudyName, storage: Storage = None) -> None:
    """Ask all workers to checkpoint and to hand their trials back."""
    from saeopt.trials import claims

    store = _open(storage)
    claims.set_stopped(store, store.study_id(name), True)
    go_on = store.command("study", "resume", name)
    say(f"study {name} is stopped: workers checkpoint and release; they go on after {go_on}")


@app.command()
def resume(
    name: StudyName,
    budget: Annotated[
        list[str] | None, typer.Option("--budget", metavar="UNIT=NUMBER", help="More, in all; as tokens=2e9.")
    ] = None,
    storage: Storage = None,
) -> None:
    """Let a study go on that was stopped or has ended by itself.

    What its trials may spend in all (gpu_hours, tokens, trials, disk_gb) is changed by --budget.
    """
    from saeopt.views import spending

    for line in spending.resume(_open(storage), name, budget or []):
        say(line)


@app.command()
def clean(
    name: StudyName,
    keep: Annotated[
        str | None, typer.Option(metavar="front", help="Also remove weights, but those of the front and of the best.")
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option(metavar="KIND", help="Also checkpoints of paused, waiting or failed trials.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do it; without it nothing is removed.")] = False,
    storage: Storage = None,
) -> None:
    """Remove files that nobody needs any more from the run folders.

    Without options that is what only resuming needs, of trials that have ended. Trials that run lose nothing.
    """
    from saeopt.views import disk

    for line in disk.clean(_open(storage), name, keep, also or [], yes):
        say(line)


@app.command()
def delete(
    name: StudyName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    storage: Storage = None,
) -> None:
    """Delete a study from the store. Its run folders stay."""
    import optuna

    from saeopt.views.status import gather

    store = _open(storage)
    found = gather(store, name)
    if found.alive and not yes:
        raise UserError(f"{len(found.alive)} workers are at work on study '{name}': stop it first, or give --yes")
    if not yes:
        question = f"Delete study {name} with {len(found.rows)} trials from {store.shown}? (run folders stay)"
        typer.confirm(question, abort=True)
    optuna.delete_study(study_name=name, storage=store.optuna)
    say(f"study {name} deleted; its run folders are still in {found.spec.runs}")


@app.command()
def logs(
    name: StudyName,
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="The trial's number.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more until the trial ends.")] = False,
    storage: Storage = None,
) -> None:
    """How a trial stands, why it ended, and its metrics."""
    from saeopt.views.logs import find_trial, has_ended, head, lines, log_lines

    store = _open(storage)
    row, run_dir = find_trial(store, name, trial)
    for text in [*head(row, run_dir), *log_lines(run_dir)]:
        say(text)
    for text in lines(run_dir / METRICS_FILE, (lambda: has_ended(store, name, trial)) if follow else None):
        say(text)


def main() -> None:
    """The command."""
    run_cli(app)


if __name__ == "__main__":
    main()
