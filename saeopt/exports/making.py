"""Exports: every SAE through its format into a new folder, its card beside it, the set's card and table on top."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from saeopt.errors import HostError, UserError
from saeopt.exports.card import CARD, sae_card, set_card
from saeopt.exports.formats import REPO, About, Format, Placed, Release, get_format, nearest_format
from saeopt.exports.sources import Leaving
from saeopt.files import remove_empty, sync_folder, write_error, write_text


@dataclass(frozen=True)
class How:
    """How SAEs leave."""

    to: str
    """The format's name."""
    unit_decoder: bool = False
    license: str | None = None
    repo: str | None = None
    """Where on the hub they will lie."""
    command: str | None = None
    """What is to stand in the cards as what wrote them."""


def export_saes(saes: Iterable[Leaving], keys: Sequence[str], how: How, folder: Path) -> Release:
    """Write SAEs, cards and what the format has for a set into a new folder, all or nothing.

    `keys`: the site of each SAE of a study, to know which have several. What is there already in the same form stays.

    Raises:
        UserError: the format cannot say one of them, or the folder holds something else.
        HostError: the folder cannot be written.
    """
    form, of_site, placed = get_format(how.to), Counter(keys), list[Placed]()
    with _new_folder(folder, how.repo) as made:
        for one in saes:
            about = _with(one, how, form)
            where = form.place(about, of_site[about.site.key] <= 1)
            (made / where).mkdir(parents=True, exist_ok=where == ".")
            _write(form, replace(one, about=about), made / where)
            placed.append(Placed(about, where))
        sites = list(dict.fromkeys(each.about.site.key for each in placed))
        placed.sort(key=lambda each: sites.index(each.about.site.key))
        release = Release(folder.absolute().name, tuple(placed))
        if (problem := form.set_problem(release)) is not None:
            raise UserError(f"{form.name}: {problem}")
        form.finish(release, made)
        for each in placed:
            if each.folder != ".":
                write_text(made / each.folder / CARD, sae_card(form, release, each))
        write_text(made / CARD, set_card(form, release))
    return release


def _with(one: Leaving, how: How, form: Format) -> About:
    """What is known of an SAE, with what it tells itself and how it leaves."""
    sae = one.sae
    return replace(
        one.about, architecture=sae.config.sae_type, normalised_by=sae.normalisation, latents=sae.h,
        license=how.license, exported_by=how.command,
        unit_decoder=how.unit_decoder or sae.config.sae_type in form.unit_rows,
    )  # fmt: skip


def _write(form: Format, one: Leaving, target: Path) -> None:
    """Write one SAE, or refuse it with the reason and the nearest format that can."""
    from saeopt.saes.portable import portable

    about, key = one.about, one.about.site.key
    try:
        given = portable(one.sae)
    except UserError as error:
        if one.sae.unit_lengths is not None:
            raise  # the SAE that it was made of can leave
        if about.unit_decoder:
            raise UserError(f"--unit-decoder: not for '{key}': {error}") from None
        if form.write_whole(one.sae, about, target) is None:
            raise _refusal(form, about, str(error), nearest_format(None, about.site)) from None
        return
    if about.unit_decoder:
        if not given.selection_holds:
            raise UserError(f"--unit-decoder: not for '{key}': its decoder rows differ in length, and other latents"
                            " would be among the k largest")  # fmt: skip
        given = given.unit_rows()
    if (problem := form.problem(given, about.site)) is not None:
        raise _refusal(form, about, problem, nearest_format(given, about.site))
    form.write(given, about, target)


def _refusal(form: Format, about: About, why: str, near: str) -> UserError:
    source = f" of {about.name}" if about.name else ""
    return UserError(f"{form.name} cannot hold '{about.site.key}'{source}: {why}; nearest format that can: --to {near}")


@contextmanager
def _new_folder(folder: Path, repo: str | None) -> Iterator[Path]:
    """A folder beside it that takes its place on success, and leaves nothing behind otherwise."""
    if folder.exists() and not (folder.is_dir() and (_is_empty(folder) or (folder / CARD).exists())):
        raise UserError(f"{folder}: is there already: give a folder that is not there yet, or an empty one")
    made = folder.absolute().parent / f".{folder.absolute().name}.{os.getpid()}.tmp"
    parents = [parent for parent in made.parents if not parent.exists()]
    try:
        made.mkdir(parents=True)
        yield made
        if repo is not None:
            fill_in(made, repo)
        _put(made, folder, repo)
    except HostError as error:  # of a file that is gone in a moment
        raise HostError(str(error).replace(str(made), str(folder))) from error
    except OSError as error:
        raise write_error(folder, error) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
        remove_empty(parents)


def _put(made: Path, folder: Path, repo: str | None) -> None:
    """Rename, or find that the same is there."""
    if not folder.exists() or _is_empty(folder):
        made.replace(folder)
        sync_folder(folder.absolute().parent)
        return
    if repo is not None and _texts(made) == _texts(folder, repo):
        fill_in(folder, repo)
    if not _same(made, folder):
        pushed = f"; 'saeopt export {folder} --push {repo}' pushes it as it is" if repo is not None else ""
        raise UserError(f"{folder}: holds another export, or files were changed there: give another folder{pushed}")


def fill_in(folder: Path, repo: str) -> None:
    """Say in the text files of an export where on the hub it lies."""
    for name, text in _texts(folder).items():
        if REPO in text:
            write_text(folder / name, text.replace(REPO, repo))


def _texts(folder: Path, repo: str = REPO) -> dict[str, str]:
    found = [path for path in _files(folder) if path.suffix in (".md", ".yaml")]
    return {str(p.relative_to(folder)): p.read_text(encoding="utf-8").replace(REPO, repo) for p in found}


def _same(one: Path, other: Path) -> bool:
    names = [path.relative_to(one) for path in _files(one)]
    if names != [path.relative_to(other) for path in _files(other)]:
        return False
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts)


def _is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())
