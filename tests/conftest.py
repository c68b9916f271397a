"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real collections that are read, never shipped; `WHYRANK_DATA` says where they are."""
    place = Path(os.environ.get("WHYRANK_DATA", REPOSITORY.parent / "shared" / "data"))
    if not place.is_dir():
        pytest.skip(f"real data not found at {place}: set WHYRANK_DATA")
    return place
