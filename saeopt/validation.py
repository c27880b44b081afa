"""`saeopt study validate`: files are checked as `study create` and `train` check them, and nothing is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saeopt.console import say, set_up_logging
from saeopt.errors import UserError, tell

_OF_A_STUDY = {"base", "space", "objectives", "sampler", "early_stopping", "max_trials"}
_OF_A_RUN = {"data", "saes", "tlens_model_name", "tlens_model_path"}
_OF_HUB = " (hook points: not looked at, the model is one of the hub)"


def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Study files and run configs.")],
    elsewhere: Annotated[
        bool, typer.Option("--elsewhere", help="Model and data lie on the workers' hosts: do not look for them here.")
    ] = False,
) -> None:
    """Check study files and configs; store nothing.

    One line for each mistake that is found; the exit code is then 2.
    """
    set_up_logging()
    problems = 0
    for file in files:
        try:
            say(f"{file}: {checked(file, elsewhere)}")
        except UserError as error:
            problems += 1
            for line in (str(error), *error.more):
                tell(line if str(file) in line else f"{file}: {line}")
    raise typer.Exit(2 if problems else 0)


def checked(file: Path, elsewhere: bool) -> str:
    """What a file holds, in words.

    Raises:
        UserError: what is wrong with it; `more` has what else is.
    """
    from saeopt.config import read_yaml

    raw = read_yaml(file)
    if raw.keys() & _OF_A_STUDY:
        return _study(file, elsewhere)
    if raw.keys() & _OF_A_RUN:
        return _run(file, elsewhere)
    raise UserError(
        f"{file}: is neither a study file (no 'base', no 'space') nor a run config (no 'data', no 'saes'); a sweep"
        " config is checked by: saeopt study create --base-config FILE --sweep-config FILE --dry-run"
    )


def _study(file: Path, elsewhere: bool) -> str:
    from saeopt.config.given_study import given_spec
    from saeopt.creation import looked_up, planned_trials
    from saeopt.search.stopping import with_default_rule

    spec = with_default_rule(given_spec(file, None, None, None, None, None))
    spec, _ = looked_up(spec, True, elsewhere, lambda _name: False, None)
    cells, proposed = planned_trials(spec, elsewhere, lambda _name: False)
    here = spec.base.get("tlens_model_path") or spec.base["data"].get("activations") or "tlens_model_path" in spec.space
    of_hub = not (here or elsewhere)
    return f"study {spec.name}, {len(cells) + proposed} trials{_OF_HUB if of_hub else ''}"


def _run(file: Path, elsewhere: bool) -> str:
    from saeopt.config import load_run_config, told_of
    from saeopt.config.sense import check_sense
    from saeopt.reach import reached
    from saeopt.training.loggers import check_sinks

    config = load_run_config(file)
    with told_of(config, file):
        check_sense(config)
        check_sinks(config)
        of_hub = not elsewhere and reached(config) is None
    return f"run config, {config.saes.sae_type}{_OF_HUB if of_hub else ''}"
