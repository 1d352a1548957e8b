"""HTML without holes: every text is escaped once, and only :class:`Markup` passes as it is.

A record carries sentences that another host, a VMM or a guest's name wrote, so nothing here trusts a string.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Final, TypeAlias

_SPACES: Final = "\u00a0\u202f"
"""Spaces that do not break a line, which Python does not count as printable."""


class Markup(str):
    """A piece of finished HTML."""

    __slots__ = ()


Node: TypeAlias = str | int | Markup | None


def text(value: str | int) -> Markup:
    """Escape a text. Control characters and lone surrogates, which HTML cannot hold, show as U+FFFD."""
    clean = "".join(c if c.isprintable() or c in _SPACES else " " if c.isspace() else "\ufffd" for c in str(value))
    return Markup(escape(clean))


def el(name: str, *children: Node, **attributes: str | int | float | bool | None) -> Markup:
    """One element that has a closing tag.

    Attribute names lose a trailing ``_``, and ``_`` becomes ``-``; None and False leave an attribute out.
    """
    parts = [name]
    for key, value in attributes.items():
        attribute = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(attribute)
        elif value is not None and value is not False:
            parts.append(f'{attribute}="{text(str(value))}"')
    return Markup(f"<{' '.join(parts)}>{join(children)}</{name}>")


def breakable(name: str) -> Markup:
    """A long name that may be broken behind its slashes."""
    return Markup(text(name).replace("/", "/<wbr>"))


def join(children: Iterable[Node], between: str = "") -> Markup:
    """Children in a row; None is nothing."""
    separator = str(text(between)) if between else ""
    return Markup(
        separator.join(child if isinstance(child, Markup) else text(child) for child in children if child is not None)
    )
