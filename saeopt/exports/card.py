"""Model cards: README.md of an SAE and of a set, with the front matter that the hub reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from saeopt.exports.formats import About, Format, Placed, Release
from saeopt.metrics import METRICS, Shown, in_order, shown_in

CARD = "README.md"
_TAGS = ["sparse-autoencoder", "mechanistic-interpretability", "saeopt"]
_TERMS = "f is the code, x the raw activations, x̂ what the SAE gives for them, n the number of held-out tokens counted."
_ELSEWHERE = " Where an SAE writes another hook point than it reads, x in the metrics is what it is to give."


def set_card(form: Format, release: Release) -> str:
    """The card of all SAEs of a set."""
    abouts = [placed.about for placed in release.placed]
    shown = [m for m in shown_in(Shown.TABLE) if any(m.of(a.metrics) is not None for a in abouts)]
    rows = [[_link(p), *(metric.text(metric.of(p.about.metrics)) for metric in shown)] for p in release.placed]
    what = _count(len(abouts), "SAE")
    usage = form.usage(release, release.placed[0])
    parts = [
        _front(form, abouts),
        f"# {release.name}",
        f"{what} of {_model(abouts)}, {_trained(abouts)}, in the format `{form.name}`. {_units(abouts)}",
        _table(["SAE", *(metric.title for metric in shown)], rows),
        "## Load\n" + _code("python", usage) if usage else "",
        _definitions(abouts),
        _made(abouts),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def sae_card(form: Format, release: Release, placed: Placed) -> str:
    """The card of one SAE: what, on what data, its metrics, and the command and config that made it."""
    about = placed.about
    usage = form.usage(release, placed)
    names = [name for name in in_order(about.metrics) if name in METRICS]
    metrics = [[f"`{name}`", METRICS[name].text(about.metrics[name]), METRICS[name].what] for name in names]
    parts = [
        _front(form, [about]),
        f"# {about.site.key}",
        _table(["", ""], [[name, value] for name, value in _facts(about).items() if value]),
        _units([about]),
        "## Load\n" + _code("python", usage) if usage else "",
        _metrics_head([about]) + _table(["metric", "value", "what it is"], metrics) if metrics else "",
        _made([about]),
        "" if about.config is None else "## config.yaml\n" + _code("yaml", about.config),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _facts(about: About) -> dict[str, str | None]:
    """What is known of an SAE, as people read it."""
    seed = "" if about.seed is None else f", seed {about.seed}"
    return {
        "architecture": about.architecture and f"`{about.architecture}`",
        "latents": _number(about.latents),
        "reads": ", ".join(f"`{hook}`" for hook in about.site.reads),
        "writes": ", ".join(f"`{hook}`" for hook in about.site.writes),
        "language model": about.model and f"`{about.model}`",
        "its weights": "folded and centred (`lm_processing: compatibility`)" if about.compatibility else None,
        "evaluated on" if about.kept else "data": about.dataset and f"`{about.dataset}`",
        "tokenizer": about.tokenizer and f"`{about.tokenizer}`",
        "tokens per sample": _number(about.context_size),
        "BOS before every sample": _word(about.prepend_bos, "yes", "no"),
        "special tokens": _word(about.masks_special_tokens, "left out", "counted"),
        "positions left out at the start": _number(about.skip_first_positions),
        "from": about.name and about.name + seed,
        "trained on": _number(about.samples, " samples"),
        "weights": "imported, and not trained on (`saes.retrain_saes: false`)" if about.kept else None,
    }


def _word(value: bool | None, yes: str, no: str) -> str | None:
    return None if value is None else yes if value else no


def _number(value: int | None, unit: str = "") -> str | None:
    return f"{value:,}{unit}" if value else None


def _link(placed: Placed) -> str:
    name = placed.about.site.key if placed.folder == "." else placed.folder
    return f"`{name}`" if placed.folder == "." else f"[`{name}`]({placed.folder}/{CARD})"


def _front(form: Format, abouts: Sequence[About]) -> str:
    """The front matter; only what the hub can resolve is named as a model or a data set."""
    found: dict[str, Any] = {"license": next((a.license for a in abouts if a.license), "unknown")}
    if form.library is not None:
        found["library_name"] = form.library
    found["tags"] = _TAGS
    for name, values in (("base_model", [a.hub_model for a in abouts]), ("datasets", [a.hub_dataset for a in abouts])):
        if known := sorted({value for value in values if value}):
            found[name] = known
    return f"---\n{yaml.safe_dump(found, sort_keys=False, allow_unicode=True)}---"


def _model(abouts: Iterable[About]) -> str:
    return ", ".join(sorted({f"`{a.model}`" for a in abouts if a.model})) or "a language model"


def _trained(abouts: Sequence[About]) -> str:
    data = ", ".join(sorted({f"`{a.dataset}`" for a in abouts if a.dataset}))
    what = {False: "trained", True: "evaluated"}
    done = " or ".join(word for kept, word in what.items() if kept in {a.kept for a in abouts})
    return f"{done} on {data} with saeopt {abouts[0].version}" if data else f"written by saeopt {abouts[0].version}"


def _units(abouts: Iterable[About]) -> str:
    unit = any(about.unit_decoder for about in abouts)
    code = "decoder rows have norm 1, the code is longer by as much" if unit else "the code is that of the training"
    kinds = sorted({about.normalised_by for about in abouts if about.normalised_by not in (None, "none")})
    folded = f"; what normalised them in training (`{'`, `'.join(kinds)}`) is folded in" if kinds else ""
    return f"Weights take and give raw activations{folded}; {code}."


def _metrics_head(abouts: Iterable[About]) -> str:
    return f"## Metrics\n{_TERMS}{'' if all(about.site.one for about in abouts) else _ELSEWHERE}\n\n"


def _definitions(abouts: Sequence[About]) -> str:
    """What each metric is, from the registry."""
    names = in_order({name for about in abouts for name in about.metrics})
    rows = [[METRICS[name].title, f"`{name}`", METRICS[name].what] for name in names if name in METRICS]
    return _metrics_head(abouts) + _table(["", "metric", "what it is"], rows) if rows else ""


def _made(abouts: Iterable[About]) -> str:
    commands = dict.fromkeys(c for a in abouts for c in (a.command, a.exported_by) if c)
    return "" if not commands else "## Made by\n" + _code("bash", "\n".join(commands))


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"
