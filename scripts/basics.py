"""Basics of all tools here: the directory of the checkout, units of memory, and lines of progress for a person."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]
MIB: Final = 1 << 20
GIB: Final = 1 << 30


def say(text: str) -> None:
    """Tell a person, on standard error: standard output is for the one JSON document that programs read."""
    print(text, file=sys.stderr, flush=True)
