"""What every tool here uses: where the checkout is, units of memory, and telling a person what happens."""

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
