"""The tiers that every rule is tested on."""

from __future__ import annotations

import pytest

from tests.schedule.cpu.graphs import TIERS, runs_here


@pytest.fixture(params=list(TIERS), scope="session")
def tier(request: pytest.FixtureRequest) -> str:
    """A width of vectors."""
    name: str = request.param
    if not runs_here(name):
        pytest.skip(f"this host lacks {name}")
    return name
