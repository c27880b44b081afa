"""Every registered architecture keeps what `saeopt.testing` asks for, in each of its forms."""

from __future__ import annotations

import pytest
from sae_cases import IDS, VARIANTS

from saeopt.testing import ArchitectureContract


@pytest.fixture(autouse=True, params=VARIANTS, ids=IDS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    sae_type, fields = request.param
    monkeypatch.setattr(TestArchitectures, "sae_type", sae_type)
    monkeypatch.setattr(TestArchitectures, "fields", fields)


class TestArchitectures(ArchitectureContract):
    """All of them."""
