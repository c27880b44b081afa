"""`saeopt init` and `saeopt configs`: a folder to start in, and the configs and studies that come with saeopt."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from saeopt.console import console, say, unbroken
from saeopt.errors import UserError
from saeopt.options import new_app

app = new_app(no_args_is_help=True, help="The configs and studies that come with saeopt.")
MODEL, DATA, HOOK = "roneneldan/TinyStories-1M", "roneneldan/TinyStories", "blocks.2.hook_resid_pre"
_STARTER = Path(__file__).with_name("starter")
_FILES = {"config.yaml": "config.yaml", "study.yaml": "study.yaml", "README.md": "README.md", ".gitignore": "gitignore"}
Names = Annotated[list[str], typer.Argument(metavar="NAME", help="A file, with or without its folder; or a folder.")]


def init(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A new folder. Without it: the folder you are in.")
    ] = None,
    model: Annotated[str, typer.Option(metavar="NAME", help="Language model: a folder, or a name of the hub.")] = MODEL,
    data: Annotated[str, typer.Option(metavar="NAME", help="Text: a file, a folder, or a name of the hub.")] = DATA,
    hook: Annotated[str, typer.Option(metavar="NAME", help="Hook point at which the SAEs train.")] = HOOK,
) -> None:
    """Make a folder to start in: config, study, README.

    Text and model are those of TinyStories-1M, from the hub, or yours.
    """
    from saeopt.files import write_text

    folder = Path(name) if name is not None else Path()
    if name is not None and (folder.exists() or folder.is_symlink()):
        raise UserError(f"{name}: is there already (without NAME, init fills the folder you are in)")
    there = [file for file in _FILES if (folder / file).exists()]
    if there:
        raise UserError(f"{folder / there[0]}: is there already: init overwrites nothing")
    texts = _started(folder.absolute().name, model, data, hook)
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        write_text(folder / file, text)
    say(f"{', '.join(texts)} in {folder}")
    if name is not None:
        say(f"  cd {name}")
    say("  saeopt study validate config.yaml study.yaml\n  saeopt train config.yaml")


def _started(name: str, model: str, data: str, hook: str) -> dict[str, str]:
    """The files of a project folder; :class:`UserError` where what was given makes no valid config."""
    from saeopt.config.io import parse_yaml, validate_run
    from saeopt.config.study_file import study_spec

    here = {text: str(Path(text).expanduser().absolute()) for text in (model, data) if Path(text).expanduser().exists()}
    at = here.get(model)
    values = {
        "name": name, "model": model, "data": _quoted(here.get(data, data)), "hook": _quoted(hook),
        "model_field": f"tlens_model_path: {_quoted(at)}" if at else f"tlens_model_name: {_quoted(model)}",
    }  # fmt: skip
    told = re.compile("{(" + "|".join(values) + ")}")
    texts = {
        file: told.sub(lambda found: values[found[1]], (_STARTER / source).read_text(encoding="utf-8"))
        for file, source in _FILES.items()
    }
    config, study = parse_yaml(texts["config.yaml"]), parse_yaml(texts["study.yaml"])
    validate_run(config, "init")
    study_spec({**study, "base": config}, "init")
    return texts


def _quoted(text: str) -> str:
    """A YAML scalar that is read as this text."""
    import yaml

    return yaml.safe_dump(text, width=10**6, allow_unicode=True).partition("\n")[0]


@app.command("ls")
def list_configs(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Only these files or folders.")] = None,
) -> None:
    """What there is, and what it is for."""
    from rich.table import Table

    from saeopt.config import shipped

    found = shipped.named(names) if names else shipped.names()
    for folder in dict.fromkeys(name.rpartition("/")[0] for name in found):
        table = Table(box=None, show_header=False, padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column()
        for name in (n for n in found if n.rpartition("/")[0] == folder):
            table.add_row(f" {Path(name).stem}", shipped.title(name))
        console.print(unbroken(f"{folder}/"))
        console.print(table)


@app.command()
def show(names: Names) -> None:
    """Print files."""
    from saeopt.config import shipped

    for name in shipped.named(names):
        say((shipped.root() / name).read_text(encoding="utf-8").rstrip())


@app.command("cp")
def copy(
    names: Names,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Default: the folder you are in.")] = Path(),
) -> None:
    """Copy files to configs and studies in this folder.

    A study comes with the config that it starts from, a sweep with its base.

    What is there already is not overwritten.
    """
    from saeopt.config import shipped
    from saeopt.files import write_text

    wanted = shipped.with_bases(shipped.named(names))
    asked = shipped.named(names)
    for name in asked:
        if (to / name).exists():
            raise UserError(f"{to / name}: is there already: cp overwrites nothing")
    for name in wanted:
        if name in asked or not (to / name).exists():  # a base that is there may have been changed: it stays
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(to / name, (shipped.root() / name).read_text(encoding="utf-8"))
            say(str(to / name))
