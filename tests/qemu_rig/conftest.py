"""A place for sockets."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def directory() -> Iterator[Path]:
    """A temporary directory with room in its path for sockets, on a real disk."""
    with tempfile.TemporaryDirectory(prefix="rig-") as path:
        yield Path(path)
