"""Where an SAE was trained: what it may be used on follows from that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from saeopt.config.sites import Site

if TYPE_CHECKING:
    from saeopt.config.run import RunConfig


@dataclass(frozen=True)
class Origin:
    """The site and the run's config, as a weights file tells them; of another tool's SAE the site alone."""

    site: Site
    config: RunConfig | None = None
