"""A disk that is full."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def full(directory: Path) -> Iterator[None]:
    """Leave no room on the disk of a directory but what is in the last pages of its files."""
    filler = directory / "filler"
    for size in (1 << 16, 1):
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(size))
    try:
        yield
    finally:
        filler.unlink()
