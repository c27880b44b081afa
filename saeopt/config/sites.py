"""Where a dictionary reads and what it must give. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self
from urllib.parse import quote

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from saeopt.config.base import StrictModel, Text
from saeopt.errors import UserError

_PATTERN = "*?["
_NAME = re.compile(r"[^\s@=,*?\[\]]+")
"""What a key may hold: `saes.k@KEY=3` and lists of objectives must still be read."""
_TAKEN = ("mean", "all")
"""What objectives mean by these words."""


_ATTENTION_OUTPUT = re.compile(r"(^|\.)(hook_attn_out|attn\.hook_(z|out|result))$")


def is_attention_output(hook: str) -> bool:
    """Whether activations there are known to lie in few dimensions (arXiv 2508.16929)."""
    return _ATTENTION_OUTPUT.search(hook) is not None


@dataclass(frozen=True)
class Site:
    """The hook points that a dictionary reads and those that it writes, each in this order.

    `key` names the site in files, attributes, objectives and `saes.field@KEY`: the hook point where both are one.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    key: str

    @classmethod
    def of(cls, hook: str) -> Site:
        """The site of an autoencoder at one hook point."""
        return cls((hook,), (hook,), hook)

    @property
    def one(self) -> bool:
        """Whether it reads and writes one and the same hook point."""
        return len(self.reads) == 1 and self.reads == self.writes

    @property
    def hooks(self) -> tuple[str, ...]:
        """All hook points, without doubles."""
        return tuple(dict.fromkeys(self.reads + self.writes))

    @property
    def file_name(self) -> str:
        """The key as a folder or file may be called."""
        return quote(self.key, safe="+")


class SiteEntry(StrictModel):
    """An entry of `saes.sae_positions` for what reads and writes different hook points, or several."""

    read: Annotated[list[Text], Field(min_length=1)]
    """Hook points that are read, side by side."""
    write: Annotated[list[Text], Field(min_length=1)]
    """Hook points that are to be given."""
    name: Text | None = None
    """What the site is called; null: `READ->WRITE`, several hook points joined by `+`."""

    @field_validator("read", "write", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for hooks in (self.read, self.write):
            if any(map(is_pattern, hooks)):
                raise ValueError("'read' and 'write' take names of hook points, no patterns")
            if len(set(hooks)) < len(hooks):
                raise ValueError("a hook point stands twice in 'read' or 'write'")
        if self.name is None:
            return self
        if self.read == self.write and len(self.read) == 1:
            raise ValueError("'name': what reads and writes one hook point is called like it")
        if not _NAME.fullmatch(self.name) or self.name in _TAKEN or not self.name.strip("."):
            raise ValueError(f"'name': no spaces, not dots alone, none of '@=,*?[]', and none of {', '.join(_TAKEN)}")
        return self

    @property
    def site(self) -> Site:
        """The site that it means."""
        reads, writes = tuple(self.read), tuple(self.write)
        if reads == writes and len(reads) == 1:
            return Site.of(reads[0])
        return Site(reads, writes, self.name or "+".join(reads) + "->" + "+".join(writes))


def _kind(value: object) -> str:
    return "function-site" if isinstance(value, dict | SiteEntry) else "function-hook"


Position = Annotated[
    Annotated[Text, Tag("function-hook")] | Annotated[SiteEntry, Tag("function-site")], Discriminator(_kind)
]
"""The tags are called like pydantic's own steps, which an error's place leaves out."""


def as_list(value: object) -> object:
    """A single position as a list of one."""
    return [value] if isinstance(value, str | dict | SiteEntry) else value


def is_pattern(name: str) -> bool:
    """Whether a name may mean several hook points."""
    return any(c in name for c in _PATTERN)


def keys_of(positions: Iterable[Position | Mapping[str, Any]]) -> list[str]:
    """The sites' keys; of hook points the names and patterns as they stand. Also of a raw config's."""
    entries = [SiteEntry.model_validate(p) if isinstance(p, Mapping) else p for p in positions]
    return [entry if isinstance(entry, str) else entry.site.key for entry in entries]


def hooks_of(positions: Iterable[Position]) -> list[str]:
    """Every name and pattern of a hook point."""
    found = [[p] if isinstance(p, str) else p.site.hooks for p in positions]
    return list(dict.fromkeys(hook for hooks in found for hook in hooks))


def resolved(positions: Sequence[Position], resolve: Callable[[Sequence[str]], list[str]]) -> list[Site]:
    """The sites that positions mean: those of single hook points in model order, then the others as they stand.

    `resolve` gives the hook points that names and patterns mean, and refuses what the model lacks.
    """
    single = [p for p in positions if isinstance(p, str)]
    found = {site.key: site for site in map(Site.of, resolve(single) if single else [])}
    for entry in positions:
        if isinstance(entry, SiteEntry):
            for hook in entry.site.hooks:
                resolve([hook])
            if found.setdefault(entry.site.key, entry.site) != entry.site:
                key = entry.site.key
                raise UserError(
                    f"'saes.sae_positions': '{key}' is a hook point that is trained too: name the site anew"
                )
    return list(found.values())
