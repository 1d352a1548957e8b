"""Plain text as roff, the language of manual pages."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Final

WIDTH: Final = 78

_SPECIAL: Final = str.maketrans({"\\": "\\e", "-": "\\-", "–": "\\(en", "…": "...", "^": "\\(ha", "~": "\\(ti"})


def roff(text: str) -> str:
    """Plain text as roff, with ``code`` or `code` in bold. Lines are filled anew.

    Raises:
        ValueError: a character that not every reader of manual pages can show.
    """
    lines = textwrap.wrap(marked(" ".join(text.split())), WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join(f"\\&{line}" if line.startswith((".", "'")) else line for line in lines)


def bold(text: str) -> str:
    """Text in bold."""
    return f"\\fB{escape(text)}\\fR"


def marked(text: str) -> str:
    """Plain text as roff on one line, with ``code`` or `code` in bold."""
    parts = re.split(r"`+([^`]+)`+", text)
    return "".join(bold(part) if number % 2 else escape(part) for number, part in enumerate(parts))


def escape(text: str) -> str:
    """Plain text as roff, character by character.

    Raises:
        ValueError: a character that not every reader of manual pages can show.
    """
    escaped = text.translate(_SPECIAL)
    if not escaped.isascii():
        raise ValueError(f"{text!r} needs a roff escape in {__name__}.")
    return escaped


def paragraphs(text: str) -> str:
    """Text whose paragraphs are separated by empty lines."""
    return "\n.PP\n".join(roff(part) for part in re.split(r"\n\s*\n", inspect.cleandoc(text)))


def tagged(tag: str, text: str) -> str:
    """A tag (roff) and what it means (plain text)."""
    return f".TP\n{tag}\n{roff(text)}"


def example(*lines: str) -> str:
    """Lines as they are."""
    return "\n".join([".in +4n", ".nf", *(escape(line) for line in lines), ".fi", ".in"])
