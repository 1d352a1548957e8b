"""A document with blocks that are made from the code, each between two marks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

Blocks: TypeAlias = dict[str, Callable[[], str]]
"""The function that makes the text between the marks of each name."""


def refreshed(text: str, blocks: Blocks) -> str:
    """The document with everything between ``<!-- NAME begin -->`` and ``<!-- NAME end -->`` made anew.

    Raises:
        ValueError: a block's marks are missing.
    """
    for name, block in blocks.items():
        begin, end = f"<!-- {name} begin -->\n", f"<!-- {name} end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"The document must have {begin.strip()} and {end} once each.")
        head, rest = text.split(begin)
        _, tail = rest.split(end)
        text = f"{head}{begin}\n{block().strip()}\n\n{end}{tail}"
    return text


def main(document: Path, blocks: Blocks) -> int:
    """Print the document as it should be or, with ``--write``, bring it up to date. Returns the exit status."""
    text = refreshed(document.read_text(encoding="utf-8"), blocks)
    if "--write" in sys.argv[1:]:
        document.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0
